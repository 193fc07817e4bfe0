"""Killed, forked, interrupted, and started twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import tierkeep


def python(script: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=Path(__file__).parent,
    )


def ended(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


# -- killed ----------------------------------------------------------------------------------

LOOP = """
    import json, os, signal, sys, types
    import torch
    import tierkeep as real

    path, kill = sys.argv[1], sys.argv[2] == "kill"
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.1))
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (k + 1))
    total = 5

    class Checkpointer(real.Checkpointer):
        def __init__(self, destination, *, every):
            super().__init__(path, every=1)

        def step(self, step, state):
            save = super().step(step, state)
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            return save

    def train(state):
        loss = state["model"](torch.randn(3, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()

    tierkeep = types.SimpleNamespace(Checkpointer=Checkpointer, Rng=real.Rng)
    lines = real.Checkpointer.__doc__.split("\\n\\n")[1]
    first = lines.splitlines()[0]
    indent = len(first) - len(first.lstrip())
    exec("\\n".join(line[indent:] for line in lines.splitlines()))
    weights = [p.tolist() for p in model.parameters()]
    print(json.dumps({"began": found.step if found else 0, "model": weights,
                      "random": torch.rand(3).tolist()}))
"""


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a job whose other rank never comes."""
    monkeypatch.setattr("tierkeep._checkpointer._HURRY_SECONDS", 0.2)


@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_the_loop_of_the_docstring_killed_after_every_save(
    run: Path, ram: Path, tmp_path: Path, tier: str
) -> None:
    code, out, err = ended(python(LOOP, tmp_path / "whole", "live"))
    assert code == 0, err
    whole = json.loads(out)

    for kills in range(5):
        code, _, err = ended(python(LOOP, run, "kill"))
        assert code == -signal.SIGKILL, err
        if tier == "disk":
            # What has not come to disk is lost with the memory; it is trained again.
            for file in ram.rglob("*"):
                if file.is_file():
                    file.unlink()
        elif kills:
            assert tierkeep.Checkpointer(run).latest_step() == kills + 1
    code, out, err = ended(python(LOOP, run, "live"))
    assert code == 0, err
    last = json.loads(out)
    assert last["began"] == 5 or tier == "disk"
    del whole["began"], last["began"]
    assert last == whole


# -- forked ----------------------------------------------------------------------------------


class Touching(torch.utils.data.Dataset[int]):
    """A data set that holds the Checkpointer, as one in a notebook does."""

    def __init__(self, ckpt: tierkeep.Checkpointer, save: tierkeep.Save) -> None:
        self.ckpt, self.save = ckpt, save

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        assert "of process" in repr(self.ckpt)
        assert "of process" in repr(self.save)
        calls: list[Callable[[], Any]] = [
            lambda: self.ckpt.save(9, {}),
            lambda: self.ckpt.restore({}),
            lambda: self.ckpt.prepare({}),
            lambda: self.ckpt.steps(),
            lambda: self.ckpt.pin(1),
            lambda: self.save.wait("ram"),
            lambda: self.save.progress(),
        ]
        for call in calls:
            with pytest.raises(tierkeep.FencedError, match="forked child"):
                call()
        self.ckpt.fence()
        self.ckpt.close()
        with self.ckpt:
            pass
        return index


def test_a_forked_data_loader_worker_touches_nothing(run: Path) -> None:
    state = {"x": torch.ones(100_000)}
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore(state)
        save = ckpt.save(1, state)
        for epoch in range(2):
            loader: Any = torch.utils.data.DataLoader(
                Touching(ckpt, save), num_workers=2, multiprocessing_context="fork"
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                assert sorted(int(x) for x in loader) == [0, 1, 2, 3]
            ckpt.save(epoch + 2, state).wait("disk", 30)
    assert tierkeep.load(run)["x"].sum() == 100_000


def test_a_forked_child_that_ends_leaves_the_parent_its_run(run: Path) -> None:
    state = {"x": torch.ones(10)}
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore(state)
        ckpt.save(1, state)
        pid = os.fork()
        if pid == 0:
            # Everything that a child does at its end: drops, atexit, threads.
            try:
                del ckpt
                import atexit
                import gc

                gc.collect()
                atexit._run_exitfuncs()
            finally:
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        other = python(
            """
            import sys, tierkeep
            try:
                tierkeep.Checkpointer(sys.argv[1], timeouts_s={"lock_wait_s": 0.2})
            except tierkeep.FencedError as error:
                print(error)
            """,
            run,
        )
        code, out, err = ended(other)
        assert (code, str(os.getpid()) in out) == (0, True), (out, err)
        ckpt.save(2, state).wait("disk", 30)


# -- twice -----------------------------------------------------------------------------------


def test_a_notebook_cell_that_is_run_twice_takes_over(run: Path) -> None:
    cell = textwrap.dedent(
        """
        ckpt = tierkeep.Checkpointer(run)
        found = ckpt.restore(state)
        begin = found.step if found else 0
        for step in range(begin, begin + 3):
            state["n"] += 1
            ckpt.save(step + 1, state)
        """
    )
    names: dict[str, Any] = {"tierkeep": tierkeep, "run": run, "state": {"n": 0}}
    exec(cell, names)
    first = names["ckpt"]
    exec(cell, names)
    assert names["state"]["n"] == names["step"] + 1 == 6
    with pytest.raises(tierkeep.FencedError, match="newer Checkpointer of this process"):
        first.save(9, {"n": 0})
    first.close()
    names["ckpt"].save(7, {"n": 7}).wait("disk", 30)
    names["ckpt"].close()
    assert tierkeep.load(run) == {"n": 7}


def test_a_live_process_with_the_same_rank_is_refused_with_its_pid(run: Path) -> None:
    owner = python(
        """
        import sys, tierkeep
        ckpt = tierkeep.Checkpointer(sys.argv[1])
        print("open", flush=True)
        sys.stdin.read()
        """,
        run,
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "open\n"
    try:
        with pytest.raises(tierkeep.FencedError, match=str(owner.pid)):
            tierkeep.Checkpointer(run, timeouts_s={"lock_wait_s": 0.3})
    finally:
        owner.kill()
        ended(owner)
    tierkeep.Checkpointer(run).close()


def test_a_script_that_does_not_close_gets_its_last_save_to_disk(run: Path) -> None:
    script = """
        import sys, tierkeep
        ckpt = tierkeep.Checkpointer(sys.argv[1])
        ckpt.restore({})
        ckpt.save(1, {"n": 1})
    """
    code, _, err = ended(python(script, run))
    assert (code, err) == (0, "")
    assert any(run.glob("*/*/CHECKPOINT.json"))


# -- asked to stop ---------------------------------------------------------------------------


def test_a_second_sigterm_after_a_while_ends_the_process(run: Path) -> None:
    script = """
        import os, signal, sys, time, tierkeep
        from tierkeep import _stop
        _stop._ONE_REQUEST_SECONDS = 0.05
        ckpt = tierkeep.Checkpointer(sys.argv[1])
        assert not ckpt.stop_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert ckpt.stop_requested()
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    """
    code, out, err = ended(python(script, run))
    assert (code, out) == (-signal.SIGTERM, ""), err


def test_a_forked_child_dies_of_sigterm_as_ever(run: Path) -> None:
    script = """
        import os, signal, sys, time, tierkeep
        ckpt = tierkeep.Checkpointer(sys.argv[1])
        ckpt.stop_requested()
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(theirs, b"no" if not ckpt.stop_requested() else b"yes")
            time.sleep(60)
            os._exit(0)
        assert os.read(ours, 3) == b"no"
        os.kill(child, signal.SIGTERM)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), ckpt.stop_requested())
    """
    code, out, err = ended(python(script, run))
    assert (code, out) == (0, "-15 False\n"), err


# -- interrupted -----------------------------------------------------------------------------


@contextmanager
def interrupt(after: float = 0.3) -> Iterator[None]:
    """Ctrl-C after a while; it must come out of the block within 0.2 s."""
    sent: list[float] = []

    def send() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(after, send)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
        assert time.monotonic() - sent[0] < 0.2
    finally:
        timer.cancel()
        timer.join()


def test_ctrl_c_ends_a_wait_for_a_level(run: Path, hurry: None) -> None:
    with tierkeep.Checkpointer(run, rank=0, world_size=2) as ckpt:
        ckpt.restore({})
        save = ckpt.save(1, {})
        with interrupt():
            save.wait("ram")
        with interrupt():
            ckpt.wait_all("disk")
        ckpt._hurry()


def test_ctrl_c_ends_a_wait_for_rank_0(run: Path) -> None:
    ckpt = tierkeep.Checkpointer(run, rank=1, world_size=2)
    with interrupt():
        ckpt.restore({})


def test_ctrl_c_ends_a_wait_for_a_lock(run: Path) -> None:
    owner = python(
        """
        import sys, tierkeep
        ckpt = tierkeep.Checkpointer(sys.argv[1])
        print("open", flush=True)
        sys.stdin.read()
        """,
        run,
    )
    assert owner.stdout is not None
    owner.stdout.readline()
    try:
        with interrupt():
            tierkeep.Checkpointer(run)
    finally:
        owner.kill()
        ended(owner)


def test_ctrl_c_ends_a_wait_for_a_slot(run: Path, hurry: None) -> None:
    with tierkeep.Checkpointer(run, rank=0, world_size=2) as ckpt:
        ckpt.restore({})
        ckpt.save(1, {})
        ckpt.save(2, {})
        with interrupt():
            ckpt.save(3, {})
        ckpt._hurry()


def test_ctrl_c_ends_a_close_and_what_is_in_ram_stays(run: Path, hurry: None) -> None:
    ckpt = tierkeep.Checkpointer(run, rank=0, world_size=2)
    ckpt.restore({})
    ckpt.save(1, {})
    began = time.monotonic()
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        ckpt.close()
    assert time.monotonic() - began < 2
    assert repr(ckpt).endswith("closed)")
