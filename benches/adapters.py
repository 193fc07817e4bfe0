"""What each adapter adds to a save and a restore of a `Checkpointer`: the training's wait.

    python benches/adapters.py [--rounds 9] [--only dcp,orbax]

1 GiB of a GPT's parameters and AdamW's moments, then 2,000 small tensors, in RAM alone (nothing is
due for disk). A process for each adapter; in it saves and memcpys of the same tensors take turns,
and medians of the ratios of neighbours are printed, beside those of a `Checkpointer` in a process
right before. Where a host calls us in its hooks, these open the run and read from disk, since the
training before has closed it; beside those stands a `Checkpointer` that does the same.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: In a step of training of their hosts these are called; what is timed is their own work.
OPTIONS: dict[str, Any] = {"disk_every": 10**9}

Pairs = list[tuple[float, float]]


class Timed:
    """Seconds of the calls of a function that somebody else makes."""

    def __init__(self, work: Callable[..., Any]) -> None:
        self.work = work
        self.took: list[float] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        result = self.work(*args, **kwargs)
        self.took.append(time.perf_counter() - begun)
        return result


class Way:
    """One way to save. `save` returns when the training may go on; `settle` is not timed."""

    def __init__(self, model: Any, optimizer: Any, run: Path) -> None:
        self.model, self.optimizer, self.run = model, optimizer, run
        #: Seconds of a `Checkpointer` that is opened for each restore, where this one is.
        self.anew: Pairs = []

    def save(self, step: int) -> None:
        raise NotImplementedError

    def settle(self) -> None:
        """What is left of the save."""

    def restore(self, step: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """The end."""

    def saves(self, memcpy: Any, rounds: int) -> Pairs:
        """Seconds of a save and of the memcpy right before it."""
        pairs = []
        for step in range(1, rounds + 1):
            out, save = Timed(memcpy.out), Timed(self.save)
            out()
            save(step)
            self.settle()
            pairs.append((save.took[0], out.took[0]))
        return pairs

    def restores(self, memcpy: Any, rounds: int, step: int) -> Pairs:
        """The same of a restore."""
        pairs = []
        for _ in range(rounds):
            back, restore = Timed(memcpy.back), Timed(self.restore)
            back()
            restore(step)
            pairs.append((restore.took[0], back.took[0]))
        return pairs


class Hosted(Way):
    """One whose host calls: what is timed is what the host waits for in its hooks."""

    def train(self, callback: Any, steps: int) -> None:
        raise NotImplementedError

    def callback(self) -> Any:
        raise NotImplementedError

    def saves(self, memcpy: Any, rounds: int) -> Pairs:
        callback = self.callback()
        out, save = Timed(memcpy.out), Timed(callback._save)

        def both(*args: Any) -> None:
            out()
            save(*args)

        callback._save = both
        self.train(callback, rounds)
        return list(zip(save.took, out.took, strict=True))

    def restores(self, memcpy: Any, rounds: int, step: int) -> Pairs:
        weight = next(self.model.parameters())
        moments = self.optimizer.state.get(weight, {}).values()
        samples = [weight.data, *(x for x in moments if x.dim())]
        pairs = []
        for _ in range(rounds):
            callback = self.callback()
            hooks = [Timed(getattr(callback, name)) for name in self.hooks]
            back, opened = Timed(memcpy.back), Timed(self.opened)
            back()
            self.opened().close()  # What was in RAM is on disk alone now, for both that follow.
            for sample in samples:
                sample.zero_()
            opened().close()
            assert all(sample.any() for sample in samples), "these are not the host's names"
            for name, hook in zip(self.hooks, hooks, strict=True):
                setattr(callback, name, hook)
            self.train(callback, step)
            pairs.append((sum(hook.took[0] for hook in hooks), back.took[0]))
            self.anew.append((opened.took[0], back.took[0]))
        return pairs

    def opened(self) -> Any:
        """A `Checkpointer` that opens the run and restores the same tensors."""
        import torch

        import tierkeep
        import tierkeep.torch

        ckpt = tierkeep.Checkpointer(self.run, **OPTIONS)
        model = torch.nn.ModuleDict({"gpt": self.model})
        state = self.named(model, tierkeep.torch.OptimizerState(model, self.optimizer))
        ckpt.restore(state, strict=False)
        return ckpt

    def named(self, model: Any, optimizer: Any) -> Any:
        """Under the names that the host gives them."""
        raise NotImplementedError

    #: Those that restore.
    hooks: tuple[str, ...] = ()


class Plain(Way):
    """`tierkeep.Checkpointer`"""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        import tierkeep

        self.ckpt = tierkeep.Checkpointer(self.run, **OPTIONS)
        self.state = self.of(tierkeep)
        self.ckpt.restore(self.state)

    def of(self, tierkeep: Any) -> Any:
        return {"model": self.model, "optim": self.optimizer}

    def save(self, step: int) -> None:
        self.last = self.ckpt.save(step, self.state)

    def settle(self) -> None:
        self.last.wait("ram")

    def restore(self, step: int) -> None:
        self.ckpt.restore(self.state)

    def close(self) -> None:
        self.ckpt.close()


class Gathered(Plain):
    """`tierkeep.torch.training_state`"""

    def of(self, tierkeep: Any) -> Any:
        import tierkeep.torch

        return tierkeep.torch.training_state(self.model, self.optimizer)


class Dcp(Way):
    """`dcp.async_save`, `dcp.load`"""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        import torch.distributed as dist

        store = dist.TCPStore("127.0.0.1", 0, is_master=True)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        self.state = {"model": self.model.state_dict(), "optim": self.optimizer.state_dict()}

    def save(self, step: int) -> None:
        import torch.distributed.checkpoint as dcp

        from tierkeep.torch import StorageWriter

        writer = StorageWriter(self.run / f"step-{step}", level="ram", **OPTIONS)
        self.future = dcp.async_save(self.state, storage_writer=writer)

    def settle(self) -> None:
        self.future.result()

    def restore(self, step: int) -> None:
        import torch.distributed.checkpoint as dcp

        from tierkeep.torch import StorageReader

        dcp.load(self.state, storage_reader=StorageReader(self.run / f"step-{step}"))


class Accelerated(Way):
    """`tierkeep.accelerate.Keeper`"""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        from accelerate import Accelerator

        import tierkeep.accelerate

        accelerator = Accelerator(cpu=True)
        accelerator.prepare(self.model, self.optimizer)
        self.keeper = tierkeep.accelerate.Keeper(accelerator, self.run, **OPTIONS)
        self.keeper.restore()

    def save(self, step: int) -> None:
        self.last = self.keeper.save(step)

    def settle(self) -> None:
        self.last.wait("ram")

    def restore(self, step: int) -> None:
        self.keeper.restore()

    def close(self) -> None:
        self.keeper.close()


class DeepSpeed(Way):
    """`engine.save_checkpoint`, `load_checkpoint`"""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        import deepspeed

        import tierkeep.deepspeed

        deepspeed.logger.setLevel("ERROR")
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        config = {"train_batch_size": 1, "zero_allow_untested_optimizer": True}
        self.engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=self.optimizer, config=config
        )
        tierkeep.deepspeed.attach(self.engine, self.run, **OPTIONS)

    def save(self, step: int) -> None:
        self.engine.global_steps = step
        self.engine.save_checkpoint(str(self.run))

    def restore(self, step: int) -> None:
        self.engine.load_checkpoint(str(self.run))

    def close(self) -> None:
        self.engine.checkpoint_engine.cleanup()


class Meta(Way):
    """`torch_checkpointing.CheckpointManager`, which serialises first"""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        from torch_checkpointing import CheckpointManager

        from tierkeep.torch_checkpointing import configured

        config = CheckpointManager.Config.with_sync_save()
        self.manager = CheckpointManager(configured(config, level="ram", **OPTIONS))
        self.state = {"model": self.model.state_dict(), "optim": self.optimizer.state_dict()}

    def save(self, step: int) -> None:
        self.manager.save(str(self.run / f"step_{step}"), self.state)

    def restore(self, step: int) -> None:
        self.manager.load(str(self.run / f"step_{step}"), into=self.state)


class Orbax(Way):
    """`ocp.CheckpointManager`; arrays of JAX, which a restore makes anew"""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        import jax
        import orbax.checkpoint as ocp
        from state import tensors

        import tierkeep.orbax

        self.tierkeep = tierkeep.orbax
        self.state = [jax.numpy.asarray(t.numpy()) for t in tensors(self.model, self.optimizer)]
        self.like = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in self.state
        ]
        handler = tierkeep.orbax.Handler(level="ram", **OPTIONS)
        options = ocp.CheckpointManagerOptions(max_to_keep=1)
        self.manager = ocp.CheckpointManager(self.run, options=options, item_handlers=handler)

    def save(self, step: int) -> None:
        self.manager.save(step, args=self.tierkeep.Save(self.state))

    def settle(self) -> None:
        self.manager.wait_until_finished()

    def restore(self, step: int) -> None:
        self.manager.restore(step, args=self.tierkeep.Restore(self.like))

    def close(self) -> None:
        self.manager.close()


class Lightning(Hosted):
    """Lightning's callback"""

    hooks = ("on_fit_start",)

    def named(self, model: Any, optimizer: Any) -> Any:
        return {"model": model, "optim": [optimizer]}

    def callback(self) -> Any:
        import tierkeep.lightning

        return tierkeep.lightning.CheckpointCallback(self.run, every=1, **OPTIONS)

    def train(self, callback: Any, steps: int) -> None:
        import lightning.pytorch as pl

        gpt, optimizer = self.model, self.optimizer

        class Module(pl.LightningModule):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.gpt = gpt

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return next(self.gpt.parameters()).mean()

            def configure_optimizers(self) -> Any:
                return optimizer

        quiet = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=steps, max_epochs=-1, callbacks=[callback], **quiet
        )
        trainer.fit(Module(), [0] * 10**4)


class Transformers(Hosted):
    """The callback of transformers' Trainer"""

    hooks = ("newest", "on_train_begin")

    def named(self, model: Any, optimizer: Any) -> Any:
        return {"model": model, "optimizer": optimizer}

    def callback(self) -> Any:
        import tierkeep.transformers

        return tierkeep.transformers.CheckpointCallback(self.run, every=1, **OPTIONS)

    def train(self, callback: Any, steps: int) -> None:
        import torch
        from transformers import Trainer, TrainingArguments

        class Model(torch.nn.Module):
            def __init__(self, gpt: Any) -> None:
                super().__init__()
                self.gpt = gpt

            def forward(self, x: Any) -> Any:
                return {"loss": next(self.gpt.parameters()).mean()}

        told = TrainingArguments(
            str(self.run.parent / "own"),
            max_steps=steps,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            per_device_train_batch_size=1,
        )
        scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, 1.0)
        trainer = Trainer(
            Model(self.model),
            told,
            train_dataset=[{"x": torch.zeros(1)}] * 10**4,
            optimizers=(self.optimizer, scheduler),
            callbacks=[callback],
        )
        trainer.train(resume_from_checkpoint=callback.newest(trainer))


WAYS: dict[str, type[Way]] = {
    "checkpointer": Plain,
    "training_state": Gathered,
    "dcp": Dcp,
    "accelerate": Accelerated,
    "lightning": Lightning,
    "transformers": Transformers,
    "deepspeed": DeepSpeed,
    "torch_checkpointing": Meta,
    "orbax": Orbax,
}


def small() -> tuple[Any, Any]:
    """2,000 parameters of 1 KiB each, and an optimizer without a state."""
    import torch

    model = torch.nn.ParameterList(torch.randn(256) for _ in range(2000))
    return model, torch.optim.SGD(model.parameters(), lr=1e-9)


def measured(name: str, rounds: int, run: Path, tiny: bool) -> Iterator[tuple[str, float]]:
    """Ratios to memcpy, and milliseconds."""
    from state import Memcpy, gpt_state, tensors

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    model, optimizer = small() if tiny else gpt_state()
    kept = tensors(model, optimizer)  # Some hosts put others in their place.
    memcpy = Memcpy(kept)
    way = WAYS[name](model, optimizer, run)
    saves = way.saves(memcpy, rounds + 3)[3:]
    restores = way.restores(memcpy, rounds + 1, rounds + 3)[1:]
    way.close()
    del kept
    for what, pairs in (("save", saves), ("restore", restores), ("anew", way.anew[1:])):
        if not pairs:
            continue
        yield f"{what}/memcpy", statistics.median(a / b for a, b in pairs)
        yield f"{what} ms", statistics.median(a for a, _ in pairs) * 1e3


def in_process(name: str, rounds: int, *more: str) -> dict[str, float]:
    """The same, in a process of its own."""
    base = Path(tempfile.mkdtemp(prefix="tierkeep-bench-"))
    ram = tempfile.mkdtemp(prefix="tierkeep-bench-", dir="/dev/shm")
    env = {**os.environ, "TIERKEEP_RAM_DIR": ram, "TIERKEEP_AGENT": "off", "JAX_PLATFORMS": "cpu"}
    command = [
        sys.executable,
        __file__,
        "--one",
        name,
        str(base / "run"),
        "--rounds",
        str(rounds),
        *more,
    ]
    try:
        done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
        return dict(json.loads(done.stdout.splitlines()[-1]))
    finally:
        shutil.rmtree(base)
        shutil.rmtree(ram)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default=",".join(WAYS), help="names, with commas")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, run = args.one
        print(json.dumps(dict(measured(name, args.rounds, Path(run), args.tiny))), flush=True)
        os._exit(0)  # Hosts have threads that wait for others at their end.
    head = ("through", "save / memcpy", "of a Checkpointer", "restore / memcpy")
    head = (*head, "of a Checkpointer", "save of 2,000 tensors of 1 KiB")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for name in args.only.split(","):
        plain = in_process("checkpointer", args.rounds)
        got = plain if name == "checkpointer" else in_process(name, args.rounds)
        cells = [WAYS[name].__doc__ or name]
        for what in ("save", "restore"):
            ratio, base = got[f"{what}/memcpy"], plain[f"{what}/memcpy"]
            if what == "restore":
                base = got.get("anew/memcpy", base)
            cells += [f"{ratio:.2f} ({got[f'{what} ms']:.0f} ms)", f"{ratio / base:.2f} x"]
        tiny = in_process(name, 5 * args.rounds, "--tiny")["save ms"]
        print(f"| {' | '.join((*cells, f'{tiny:.2f} ms'))} |", flush=True)


if __name__ == "__main__":
    main()
