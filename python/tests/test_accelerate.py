"""Accelerate: what an `Accelerator` has prepared is saved, and comes back."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration, DistributedType
from same import fingerprint, same
from test_processes import ended
from test_ranks import start
from torch import nn

import tierkeep
from tierkeep._accelerated import Held
from tierkeep.accelerate import Keeper

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")

ROWS, BATCH, ACCUMULATE, EPOCHS = 40, 4, 2, 3
#: Of the optimizer, in an epoch.
STEPS = ROWS // BATCH // ACCUMULATE


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    yield
    AcceleratorState._reset_state()
    PartialState._reset_state()
    GradientState._reset_state()


class Average:
    """Something of the script's own, which it registers."""

    def __init__(self) -> None:
        self.loss = torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss = state["loss"]


def accelerator(**data: Any) -> Accelerator:
    options = {"use_stateful_dataloader": True, "use_seedable_sampler": True, **data}
    return Accelerator(
        cpu=True,
        gradient_accumulation_steps=ACCUMULATE,
        dataloader_config=DataLoaderConfiguration(**options),
    )


def rows() -> torch.utils.data.TensorDataset:
    numbers = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(3))
    return torch.utils.data.TensorDataset(numbers)


def train(run: Path, seed: int, stop: int) -> tuple[int, dict[int, float], Any]:
    """A training that leaves after step `stop`, if it gets there: where it began, its losses, and
    a fingerprint of all that it has at the end.
    """
    alone_again = accelerator()
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2), nn.BatchNorm1d(6), nn.Linear(6, 6))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS * EPOCHS)
    loader = torch.utils.data.DataLoader(rows(), batch_size=BATCH, shuffle=True)
    net, optimizer, scheduler, loader = alone_again.prepare(net, optimizer, scheduler, loader)
    average, losses = Average(), {}
    alone_again.register_for_checkpointing(average)
    with Keeper(alone_again, run) as keeper:
        found = keeper.restore()
        begin = step = found.step if found else 0
        while step < STEPS * EPOCHS:
            for (batch,) in loader:
                with alone_again.accumulate(net):
                    loss = net(batch).square().mean()
                    alone_again.backward(loss)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                if not alone_again.sync_gradients:
                    continue
                step += 1
                average.loss = average.loss * 0.9 + loss.detach()
                losses[step] = float(loss.item())
                keeper.step(step)
                if step == stop:
                    return begin, losses, None
    state = {"net": net, "optimizer": optimizer, "scheduler": scheduler, "average": average}
    return begin, losses, fingerprint({**state, "rng": tierkeep.Rng()})


@pytest.mark.parametrize("stop", [2, STEPS, STEPS + 3], ids=["first", "end of", "second"])
def test_a_run_goes_on_bit_for_bit_in_an_epoch(run: Path, tmp_path: Path, stop: int) -> None:
    _, losses, whole = train(tmp_path / "whole", 0, 0)
    assert train(run, 0, stop)[0] == 0
    # What another seed draws, weights and the order of the rows too, gives way to what was saved.
    begin, after, again = train(run, 1, 0)
    assert begin == stop
    assert after == {step: loss for step, loss in losses.items() if step > stop}
    assert again == whole
    assert len(set(losses.values())) == STEPS * EPOCHS


def test_only_steps_that_are_due_are_saved(run: Path) -> None:
    prepared = accelerator()
    net, loader = prepared.prepare(
        nn.Linear(6, 2), torch.utils.data.DataLoader(rows(), batch_size=BATCH, shuffle=True)
    )
    with Keeper(prepared, run, every=2) as keeper:
        keeper.restore()
        assert keeper.step(1) is None
        batches = iter(loader)
        next(batches)
        next(batches)
        prepared.step = 3
        saved = keeper.step(2, metrics={"loss": 0.5}, tags=["good"])
        assert saved is not None
        assert keeper.ckpt.latest_step() == 2
        prepared.step = 0
        with torch.no_grad():
            net.weight.zero_()
        found = keeper.restore(step=2)
        assert found is not None
        assert (found.meta["metrics"], found.meta["tags"]) == ({"loss": 0.5}, ("good",))
        assert net.weight.abs().sum() > 0
        assert prepared.step == 3
    # Saved again before a batch was taken, the place is the same.
    prepared = accelerator()
    loader = torch.utils.data.DataLoader(rows(), batch_size=BATCH, shuffle=True)
    prepared.prepare(nn.Linear(6, 2), loader)
    with Keeper(prepared, run) as keeper:
        keeper.restore()
        keeper.save(3)
        places = [tierkeep.load(run, step, include=["dataloader"]) for step in (2, 3)]
        assert places[0]["dataloader"]["place"]["_num_yielded"] == 2
        assert same(*places)


def test_several_models_and_optimizers_have_the_names_of_accelerates_files(run: Path) -> None:
    prepared = accelerator()
    loose = nn.Parameter(torch.ones(2))
    one, two = prepared.prepare(nn.Linear(2, 2), nn.Linear(2, 1))
    both = torch.optim.AdamW([*two.parameters(), *one.parameters()])
    apart = torch.optim.SGD([loose], momentum=0.9)
    both, apart = prepared.prepare(both, apart)
    for param in (*one.parameters(), *two.parameters(), loose):
        param.grad = torch.ones_like(param)
    both.step()
    apart.step()
    with Keeper(prepared, run) as keeper:
        keeper.restore()
        keeper.save(1)
    loaded = tierkeep.load(run)
    assert list(loaded) == ["model", "model_1", "optimizer", "optimizer_1", "accelerator", "rng"]
    names = ["model_1.weight", "model_1.bias", "model.weight", "model.bias"]
    assert list(loaded["optimizer"]["state"]) == names
    assert torch.equal(loaded["optimizer_1"]["state"][0]["momentum_buffer"], torch.ones(2))
    # A model that comes later is saved, too.
    with Keeper(prepared, run) as keeper:
        keeper.restore()
        prepared.prepare(nn.Linear(1, 1))
        keeper.save(2)
    assert "model_2" in tierkeep.load(run)


def test_a_new_run_begins_with_the_weights_of_another(run: Path, tmp_path: Path) -> None:
    for where, begin, options in (
        (run, None, {}),
        (tmp_path / "tuned", None, {"init_from": run}),
        (tmp_path / "tuned", 1, {"init_from": tmp_path / "gone"}),
    ):
        prepared = accelerator()
        net = prepared.prepare(nn.Linear(2, 2))
        with Keeper(prepared, where, **options) as keeper:
            found = keeper.restore()
            assert (found and found.step) == begin
            if where == run:
                torch.nn.init.constant_(net.weight, 5)
            assert (net.weight == 5).all()
            keeper.save(begin + 1 if begin else 1)


def test_loaders_that_cannot_go_on_in_an_epoch_are_told(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepared = accelerator(use_stateful_dataloader=False)
    prepared.prepare(nn.Linear(2, 2), torch.utils.data.DataLoader(rows(), batch_size=BATCH))
    with caplog.at_level(logging.WARNING, "tierkeep"), Keeper(prepared, run) as keeper:
        keeper.restore()
    assert "dataloader does not know its place in the data: say use_stateful_data" in caplog.text
    caplog.clear()
    prepared = accelerator(use_seedable_sampler=False)
    in_order = torch.utils.data.DataLoader(rows(), batch_size=BATCH)
    shuffled = torch.utils.data.DataLoader(rows(), batch_size=BATCH, shuffle=True)
    prepared.prepare(nn.Linear(2, 2), in_order, shuffled)
    with caplog.at_level(logging.WARNING, "tierkeep"), Keeper(prepared, run) as keeper:
        keeper.restore()
    [told] = [text for text in caplog.messages if "dataloader" in text]
    assert told.startswith("dataloader_1 is shuffled in an order that is not known")


class Near:
    """A rank of a node whose directory is its own: of other ranks' shards its reader sees none."""

    def __init__(self, ckpt: tierkeep.Checkpointer) -> None:
        self._ckpt = ckpt
        self._handle = SimpleNamespace(reader=lambda: SimpleNamespace(choose_for=self._none))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ckpt, name)

    def _none(self, rank: int, *_: Any) -> None:
        raise tierkeep.CorruptError(f"no tier has a good copy of rank {rank}")


@pytest.mark.parametrize("world", [1, 2], ids=["of one rank", "of two"])
def test_what_the_first_rank_saved_comes_from_its_node_where_this_one_has_not_got_it(
    run: Path, world: int
) -> None:
    def opened(start: str, world: int) -> list[Any]:
        options: Any = {"world_size": world, "attempt_id": start * 32, "agent": False}
        return [tierkeep.Checkpointer(run, rank=rank, **options) for rank in range(world)]

    job = opened("a", world)
    for ckpt in job:
        held = Held(ckpt, {"model": nn.Linear(2, 2)}, {"own": torch.full((2,), ckpt.rank)})
        assert held.restore() is None
        torch.nn.init.constant_(held.big["model"].weight, 5)
        ckpt.save(1, held.saved)
    for ckpt in job:
        ckpt.close()
    job = opened("b", 2)
    for ckpt in (job[0], Near(job[1])):
        held = Held(ckpt, {"model": nn.Linear(2, 2)}, {"own": torch.full((2,), 9)})  # type: ignore[arg-type]
        found = held.restore()
        assert found is not None and found.step == 1
        assert (held.big["model"].weight == 5).all()
        assert held.rest["own"].tolist() == [ckpt.rank if world == 2 else 0] * 2
    for ckpt in job:
        ckpt.close()


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM", "FSDP"])
def test_what_keeps_its_state_itself_is_refused(run: Path, kind: str) -> None:
    other: Any = SimpleNamespace(distributed_type=DistributedType[kind], is_fsdp2=False)
    with pytest.raises(tierkeep.InvalidError, match=r"keeps its state itself|say fsdp_version=2"):
        Keeper(other, run)
    with pytest.raises(tierkeep.InvalidError, match=r"nothing is prepared: accelerator\.prepare"):
        Keeper(accelerator(), run).restore()


RANKS = """
    import json, os, signal, sys
    import torch
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DataLoaderConfiguration, DistributedType
    from tierkeep.accelerate import Keeper

    run, stop, sharded = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "FSDP2"
    acc = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(
        use_stateful_dataloader=True, use_seedable_sampler=True))
    if sharded:  # Which Accelerate does not offer on CPUs; what it then does is the same.
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        acc.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2,
            reshard_after_forward=True, auto_wrap_policy="no_wrap")
        acc.state.torch_device_mesh = torch.distributed.init_device_mesh("cpu", (2,))
    rows = torch.randn(32, 6, generator=torch.Generator().manual_seed(3))

    def train(run, seed, stop):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Dropout(0.2))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        loader = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True)
        net, optimizer, loader = acc.prepare(net, optimizer, loader)
        torch.manual_seed(seed + acc.process_index)  # Dropout of each rank is its own.
        with Keeper(acc, run) as keeper:
            found = keeper.restore()
            begin = step = found.step if found else 0
            while step < 8:
                for batch in loader:
                    loss = net(batch).square().mean()
                    optimizer.zero_grad()
                    acc.backward(loss)
                    optimizer.step()
                    step += 1
                    saved = keeper.step(step)
                    if step == stop:
                        saved.wait("ram", 60)
                        os.kill(os.getpid(), signal.SIGKILL)
        acc.free_memory()
        whole = [getattr(p, "full_tensor", lambda p=p: p)().tolist() for p in net.parameters()]
        return {"begin": begin, "loss": loss.item(), "rng": torch.rand(1).item(), "net": whole}

    done = [train(run + "-whole", 0, 0)] if stop else []
    if stop:
        print(json.dumps(done), flush=True)
    done.append(train(run, 0 if stop else 7, stop))
    print(json.dumps(done), flush=True)
"""


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_two_ranks_go_on_and_what_is_the_same_is_saved_once(run: Path, kind: str) -> None:
    results = [ended(rank) for rank in start(2, RANKS, run, 6, kind)]
    assert [code for code, *_ in results] == [-signal.SIGKILL] * 2, results
    whole = [json.loads(out.splitlines()[-1])[0] for _, out, _ in results]
    results = [ended(rank) for rank in start(2, RANKS, run, 0, kind)]
    assert [code for code, *_ in results] == [0, 0], results
    again = [json.loads(out.splitlines()[-1])[0] for _, out, _ in results]
    assert [rank.pop("begin") for rank in again] == [6, 6]
    assert [rank.pop("begin") for rank in whole] == [0, 0]
    assert again == whole
    assert whole[0]["net"] == whole[1]["net"]
    assert whole[0]["rng"] != whole[1]["rng"]
    # Of DDP the second rank has its random numbers and its place in the data to save.
    own = {"accelerator", "dataloader", "rng"}
    second = set(tierkeep.load(run, rank=1))
    assert second == (own if kind == "DDP" else {"model", "optimizer", *own})
