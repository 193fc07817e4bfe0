"""The life of a Checkpointer: what it refuses, what it returns, how it ends."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tierkeep
from tierkeep import errors

STATE = {"x": torch.arange(1000), "n": 1}


def state() -> dict[str, Any]:
    return {"x": torch.arange(1000), "n": 1}


# -- arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every = 0: at least 1"),
        ({"slots": 1}, "slots = 1: at least 2"),
        ({"disk_every": 0}, "disk_every"),
        ({"keep_last": 0}, "keep_last = 0"),
        ({"threads": 0}, "threads = 0"),
        ({"capture": "later"}, "capture = 'later': it is one of 'now', 'overlap'"),
        ({"busy": "drop"}, "busy = 'drop'"),
        ({"rank": 1}, "give both"),
        ({"rank": 2, "world_size": 2}, "rank = 2, world_size = 2"),
        ({"attempt_id": "7"}, "32 hex digits"),
        ({"allow_pickle": "a:B"}, "several words"),
        ({"allow_pickle": ["a.B"]}, "module:Name"),
        ({"max_failures": 0}, "max_failures = 0"),
        ({"timeouts_s": {"nonsense": 1}}, "unknown setting nonsense"),
        ({"timeouts_s": {"slot_wait_s": -1}}, "slot_wait_s = -1: seconds"),
    ],
)
def test_a_wrong_argument_is_told(run: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(tierkeep.InvalidError) as caught:
        tierkeep.Checkpointer(run, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("destination", "message"),
    [
        ("", "the destination is empty"),
        ("/tmp/a b", "run name"),
        ("/tmp/_reserved", "reserved"),
        ("/tmp/x\0y", "NUL"),
    ],
)
def test_a_wrong_destination_is_told(ram: Path, destination: str, message: str) -> None:
    with pytest.raises(tierkeep.InvalidError, match=message):
        tierkeep.Checkpointer(destination)
    with pytest.raises((tierkeep.InvalidError, tierkeep.CheckpointNotFoundError)):
        tierkeep.load(destination)


@pytest.mark.parametrize(
    ("destination", "options", "message"),
    [
        ("s3://bucket/run", {"disk_every": 2}, "has no disk before it"),
        ("file:///tmp/run", {"keep_last": 2}, "has no disk before it"),
        ("s3://bucket/run", {"slots": 2}, "at least 3 without a disk"),
        ("s4://bucket/run", {"disk": "/tmp"}, "the schemes are"),
        ("s3://bucket/a b", {"disk": "/tmp"}, "run name"),
        ("s3://bucket/run", {"disk": "/tmp", "storage_options": {"aws_x": "1"}}, "aws_x"),
        ("s3://bucket/run", {"disk": "/tmp", "object_every": 0}, "object_every"),
        ("s3://bucket/run", {"disk": "/tmp", "object_every": 3, "disk_every": 2}, "multiple"),
        ("/tmp/run", {"disk": "/tmp"}, "is the disk"),
        ("/tmp/run", {"object_every": 2}, "is a directory"),
    ],
)
def test_a_wrong_bucket_is_told(
    ram: Path, destination: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(tierkeep.InvalidError, match=message):
        tierkeep.Checkpointer(destination, ram_dir=ram, agent=False, **options)


def test_a_destination_that_is_a_file_is_told(run: Path) -> None:
    run.write_text("x")
    with pytest.raises(tierkeep.InvalidError):
        tierkeep.Checkpointer(run)


def test_settings_come_from_arguments_then_the_environment(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIERKEEP_SLOTS", "5")
    monkeypatch.setenv("TIERKEEP_KEEP_LAST", "7")
    with tierkeep.Checkpointer(run, keep_last=3) as ckpt:
        assert (ckpt.settings["slots"], ckpt.settings["keep_last"]) == (5, 3)
    monkeypatch.setenv("TIERKEEP_EVERY", "20")
    monkeypatch.setenv("TIERKEEP_CAPTURE", "overlap")
    with tierkeep.Checkpointer(run) as ckpt:
        assert "every=20, capture='overlap'" in repr(ckpt)
    with tierkeep.Checkpointer(run, every=3) as ckpt:
        assert ckpt.every == 3
    monkeypatch.setenv("TIERKEEP_EVERY", "often")
    with pytest.raises(tierkeep.InvalidError, match="every = 'often'"):
        tierkeep.Checkpointer(run)
    monkeypatch.delenv("TIERKEEP_EVERY")
    monkeypatch.setenv("TIERKEEP_SLOTS", "many")
    with pytest.raises(tierkeep.InvalidError, match="TIERKEEP_SLOTS"):
        tierkeep.Checkpointer(run)


def test_repr_tells_rank_and_mode(run: Path) -> None:
    with tierkeep.Checkpointer(run, rank=1, world_size=4, every=50) as ckpt:
        assert repr(ckpt) == (
            f"Checkpointer({str(run)!r}, rank 1 of 4 (arguments), embedded, every=50, "
            "capture='now')"
        )
    assert repr(ckpt).endswith("closed)")


# -- saving ----------------------------------------------------------------------------------


def test_step_saves_what_is_due(run: Path) -> None:
    with tierkeep.Checkpointer(run, every=3) as ckpt:
        ckpt.restore(state())
        saved = [ckpt.step(step, STATE) for step in range(1, 8)]
        assert [s.step for s in saved if s] == [3, 6]
        assert ckpt.latest_step() == 6


def test_a_save_tells_how_far_it_is(run: Path) -> None:
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore(STATE)
        save = ckpt.save(7, STATE, metrics={"loss": 0.5}, tags=["good"])
        assert isinstance(save, tierkeep.Save)
        assert save.staged() is save
        assert save.wait("ram", 10).wait("disk", 30, scope="shard") is save
        save.wait("disk", 30)
        now = save.progress()
        assert (now.step, now.rank, now.staged, now.ram, now.disk) == (7, 0, True, True, True)
        assert now.done
        assert now.bytes == now.disk_bytes > 8000
        assert (now.error, now.skipped) == (None, None)
        assert repr(save) == 'Save(step=7, durable="disk", 0.0 MiB)'
        found = ckpt.restore(state(), read_only=True)
    assert found is not None
    assert (found.step, found.attempt) == (7, 1)
    assert found.meta["metrics"] == {"loss": 0.5}
    assert found.meta["tags"] == ("good",)
    assert abs(found.meta["saved_unix_ms"] / 1000 - time.time()) < 60


def test_a_level_or_scope_that_is_not_there_is_told(run: Path) -> None:
    with tierkeep.Checkpointer(run, disk_every=2) as ckpt:
        ckpt.restore(STATE)
        save = ckpt.save(1, STATE)
        with pytest.raises(tierkeep.UnavailableError, match="no agent here that has others"):
            save.wait("peer")
        with pytest.raises(tierkeep.UnavailableError, match="goes to no bucket"):
            save.wait("object")
        with pytest.raises(tierkeep.InvalidError, match="level"):
            save.wait("x")
        with pytest.raises(tierkeep.InvalidError, match="scope"):
            save.wait("ram", scope="world")
        with pytest.raises(tierkeep.InvalidError, match="step 1 does not go to disk"):
            save.wait("disk")
        assert not save.is_due_for_disk
        assert ckpt.save(2, STATE).wait("disk", 30).is_due_for_disk


def test_a_second_save_of_a_step_returns_the_first(run: Path) -> None:
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore(STATE)
        ckpt.save(3, STATE)
        assert ckpt.save(3, {"x": torch.ones(1)}).step == 3
        with pytest.raises(tierkeep.InvalidError, match=r"older than step 3.*rollback=True"):
            ckpt.save(2, STATE)
        with pytest.raises(tierkeep.InvalidError, match="step = -1"):
            ckpt.save(-1, STATE)
    assert tierkeep.load(run)["x"].shape == (1000,)


def test_the_first_save_without_restore_needs_a_new_run(run: Path) -> None:
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.save(1, STATE)
    with (
        tierkeep.Checkpointer(run) as ckpt,
        pytest.raises(tierkeep.InvalidError, match="fresh=True"),
    ):
        ckpt.save(2, STATE)
    with tierkeep.Checkpointer(run, fresh=True) as ckpt:
        ckpt.save(1, STATE)
        assert [(s.step, s.attempt, s.in_lineage) for s in ckpt.steps()][-1] == (1, 2, True)
    with tierkeep.Checkpointer(run, fresh=True) as ckpt:
        assert ckpt.restore(state()) is None
        with pytest.raises(tierkeep.CheckpointNotFoundError):
            ckpt.restore(state(), step=4)


def test_rollback_goes_back_and_stays_there(run: Path) -> None:
    with tierkeep.Checkpointer(run, keep_last=5) as ckpt:
        ckpt.restore(state())
        for step in (1, 2, 3):
            ckpt.save(step, {"n": step}).wait("disk", 30)
        live = {"n": 0}
        with pytest.raises(tierkeep.InvalidError, match="needs the step"):
            ckpt.restore(live, rollback=True)
        found = ckpt.restore(live, step=1, rollback=True)
        assert (found.step, live["n"]) == (1, 1)  # type: ignore[union-attr]
    with tierkeep.Checkpointer(run) as ckpt:
        assert ckpt.latest_step() == 1
        assert ckpt.restore(live).step == 1  # type: ignore[union-attr]
        with pytest.raises(tierkeep.CheckpointNotFoundError, match=r"abandoned.*\(attempt=1 takes"):
            ckpt.restore(live, step=3, read_only=True)
        assert ckpt.restore(live, step=3, attempt=1, read_only=True).step == 3  # type: ignore[union-attr]


def test_read_only_creates_no_attempt(run: Path) -> None:
    with tierkeep.Checkpointer(run) as ckpt:
        assert ckpt.restore(state(), read_only=True) is None
        ckpt.save(1, STATE)
    with tierkeep.Checkpointer(run) as ckpt:
        live = {"x": torch.zeros(1000, dtype=torch.int64), "n": 0}
        found = ckpt.restore(live, read_only=True)
        assert found is not None
        assert live["n"] == 1
    assert len(list((run / "attempts").glob("*.json"))) == 1


def test_steps_and_pins(run: Path) -> None:
    with tierkeep.Checkpointer(run, keep_last=1) as ckpt:
        ckpt.restore(STATE)
        ckpt.save(1, STATE).wait("disk", 30)
        ckpt.pin(1)
        for step in (2, 3):
            ckpt.save(step, STATE).wait("disk", 30)
        ckpt.wait_all("disk", 30)
        with pytest.raises(tierkeep.CheckpointNotFoundError):
            ckpt.pin(9)
    with tierkeep.Checkpointer(run) as ckpt:
        rows = [(s.step, s.pinned, s.complete, s.sealed) for s in ckpt.steps() if s.sealed]
        assert rows == [(1, True, True, True), (3, False, True, True)]
        ckpt.unpin(1)
        assert not any(s.pinned for s in ckpt.steps())


# -- failures --------------------------------------------------------------------------------


def test_a_failed_save_is_told_counted_kept_and_raised_by_its_wait(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    big = {"x": torch.zeros(1 << 20)}
    with tierkeep.Checkpointer(run, ram_bytes_max=1 << 20, max_failures=2) as ckpt:
        ckpt.restore({})
        first = ckpt.save(1, big)
        with pytest.raises(tierkeep.InvalidError, match="budget is too small"):
            first.wait("ram", 1)
        assert isinstance(ckpt.last_error, tierkeep.InvalidError)
        assert ckpt.counters()["saves_failed"] == 1
        ckpt.save(2, {"x": torch.zeros(1)}).wait("ram", 10)
        ckpt.save(3, big)
        ckpt.save(4, big)
        with pytest.raises(tierkeep.InvalidError, match="budget is too small"):
            ckpt.save(5, {"x": torch.zeros(1)})
        assert "failed" in repr(first)
        ckpt._saves.newest = None  # The end is not what is tested here.
    errors_told = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert any("step 1 was not saved" in r.getMessage() for r in errors_told)


def test_a_clean_end_raises_what_happened_to_the_last_save(run: Path) -> None:
    with (
        pytest.raises(tierkeep.InvalidError, match="budget"),
        tierkeep.Checkpointer(run, ram_bytes_max=1 << 20) as ckpt,
    ):
        ckpt.restore({})
        ckpt.save(1, {"x": torch.zeros(1 << 20)})


def test_an_exception_is_not_hidden_by_the_end(run: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        tierkeep.Checkpointer(run, ram_bytes_max=1 << 20) as ckpt,
    ):
        ckpt.restore({})
        ckpt.save(1, {"x": torch.zeros(1 << 20)})
        _ = 1 / 0


def test_an_exception_leaves_the_last_save_behind(run: Path) -> None:
    with pytest.raises(ZeroDivisionError), tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore({})
        ckpt.save(1, STATE)
        _ = 1 / 0
    assert tierkeep.load(run)["n"] == 1


def test_after_close_calls_are_refused(run: Path) -> None:
    ckpt = tierkeep.Checkpointer(run)
    ckpt.restore(STATE)
    ckpt.close()
    ckpt.close()
    with pytest.raises(tierkeep.InvalidError, match="closed"):
        ckpt.save(1, STATE)
    with pytest.raises(tierkeep.InvalidError, match="closed"):
        ckpt.restore(STATE)


def test_events_are_told_to_callbacks_and_a_bad_callback_is_harmless(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tierkeep.Event] = []
    with tierkeep.Checkpointer(run, ram_bytes_max=1 << 20) as ckpt:

        @ckpt.on_event
        def bad(event: tierkeep.Event) -> None:
            raise ValueError("in a callback")

        ckpt.on_event(told.append)
        ckpt.restore({})
        ckpt.save(1, {"x": torch.zeros(1 << 20)})
        ckpt._saves.newest = None
    (event,) = [e for e in told if e.kind == "save_failed"]
    assert (event.severity, event.step, event.rank) == ("error", 1, 0)
    assert "a callback of on_event failed" in caplog.text


def test_a_reentrant_save_is_refused(run: Path) -> None:
    class Again:
        def state_dict(self) -> Any:
            ckpt.save(2, {})

        def load_state_dict(self, state: Any) -> None: ...

    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore({})
        with pytest.raises(tierkeep.InvalidError, match="walking the state"):
            ckpt.save(1, {"a": Again()})


def test_the_budget_is_told_by_prepare(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    big = {"x": torch.zeros(1 << 20)}
    with tierkeep.Checkpointer(run, ram_bytes_max=1 << 20) as ckpt:
        with pytest.raises(tierkeep.InvalidError, match="budget"):
            ckpt.prepare(big)
        assert ckpt.restore(big) is None
    assert "the slots were not prepared" in caplog.text


def test_wait_all_waits_for_the_newest(run: Path) -> None:
    with tierkeep.Checkpointer(run, disk_every=2) as ckpt:
        ckpt.wait_all()
        ckpt.restore(STATE)
        for step in (1, 2, 3):
            ckpt.save(step, STATE)
        ckpt.wait_all("disk", 30)
        assert [s.step for s in ckpt.steps() if s.sealed] == [2]
        ckpt.save(4, STATE)
        ckpt.wait_all("disk", 30)
        assert ckpt.steps()[-1].sealed
        with pytest.raises(tierkeep.InvalidError, match="level"):
            ckpt.wait_all("object")


def test_a_thread_that_replaces_tensors_during_a_save_does_no_harm(run: Path) -> None:
    """The saved values are then this or that; but the process lives."""
    state = {str(i): torch.full((50_000,), float(i)) for i in range(20)}
    stop = threading.Event()

    def replace() -> None:
        while not stop.is_set():
            for name in state:
                state[name] = torch.full((50_000,), 7.0)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        with tierkeep.Checkpointer(run) as ckpt:
            ckpt.restore({})
            for step in range(1, 30):
                ckpt.save(step, state)
    finally:
        stop.set()
        thread.join()
    assert set(tierkeep.load(run)) == set(state)


# -- overlap ---------------------------------------------------------------------------------


def test_guard_needs_optimizers(run: Path) -> None:
    with tierkeep.Checkpointer(run, capture="overlap") as ckpt:
        with pytest.raises(tierkeep.InvalidError, match="register_step_pre_hook"):
            ckpt.guard(object())
        ckpt.fence()


def test_a_guard_does_not_keep_optimizer_or_checkpointer_alive(run: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ckpt = tierkeep.Checkpointer(run, capture="overlap")
    ckpt.guard(optimizer, optimizer)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    ckpt.close()
    del ckpt
    model.weight.grad = torch.zeros(2, 2)
    optimizer.step()


# -- stopping --------------------------------------------------------------------------------


def test_stop_is_requested_by_sigterm(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierkeep._checkpointer._HURRY_SECONDS", 0.2)
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with tierkeep.Checkpointer(run, disk_every=1000) as ckpt:
            assert not ckpt.stop_requested()
            ckpt.save(1, STATE)
            assert not ckpt.stop_requested()
            for _ in range(2):
                # Twice at once: a launcher passed it on that had sent it to the group.
                os.kill(os.getpid(), signal.SIGTERM)
            assert ckpt.stop_requested()
            assert seen == [1, 1]
            save = ckpt.save(2, STATE)
            assert save.is_due_for_disk
            assert ckpt.stop_requested()
        assert save.progress().disk
        with tierkeep.Checkpointer(run.with_name("two"), every=5, rank=0, world_size=2) as ckpt:
            assert not ckpt.stop_requested()  # Nobody to agree with yet.
            ckpt.restore({})
            steps = [step for step in range(12) if ckpt.step(step, {}) and ckpt.stop_requested()]
            assert steps == [10]
            ckpt._hurry()
    finally:
        signal.signal(signal.SIGTERM, before)
        from tierkeep import _stop

        _stop._stop.__init__()  # type: ignore[misc]


# -- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_pickles(name: str) -> None:
    cls = getattr(errors, name)
    made = cls("what", ["a", "b"]) if name == "MismatchError" else cls("what")
    again = pickle.loads(pickle.dumps(made))
    assert type(again) is cls
    assert str(again) == "what"
    if name == "MismatchError":
        assert again.differences == ["a", "b"]


def test_every_error_has_a_parent_among_the_built_in_ones() -> None:
    parents = {
        "CheckpointNotFoundError": FileNotFoundError,
        "CorruptError": OSError,
        "FencedError": PermissionError,
        "InvalidError": ValueError,
        "MismatchError": ValueError,
        "UnavailableError": OSError,
        "DeadlineError": TimeoutError,
        "BugError": RuntimeError,
    }
    for name, parent in parents.items():
        assert issubclass(getattr(tierkeep, name), parent)
        assert issubclass(getattr(tierkeep, name), tierkeep.TierkeepError)


def test_the_gil_is_free_while_a_save_is_waited_for(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tierkeep._checkpointer._HURRY_SECONDS", 0.2)
    done = threading.Event()
    with tierkeep.Checkpointer(run, rank=0, world_size=2) as ckpt:
        ckpt.restore(STATE)
        save = ckpt.save(1, STATE)
        waiter = threading.Thread(target=lambda: (_waits(save), done.set()))
        waiter.start()
        ticks = 0
        while not done.is_set():
            ticks += 1
            time.sleep(0.001)
        waiter.join()
        assert ticks > 100
        ckpt._saves.newest = None
        ckpt._hurry()


def _waits(save: tierkeep.Save) -> None:
    with pytest.raises(tierkeep.DeadlineError, match=r"step 1 in the ram tier.*rank 1"):
        save.wait("ram", 0.5)
