"""`training_state`: what a resumed job needs, optimizers by the names of their parameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from same import fingerprint
from test_processes import ended
from test_ranks import start
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import tierkeep
from tierkeep.torch import OptimizerState, training_state


class Loader:
    """As torchdata's `StatefulDataLoader`: it knows where it is."""

    def __init__(self) -> None:
        self.at = 0

    def next(self) -> torch.Tensor:
        self.at += 1
        return torch.full((4, 6), float(self.at))

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def job(seed: int) -> tuple[dict[str, Any], Any]:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 2))
    model = torch.compile(layers, backend="eager")
    optimizer = torch.optim.AdamW(
        [{"params": layers[0].parameters(), "lr": 0.1}, {"params": layers[2].parameters()}]
    )
    scheduler, loader = CosineAnnealingLR(optimizer, 10), Loader()
    state = training_state(model, optimizer, scheduler=scheduler, loader=loader, epoch=[0])

    def train() -> float:
        loss = state["model"](loader.next() + torch.randn(4, 6)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        state["epoch"][0] += 1
        return float(loss.item())

    return state, train


def test_a_resumed_job_goes_on_bit_for_bit(run: Path) -> None:
    state, train = job(0)
    with tierkeep.Checkpointer(run) as ckpt:
        assert ckpt.restore(state) is None
        losses = []
        for step in range(1, 7):
            losses.append(train())
            if step == 3:
                ckpt.save(step, state)
        end = fingerprint(state)
    state, train = job(1)
    with tierkeep.Checkpointer(run) as ckpt:
        found = ckpt.restore(state)
        assert found is not None
        assert [train() for _ in range(3)] == losses[3:]
        assert fingerprint(state) == end
    names = tierkeep.load(run)["optim"]["state"]
    assert list(names) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_the_order_of_the_parameters_does_not_matter(run: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    one = torch.optim.Adam(model.parameters())
    other = torch.optim.Adam(reversed([*model.parameters()]))
    for number, param in enumerate(model.parameters()):
        param.grad = torch.full_like(param, float(number + 1))
    one.step()
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.save(1, {"optim": OptimizerState(model, one)})
        assert ckpt.restore({"optim": OptimizerState(model, other)}, read_only=True) is not None
    for param in model.parameters():
        assert torch.equal(one.state[param]["exp_avg"], other.state[param]["exp_avg"])


def test_what_cannot_be_meant_is_refused() -> None:
    model = nn.Linear(2, 2)
    stranger = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    with pytest.raises(tierkeep.InvalidError, match="group 0 of the optimizer has a parameter"):
        training_state(model, stranger)
    with pytest.raises(tierkeep.InvalidError, match="rng: that is the name of something else"):
        training_state(model, rng=1)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (lambda model, optimizer: optimizer, "saved by the order of its parameters"),
        (lambda *both: [OptimizerState(*both)], "saved as something else than an optimizer"),
        (lambda *both: {"adam": OptimizerState(*both)}, "saved as something else"),
        (lambda *both: None, "saved as something else than an optimizer"),
    ],
    ids=["itself", "list", "dict", "none"],
)
def test_an_optimizer_that_was_saved_in_another_form_is_named(
    run: Path, form: Callable[..., Any], words: str
) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = made()
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    with tierkeep.Checkpointer(run) as ckpt:
        saved = {**training_state(model, optimizer), "optim": form(model, optimizer)}
        ckpt.save(1, saved).wait("ram")
        model, optimizer = made()
        before = fingerprint(model.state_dict())
        for strict in (True, False):
            with pytest.raises(tierkeep.MismatchError, match=f"optim: {words}"):
                ckpt.restore(training_state(model, optimizer), strict=strict)
        assert fingerprint(model.state_dict()) == before
        assert not optimizer.state


def test_parameters_that_only_one_side_steps_are_named(run: Path) -> None:
    model = nn.Linear(3, 2)
    weight, bias = (torch.optim.AdamW([param]) for param in (model.weight, model.bias))
    model(torch.ones(3)).sum().backward()
    weight.step()
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.save(1, training_state(model, weight)).wait("ram")
        state = training_state(model, bias)
        with pytest.raises(tierkeep.MismatchError) as info:
            ckpt.restore(state)
        assert info.value.differences == [
            "optim/bias: not in the checkpoint",
            "optim/weight: in the checkpoint, not in the state",
        ]
        ckpt.restore(state, strict=False)
        assert not bias.state


def test_a_rank_that_had_no_optimizer_gets_one_that_others_saved(run: Path) -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizers = [torch.optim.Adam(model.parameters()) for model in (one, other)]
    for param in one.parameters():
        param.grad = torch.ones_like(param)
    optimizers[0].step()
    ranks = [
        tierkeep.Checkpointer(run, rank=rank, world_size=2, attempt_id="a" * 32) for rank in (0, 1)
    ]
    ranks[0].save(1, {"optim": OptimizerState(one, optimizers[0])})
    ranks[1].save(1, {"n": 1})
    state = {"optim": OptimizerState(other, optimizers[1]), "n": 0}
    ranks[1].restore(state, read_only=True)
    for rank in ranks:
        rank.close()
    assert state["n"] == 1
    for mine, theirs in zip(other.parameters(), one.parameters(), strict=True):
        moments = [optimizers[0].state[theirs], optimizers[1].state[mine]]
        assert torch.equal(moments[0]["exp_avg"], moments[1]["exp_avg"])


STAGES = """
    import json, os, sys
    import torch
    import tierkeep
    from tierkeep.torch import training_state

    order = json.loads(sys.argv[2])
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    stage = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in order[rank]})
    optimizer = torch.optim.AdamW(stage.parameters(), lr=0.125)
    state = training_state(stage, optimizer)
    with tierkeep.Checkpointer(sys.argv[1]) as ckpt:
        found = ckpt.restore(state)
        if found is None:
            for name, layer in stage.items():
                for param in layer.parameters():
                    param.data.fill_(float(name[-1]))
                    param.grad = torch.full_like(param, 1.0 + float(name[-1]))
            optimizer.step()
        told = {
            name: [param.tolist(), optimizer.state[param]["exp_avg"].tolist()]
            for name, param in stage.named_parameters()
        }
        ckpt.save((found.step if found else 0) + 1, state).wait("disk", 60)
    print(json.dumps([told, optimizer.param_groups[0]["lr"]]))
"""


def test_a_pipeline_that_is_cut_elsewhere_finds_its_moments(run: Path) -> None:
    def life(order: list[list[str]]) -> dict[str, Any]:
        results = [ended(rank) for rank in start(len(order), STAGES, run, json.dumps(order))]
        assert all(code == 0 for code, *_ in results), results
        told = [json.loads(out) for _, out, _ in results]
        assert all(lr == 0.125 for _, lr in told)
        return {name: x for stage, _ in told for name, x in stage.items()}

    layers = [f"layer{i}" for i in range(4)]
    first = life([layers[:2], layers[2:]])
    assert len(first) == 8
    for order in ([layers], [layers[3:], layers[:3]], [[name] for name in reversed(layers)]):
        assert life(order) == first
