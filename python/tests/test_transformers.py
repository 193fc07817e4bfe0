"""The Trainer of transformers: saved beside its own checkpoints, and resumed bit for bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from same import fingerprint
from test_processes import ended
from test_ranks import start
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

import tierkeep
from tierkeep import _stop
from tierkeep.transformers import CheckpointCallback

ROWS, BATCH = 40, 4
#: Of the optimizer, in an epoch: ten batches, two a step.
STEPS = 5


class Model(nn.Module):
    """Dropout draws random numbers, BatchNorm has buffers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1)
        )

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.net(x)
        return nn.functional.mse_loss(found, labels), found


class Killed(Exception):
    pass


class Kill(TrainerCallback):  # type: ignore[misc]
    """Ends the training as abruptly as it can be in one process."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == self.at:
            raise Killed


class Count(TrainerCallback, ExportableState):  # type: ignore[misc]
    """A callback with a state, of which the Trainer makes a new one when it resumes."""

    def __init__(self, steps: int = 0) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.steps += 1

    def state(self) -> dict[str, Any]:
        return {"args": {"steps": self.steps}, "attributes": {}}


def data(seed: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, 6, generator=generator)
    return [{"x": row, "labels": row[:1] * 2} for row in x]


def make(output: Path, seed: int, *callbacks: Any, **options: Any) -> Trainer:
    """A training that logs every three steps, evaluates every second one, and looks at both."""
    args = TrainingArguments(
        output_dir=str(output),
        **{
            "num_train_epochs": 3,
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.05,
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "lr_scheduler_kwargs": {"patience": 0},
            "metric_for_best_model": "loss",
            "restore_callback_states_from_checkpoint": True,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "logging_steps": 3,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": seed,
            **options,
        },
    )
    return Trainer(
        model=Model(seed), args=args, train_dataset=data(), eval_dataset=data(4)[:8],
        callbacks=[Count(), *callbacks],
    )  # fmt: skip


_TIMES = ("train_runtime", "eval_runtime", "per_second")


def all_of(trainer: Trainer) -> Any:
    """A fingerprint of what the training has, and its log without times."""
    log = [
        {name: value for name, value in row.items() if not any(t in name for t in _TIMES)}
        for row in trainer.state.log_history
        if "train_loss" not in row
    ]
    state = {
        "model": trainer.model,
        "optimizer": trainer.optimizer.optimizer,
        "scheduler": trainer.lr_scheduler.state_dict(),
        "rng": tierkeep.Rng(),
        "best": [trainer.state.best_metric, trainer.state.total_flos, trainer.state.epoch],
        "counted": [c.steps for c in trainer.callback_handler.callbacks if isinstance(c, Count)],
        "log": log,
    }
    return fingerprint(state)


def killed(run: Path, output: Path, at: int, seed: int = 0, **options: Any) -> None:
    keeper = CheckpointCallback(run, every=1)
    trainer = make(output, seed, keeper, Kill(at), **options)
    with pytest.raises(Killed):
        trainer.train(resume_from_checkpoint=keeper.newest(trainer))
    assert keeper.ckpt is not None
    keeper.ckpt.close()


SHUFFLES: dict[str, dict[str, Any]] = {
    "a seed": {},
    # Each epoch's order is drawn from the process's own random numbers.
    "no seed": {"accelerator_config": {"use_seedable_sampler": False}},
}


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("at", [3, STEPS + 1, STEPS + 3], ids=["first", "end of", "second"])
def test_a_training_goes_on_bit_for_bit_in_an_epoch(
    run: Path, tmp_path: Path, at: int, shuffle: str
) -> None:
    whole = make(tmp_path / "whole", 0, **SHUFFLES[shuffle])
    whole.train()
    killed(run, tmp_path / "out", at, **SHUFFLES[shuffle])
    # The step that it died in had not begun to be saved. What another seed draws gives way.
    keeper = CheckpointCallback(run, every=1)
    trainer = make(tmp_path / "out", 1, keeper, **SHUFFLES[shuffle])
    path = keeper.newest(trainer)
    assert path is not None
    assert path.endswith(f"/checkpoint-{at - 1}")
    trainer.train(resume_from_checkpoint=path)
    assert trainer.state.global_step == 3 * STEPS
    assert all_of(trainer) == all_of(whole)
    assert not Path(path).exists()
    # The last step of all is saved too.
    assert tierkeep.load(run, include=["trainer/*"])["trainer"]["state"]["global_step"] == 15


def test_a_language_model_with_tied_weights_goes_on(run: Path, tmp_path: Path) -> None:
    def language(output: Path, seed: int, *callbacks: Any) -> Trainer:
        config = GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2)
        torch.manual_seed(seed)
        text = torch.randint(0, 32, (16, 8), generator=torch.Generator().manual_seed(1))
        args = TrainingArguments(
            output_dir=str(output), seed=seed, max_steps=6, per_device_train_batch_size=4,
            logging_steps=4, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        return Trainer(
            model=GPT2LMHeadModel(config), args=args, callbacks=[*callbacks],
            train_dataset=[{"input_ids": row, "labels": row} for row in text],
        )  # fmt: skip

    whole = language(tmp_path / "whole", 0)
    whole.train()
    assert whole.state.total_flos > 0
    keeper = CheckpointCallback(run, every=1)
    trainer = language(tmp_path / "out", 0, keeper, Kill(4))
    with pytest.raises(Killed):
        trainer.train(resume_from_checkpoint=keeper.newest(trainer))
    assert keeper.ckpt is not None
    keeper.ckpt.close()
    keeper = CheckpointCallback(run, every=1)
    trainer = language(tmp_path / "out", 1, keeper)
    trainer.train(resume_from_checkpoint=keeper.newest(trainer))
    assert trainer.model.lm_head.weight is trainer.model.transformer.wte.weight
    assert all_of(trainer) == all_of(whole)


def test_the_loss_that_is_told_at_the_end_is_that_of_the_steps_after_the_resume(
    run: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"logging_steps": 1, "lr_scheduler_type": "linear"}
    options["lr_scheduler_kwargs"] = {}
    whole = make(tmp_path / "whole", 0, **options)
    whole.train()
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    options["logging_steps"] = 4
    killed(run, tmp_path / "out", 7, **options)
    keeper = CheckpointCallback(run, every=1)
    trainer = make(tmp_path / "out", 0, keeper, **options)
    done = trainer.train(resume_from_checkpoint=keeper.newest(trainer))
    assert done.training_loss == pytest.approx(sum(losses[6:]) / len(losses[6:]), rel=1e-6)


def test_the_newer_one_of_both_checkpoints_wins_if_it_is_whole(run: Path, tmp_path: Path) -> None:
    own = {"save_strategy": "steps", "save_steps": 4}
    killed(run, tmp_path / "out", 7, **own)
    keeper = CheckpointCallback(run, every=3)
    trainer = make(tmp_path / "out", 0, keeper, Kill(10), **own)
    # The run has step 6, the Trainer 4.
    path = keeper.newest(trainer)
    assert path is not None and path.endswith("/checkpoint-6")
    with pytest.raises(Killed):
        trainer.train(resume_from_checkpoint=path)
    assert keeper.ckpt is not None
    keeper.ckpt.close()
    # Now it has 9, the Trainer 8; and then 12.
    keeper = CheckpointCallback(run, every=100)
    trainer = make(tmp_path / "out", 0, keeper, Kill(14), **own)
    path = keeper.newest(trainer)
    assert path is not None and path.endswith("/checkpoint-9")
    with pytest.raises(Killed):
        trainer.train(resume_from_checkpoint=path)
    theirs = tmp_path / "out" / "checkpoint-12"
    scheduler = (theirs / "scheduler.pt").read_bytes()
    (theirs / "scheduler.pt").unlink()
    path = keeper.newest(trainer)
    assert path is not None and path.endswith("/checkpoint-9")
    (theirs / "scheduler.pt").write_bytes(scheduler)
    assert keeper.newest(trainer) == str(theirs)
    assert keeper.ckpt is not None
    keeper.ckpt.close()
    keeper = CheckpointCallback(run, every=1)
    trainer = make(tmp_path / "out", 1, keeper, **own)
    trainer.train(resume_from_checkpoint=keeper.newest(trainer))
    assert trainer._initial_global_step == 12
    with tierkeep.Checkpointer(run) as ckpt:
        assert ckpt.latest_step() == 15


@pytest.mark.parametrize("at", [7, STEPS], ids=["within", "end of"])
def test_sigterm_ends_the_training_saved_in_an_epoch(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    options = SHUFFLES["no seed"]
    whole = make(tmp_path / "whole", 0, **options)
    whole.train()
    asked: list[int] = []
    monkeypatch.setattr(_stop, "requested", lambda: len(asked) == at)

    class Ask(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            asked.append(state.global_step)

    keeper = CheckpointCallback(run, every=100)
    trainer = make(tmp_path / "out", 0, Ask(), keeper, **options)
    trainer.train(resume_from_checkpoint=keeper.newest(trainer))
    assert (keeper.stopped, trainer.state.global_step) == (True, at)
    monkeypatch.setattr(_stop, "requested", lambda: False)
    keeper = CheckpointCallback(run, every=100)
    trainer = make(tmp_path / "out", 1, keeper, **options)
    trainer.train(resume_from_checkpoint=keeper.newest(trainer))
    assert not keeper.stopped
    assert all_of(trainer) == all_of(whole)


def test_a_training_that_would_not_go_on_is_refused(run: Path, tmp_path: Path) -> None:
    killed(run, tmp_path / "out", 4)
    keeper = CheckpointCallback(run)
    trainer = make(tmp_path / "out", 0, keeper)
    with pytest.raises(tierkeep.InvalidError, match="does not know the Trainer"):
        trainer.train()
    keeper.newest(trainer)
    with pytest.raises(tierkeep.InvalidError, match="begins at step 0, the run has step 3"):
        trainer.train()
    assert keeper.ckpt is not None
    keeper.ckpt.close()
    keeper = CheckpointCallback(run, every=1, fresh=True)
    trainer = make(tmp_path / "out", 0, max_steps=2)
    assert keeper.newest(trainer) is None
    trainer.train()
    assert tierkeep.load(run, include=["trainer/*"])["trainer"]["state"]["global_step"] == 2


def test_a_node_that_sees_less_than_all_goes_on_from_what_all_have_decided(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(run, tmp_path / "out", 4)
    # With a directory of its own, and its agent: only the decision knows the other nodes.
    monkeypatch.setattr(tierkeep.Checkpointer, "steps", lambda _: [])
    keeper = CheckpointCallback(run, every=1)
    trainer = make(tmp_path / "out", 1, keeper, Kill(5))
    path = keeper.newest(trainer)
    assert path is not None and path.endswith("/checkpoint-3")
    with pytest.raises(Killed):
        trainer.train(resume_from_checkpoint=path)
    assert trainer._initial_global_step == 3
    # It has begun: what the run has now is not what that path says.
    with pytest.raises(tierkeep.InvalidError, match="once for each call of train"):
        trainer.train(resume_from_checkpoint=path)
    assert keeper.ckpt is not None
    keeper.ckpt.close()


def test_a_training_that_begins_anew_by_itself_is_refused(run: Path, tmp_path: Path) -> None:
    trainer = make(tmp_path / "out", 0, auto_find_batch_size=True)
    with pytest.raises(tierkeep.InvalidError, match="find the size first"):
        CheckpointCallback(run).newest(trainer)


class Stop(TrainerCallback):  # type: ignore[misc]
    """Ends each epoch before its time, and so the last one: nobody ends the training."""

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        control.should_epoch_stop = state.global_step % 3 == 0


@pytest.mark.parametrize("why", ["evaluation", "epochs"])
def test_the_last_step_is_saved_whatever_ends_the_training(
    run: Path, tmp_path: Path, why: str
) -> None:
    ends = EarlyStoppingCallback(1) if why == "evaluation" else Stop()
    keeper = CheckpointCallback(run, every=100)
    options: dict[str, Any] = {"learning_rate": 0.0, "eval_strategy": "epoch"}
    trainer = make(tmp_path / "out", 0, keeper, ends, **options)
    trainer.train(resume_from_checkpoint=keeper.newest(trainer))
    step = trainer.state.global_step
    assert step == (2 * STEPS if why == "evaluation" else 3 * 3)
    saved = tierkeep.load(run)["trainer"]["state"]
    assert saved["global_step"] == step
    # Its evaluation too.
    assert [row["step"] for row in saved["log_history"] if "eval_loss" in row][-1] == step


class Wide(nn.Module):
    """Enough of it for a copy to take a while."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1 << 24))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.weight[:6] * x).sum() * 0, x


def test_what_is_put_in_place_of_the_last_weights_is_not_saved(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"optim": "sgd", "max_steps": 1, "eval_strategy": "no"}
    options |= {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {}, "max_grad_norm": 0}
    keeper = CheckpointCallback(run, every=1, capture="overlap", threads=1)
    trainer = make(tmp_path / "out", 0, keeper, **options)
    trainer.model = Wide()
    finalize = trainer._finalize_training

    def others(*arguments: Any) -> Any:
        with torch.no_grad():
            trainer.model.weight.fill_(7)
        return finalize(*arguments)

    monkeypatch.setattr(trainer, "_finalize_training", others)
    trainer.train(resume_from_checkpoint=keeper.newest(trainer))
    assert (tierkeep.load(run)["model"]["weight"] == 1).all()


class Fence(TrainerCallback):  # type: ignore[misc]
    """Leaves a note of what waits for the copy, and when."""

    def __init__(self, keeper: CheckpointCallback) -> None:
        self.keeper, self.waited = keeper, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        assert self.keeper.ckpt is not None
        guarded = self.keeper.ckpt._guarded
        wait = guarded.wait

        def counted() -> None:
            self.waited += 1
            wait()

        guarded.wait = counted  # type: ignore[method-assign]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        # Before the optimizer, which may be passed over.
        assert self.waited == 2 * state.global_step + 1


def test_a_step_that_the_scaler_leaves_out_waits_for_the_copy_too(
    run: Path, tmp_path: Path
) -> None:
    keeper = CheckpointCallback(run, every=100, capture="overlap")
    fence = Fence(keeper)
    trainer = make(tmp_path / "out", 0, keeper, fence, max_steps=2)
    trainer.train(resume_from_checkpoint=keeper.newest(trainer))
    assert fence.waited == 4


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_what_keeps_its_state_itself_is_refused(run: Path, kind: str) -> None:
    accelerator = SimpleNamespace(distributed_type=DistributedType[kind], is_fsdp2=False)
    other: Any = SimpleNamespace(accelerator=accelerator)
    with pytest.raises(tierkeep.InvalidError, match=r"keeps its state itself|say fsdp_version=2"):
        CheckpointCallback(run).newest(other)


def test_metrics_of_numpy_come_back_as_numbers(run: Path, tmp_path: Path) -> None:
    import numpy

    class Odd(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            state.log_history.append({"odd": numpy.float32(0.5), "even": torch.tensor(2)})

    keeper = CheckpointCallback(run, every=1)
    trainer = make(tmp_path / "out", 0, keeper, Odd(), Kill(3))
    with pytest.raises(Killed):
        trainer.train(resume_from_checkpoint=keeper.newest(trainer))
    path = keeper.newest(trainer)
    assert path is not None
    log = json.loads((Path(path) / "trainer_state.json").read_text())["log_history"]
    assert {"odd": 0.5, "even": 2} in log
    assert keeper.ckpt is not None
    keeper.ckpt.close()


RANKS = """
    import json, os, signal, sys
    import torch
    from test_transformers import Model, data
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    from transformers import Trainer, TrainerCallback, TrainingArguments
    import tierkeep.transformers

    run, stop, sharded = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "FSDP2"

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            if state.global_step == stop:
                keeper.ckpt.wait_all("ram")
                torch.distributed.barrier()
                os.kill(os.getpid(), signal.SIGKILL)

    def train(run, seed, callbacks):
        torch.manual_seed(seed)
        trainer = Trainer(model=Model(seed), callbacks=callbacks, train_dataset=data(),
            args=TrainingArguments(
                output_dir=run + "-out", num_train_epochs=2, per_device_train_batch_size=4,
                learning_rate=0.05, logging_steps=2, save_strategy="no", report_to="none",
                disable_tqdm=True, use_cpu=True, ddp_backend="gloo", log_level="error"))
        if sharded:  # Which Accelerate does not offer on CPUs; what it then does is the same.
            for state in (PartialState, AcceleratorState):
                state._shared_state["distributed_type"] = DistributedType.FSDP
            trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2,
                reshard_after_forward=True, auto_wrap_policy="no_wrap")
            mesh = torch.distributed.init_device_mesh("cpu", (2,))
            trainer.accelerator.state.torch_device_mesh = mesh
            trainer.is_fsdp_enabled = True
        torch.manual_seed(seed + trainer.args.process_index)  # Dropout of each rank is its own.
        trainer.train(resume_from_checkpoint=keeper.newest(trainer) if callbacks else None)
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        whole = [getattr(p, "full_tensor", lambda p=p: p)() for p in trainer.model.parameters()]
        return {"net": [p.tolist() for p in whole], "losses": losses,
                "rng": torch.rand(1).item(), "step": trainer.state.global_step}

    if stop:
        print(json.dumps(train(run, 0, [])), flush=True)
    keeper = tierkeep.transformers.CheckpointCallback(run, every=1)
    print(json.dumps(train(run, 0 if stop else 7, [Kill(), keeper])), flush=True)
"""


def said(out: str) -> Any:
    """The first line that is JSON: the Trainer prints its log as Python."""
    return json.loads(next(line for line in out.splitlines() if line.startswith('{"')))


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_two_ranks_go_on_and_the_first_saves_what_both_have(run: Path, kind: str) -> None:
    results = [ended(rank) for rank in start(2, RANKS, run, 7, kind)]
    assert [code for code, *_ in results] == [-signal.SIGKILL] * 2, results
    whole = [said(out) for _, out, _ in results]
    results = [ended(rank) for rank in start(2, RANKS, run, 0, kind)]
    assert [code for code, *_ in results] == [0, 0], results
    again = [said(out) for _, out, _ in results]
    assert again == whole
    assert whole[0]["net"] == whole[1]["net"]
    assert whole[0]["rng"] != whole[1]["rng"]
    assert "model" in tierkeep.load(run, rank=0)
    own = {"trainer", "scheduler", "order", "rng", "epoch_rng"}
    second = set(tierkeep.load(run, rank=1))
    assert second == (own if kind == "DDP" else {"model", "optimizer", *own})
