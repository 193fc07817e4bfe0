"""A job that is stopped and resumed goes on to the same bits as one that was not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import State, interrupted, mlp, regression
from torch import nn

import tierkeep

CAPTURES = ["now", "overlap"]


def job(make: Callable[[nn.Module], State], model: Callable[[], nn.Module] = mlp) -> Any:
    def build() -> tuple[State, Callable[[], float]]:
        net = model()
        state = {"model": net, **make(net), "rng": tierkeep.Rng()}
        optimizers = [v for v in state.values() if isinstance(v, torch.optim.Optimizer)]
        schedulers = [v for k, v in state.items() if k.startswith("sched")]
        step = regression(net, optimizers)

        def train() -> float:
            loss = step()
            for scheduler in schedulers:
                scheduler.step()
            return loss

        return state, train

    return build


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "AdamW with a tensor as lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2)),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fresh_optimizer_comes_back(name: str, run: Path) -> None:
    interrupted(job(lambda m: {"optim": OPTIMIZERS[name](m.parameters())}), run, 3, 4)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 2, 5], 0.3),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=50),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        ],
        [2],
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_comes_back(name: str, run: Path) -> None:
    def make(model: nn.Module) -> State:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return {"optim": optimizer, "sched": SCHEDULERS[name](optimizer)}

    interrupted(job(make), run, 3, 4)


class MasterWeights(torch.optim.Optimizer):
    """bf16 parameters, fp32 moments, as large models are trained."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-2, "name": "master"})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["kind"] = "ema"
                    state["moments"] = [torch.zeros_like(p, dtype=torch.float32) for _ in "ab"]
                    state["master"] = p.float().clone()
                state["step"] += 1
                first, second = state["moments"]
                grad = p.grad.float()
                first.lerp_(grad, 0.1)
                second.lerp_(grad.square(), 0.01)
                state["master"].addcdiv_(first, second.sqrt() + 1e-6, value=-group["lr"])
                p.copy_(state["master"])
        return None


@pytest.mark.parametrize("capture", CAPTURES)
def test_bf16_parameters_with_fp32_moments_come_back(run: Path, capture: str) -> None:
    make = job(lambda m: {"optim": MasterWeights(m.parameters())}, lambda: mlp().bfloat16())
    interrupted(make, run, 3, 4, capture=capture)


def test_an_optimizer_that_has_state_already_keeps_its_tensors(run: Path) -> None:
    build = job(lambda m: {"optim": torch.optim.AdamW(m.parameters())})
    state, train = build()
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore(state)
        train()
        ckpt.save(1, state)
    moments = [s["exp_avg"] for s in state["optim"].state.values()]
    kept = [m.clone() for m in moments]
    train()
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore(state)
    for now, before, value in zip(state["optim"].state.values(), moments, kept, strict=True):
        assert now["exp_avg"] is before
        assert torch.equal(before, value)


# -- everything at once, both captures -------------------------------------------------------


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 64), nn.BatchNorm1d(64), nn.Linear(64, 6))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1  # A buffer that forward changes.
        return self.layers(x)  # type: ignore[no-any-return]


class Ema:
    """A moving average of the parameters, in tensors of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.shadow = {n: p.detach().clone() for n, p in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        for name, parameter in self.model.named_parameters():
            self.shadow[name].lerp_(parameter, 0.1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.shadow

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.shadow = dict(state)


def everything() -> tuple[State, Callable[[], float]]:
    first, second, ema_of = Norm(), mlp(), None
    one = torch.optim.AdamW(first.parameters(), lr=1e-2)
    two = torch.optim.SGD(second.parameters(), lr=1e-2, momentum=0.9)
    ema_of = Ema(first)
    counts = {"steps": 0, "losses": []}
    state: State = {
        "first": first,
        "second": second,
        "one": one,
        "two": two,
        "ema": ema_of,
        "counts": counts,
        "rng": tierkeep.Rng(),
    }

    def train() -> float:
        loss = second(first(torch.randn(8, 6))).square().mean()
        one.zero_grad()
        two.zero_grad()
        loss.backward()
        one.step()
        two.step()
        ema_of.update()
        counts["steps"] += 1
        counts["losses"].append(loss.item())
        return float(loss.item())

    return state, train


@pytest.mark.parametrize("capture", CAPTURES)
def test_batch_norm_an_ema_and_two_optimizers_come_back(run: Path, capture: str) -> None:
    interrupted(everything, run, 4, 4, capture=capture)


def in_backward() -> tuple[State, Callable[[], float]]:
    """Each parameter has an optimizer of its own, which steps in backward."""
    model = mlp()
    optimizers = {n: torch.optim.Adam([p], lr=1e-2) for n, p in model.named_parameters()}
    for name, parameter in model.named_parameters():

        def hook(_: torch.Tensor, name: str = name) -> None:
            optimizers[name].step()
            optimizers[name].zero_grad()

        parameter.register_post_accumulate_grad_hook(hook)

    def train() -> float:
        loss = model(torch.randn(8, 6)).square().mean()
        loss.backward()
        return float(loss.item())

    return {"model": model, "optims": optimizers, "rng": tierkeep.Rng()}, train


@pytest.mark.parametrize("capture", CAPTURES)
def test_an_optimizer_in_backward_comes_back(run: Path, capture: str) -> None:
    interrupted(in_backward, run, 3, 4, capture=capture)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 8)
        self.head = nn.Linear(8, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.float() @ self.embed.weight)  # type: ignore[no-any-return]


def test_tied_weights_are_stored_once_and_come_back_tied(run: Path) -> None:
    interrupted(job(lambda m: {"optim": torch.optim.AdamW(m.parameters())}, Tied), run, 2, 3)
    loaded = tierkeep.load(run)
    assert loaded["model"]["embed.weight"] is loaded["model"]["head.weight"]
    (payload,) = sorted(run.glob("*/*/rank-*.safetensors"))[-1:]
    from safetensors import safe_open

    with safe_open(payload, "pt") as file:
        names = list(file.keys())
        assert [k for k in names if k.startswith("model/")] == ["model/embed.weight"]


def test_overlap_saves_the_same_bits_as_now(ram: Path, tmp_path: Path) -> None:
    trees = []
    for capture in CAPTURES:
        torch.manual_seed(3)
        state, train = everything()
        run = tmp_path / capture
        with tierkeep.Checkpointer(run, capture=capture, slots=4) as ckpt:  # type: ignore[arg-type]
            ckpt.restore(state)
            ckpt.guard(state["one"], state["two"])
            for step in range(6):
                train()
                ckpt.save(step + 1, state)
        trees.append({s: fingerprint_of(run, s) for s in (5, 6) if on_disk(run, s)})
    common = set(trees[0]) & set(trees[1])
    assert 6 in common
    for step in common:
        assert trees[0][step] == trees[1][step]


def fingerprint_of(run: Path, step: int) -> Any:
    from same import fingerprint

    return fingerprint(tierkeep.load(run, step))


def on_disk(run: Path, step: int) -> bool:
    return any(run.glob(f"{step:020}/*/CHECKPOINT.json"))


def test_only_guarded_optimizers_tensors_are_late(run: Path) -> None:
    """What is not guarded may change the moment `save` returns."""
    model = nn.Linear(700, 700)
    guarded = torch.optim.SGD(model.parameters(), lr=0.1)
    loose = torch.randn(700, 700)
    state = {"model": model, "optim": guarded, "loose": loose}
    with tierkeep.Checkpointer(run, capture="overlap", slots=3) as ckpt:
        ckpt.restore(state)
        ckpt.guard(guarded)
        for step in range(1, 12):
            weight = model.weight.detach().clone()
            was = loose.clone()
            save = ckpt.save(step, state)
            loose.normal_()
            model.weight.grad = torch.ones_like(model.weight)
            guarded.step()
            save.wait("ram", 30)
            if step % 5 == 0:
                again = copy.deepcopy(state)
                ckpt.restore(again, read_only=True)
                assert torch.equal(again["loose"], was)
                assert torch.equal(again["model"].weight, weight)
