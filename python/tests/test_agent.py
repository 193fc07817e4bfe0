"""Trainers with an agent, as Python's users have them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from agents import COMMAND, Agent
from jobs import interrupted, mlp, regression

import tierkeep


def state() -> dict[str, object]:
    torch.manual_seed(1)
    model = mlp()
    return {"model": model, "optim": torch.optim.AdamW(model.parameters()), "rng": tierkeep.Rng()}


def test_a_job_finds_the_agent_by_itself_and_resumes_through_it(agent: Agent, run: Path) -> None:
    def build() -> tuple[dict[str, object], object]:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters())
        made = {"model": model, "optim": optimizer, "rng": tierkeep.Rng()}
        return made, regression(model, [optimizer])

    interrupted(build, run, before=3, after=3)  # type: ignore[arg-type]
    with tierkeep.Checkpointer(run) as ckpt:
        assert f"with the agent at {agent.socket}" in repr(ckpt)
        assert ckpt.settings["agent"] == str(agent.socket)
        # Whether step 2 is there, too, is the disk's: where it is slow, it goes on to the newest.
        assert ckpt.steps()[-1].step == 3


def test_without_an_agent_there_is_one_line_of_notice(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "tierkeep"), tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore(state())
        assert "embedded" in repr(ckpt)
        assert ckpt.settings["agent"] is None
    told = [r.getMessage() for r in caplog.records if "this process keeps its RAM" in r.message]
    assert len(told) == 1
    assert "no agent listens at /run/tierkeep/agent.sock or" in told[0]


@pytest.mark.parametrize("off", [False, "off"])
def test_an_agent_that_is_not_wanted_is_not_used(agent: Agent, run: Path, off: object) -> None:
    with tierkeep.Checkpointer(run, agent=off) as ckpt:  # type: ignore[arg-type]
        assert ckpt.settings["agent"] is None
        ckpt.save(1, state())


def test_an_agent_that_was_named_and_is_not_there_is_an_error(
    ram: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIERKEEP_AGENT", str(ram / "nobody.sock"))
    with pytest.raises(
        tierkeep.TierkeepError, match=r"nobody\.sock, which agent= or TIERKEEP_AGENT names"
    ):
        tierkeep.Checkpointer(run, timeouts_s={"lock_wait_s": 0.1})
    monkeypatch.setenv("TIERKEEP_AGENT", "agent.sock")
    with pytest.raises(tierkeep.InvalidError, match="absolute path"):
        tierkeep.Checkpointer(run)
    with pytest.raises(tierkeep.InvalidError, match="ram_dir: with an agent"):
        tierkeep.Checkpointer(run, agent="/x/agent.sock", ram_dir=ram)
    monkeypatch.setenv("TIERKEEP_AGENT", "off")
    tierkeep.Checkpointer(run).close()


TRAINER = """
    import os, sys, tierkeep, torch
    torch.manual_seed(1)
    model = torch.nn.Linear(300, 300)
    ckpt = tierkeep.Checkpointer(sys.argv[1])
    found = ckpt.restore({"model": model})
    print(found.tier if found else None, found.step if found else 0, flush=True)
    with torch.no_grad():
        model.weight.fill_(float(sys.argv[2]))
    save = ckpt.save(int(sys.argv[2]), {"model": model})
    print("staged", flush=True)
    os.kill(os.getpid(), 9)
"""


def disk_reads() -> int:
    """Bytes that this process and its children had read from disks so far."""
    io = Path("/proc/self/io").read_text()
    return int(dict(line.split(": ") for line in io.splitlines())["read_bytes"])


def train(run: Path, step: int) -> list[str]:
    code = textwrap.dedent(TRAINER)
    command = [sys.executable, "-c", code, str(run), str(step)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stdout.split("\n")


def test_a_trainer_killed_right_after_staged_loses_nothing(agent: Agent, run: Path) -> None:
    assert train(run, 1)[0] == "None 0"
    end = time.monotonic() + 30
    while not list(run.glob("*/*/CHECKPOINT.json")):
        assert time.monotonic() < end, "the agent did not carry the checkpoint to disk"
        time.sleep(0.02)
    # The next one restores it from RAM, whatever is on disk.
    for payload in run.glob("*1/*/*.safetensors"):
        payload.unlink()
    assert train(run, 2)[0] == "ram 1"
    with tierkeep.Checkpointer(run) as ckpt:
        model = torch.nn.Linear(300, 300)
        before = disk_reads()
        found = ckpt.restore({"model": model})
        assert disk_reads() == before
        assert found is not None
        assert (found.step, found.tier) == (2, "ram")
        assert bool((model.weight == 2.0).all())


def test_an_upgrade_of_the_agent_costs_no_checkpoint(agent: Agent, run: Path) -> None:
    current = state()
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore(current)
        ckpt.save(1, current).wait("disk", timeout_s=30)
        slots = sorted(p.stat().st_ino for p in agent.socket.parent.rglob("*.safetensors"))
        assert agent.stop(signal.SIGTERM) == 0
        agent.start()
        ckpt.save(2, current).wait("disk", timeout_s=30)
        ckpt.save(3, current).wait("ram", timeout_s=30)
        after = sorted(p.stat().st_ino for p in agent.socket.parent.rglob("*.safetensors"))
        assert set(slots) <= set(after), "the slots were made anew"
    assert ckpt.last_error is None


@pytest.mark.parametrize("way", ["with", "at exit"])
def test_a_rank_that_ends_by_an_exception_finds_its_state_in_ram(
    agent: Agent, run: Path, way: str
) -> None:
    """As the others do when one of them dies, and its end is told by a collective that fails."""
    script = """
        import sys, tierkeep, torch
        ckpt = tierkeep.Checkpointer(sys.argv[1])
        state = {"x": torch.zeros(100_000)}
        if sys.argv[2] == "with":
            ckpt.__enter__().restore(state)
        else:
            ckpt.restore(state)
        try:
            ckpt.save(1, state).wait("disk", 60)
            raise RuntimeError("a peer is gone")
        except RuntimeError as error:
            if sys.argv[2] == "with":
                ckpt.__exit__(type(error), error, error.__traceback__)
            raise
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(run), way]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "RuntimeError: a peer is gone" in ended.stderr and ended.returncode == 1
    assert "ERROR" not in ended.stderr, ended.stderr
    with tierkeep.Checkpointer(run) as ckpt:
        restored = ckpt.restore({"x": torch.ones(100_000)})
        assert (restored.step, restored.tier) == (1, "ram")


def test_a_fork_of_a_trainer_with_an_agent_touches_nothing(agent: Agent, run: Path) -> None:
    current = state()
    with tierkeep.Checkpointer(run) as ckpt:
        ckpt.restore(current)
        ckpt.save(1, current)
        pid = os.fork()
        if pid == 0:
            refused = False
            try:
                ckpt.save(2, current)
            except tierkeep.FencedError:
                refused = True
            del ckpt
            os._exit(0 if refused else 1)
        assert os.waitpid(pid, 0)[1] == 0
        ckpt.save(2, current).wait("disk", timeout_s=30)


def test_check_config_says_what_is_in_force_and_names_the_key(tmp_path: Path) -> None:
    config = tmp_path / "agent.toml"
    config.write_text('ram_bytes_max = "2GiB"\n')
    command = [COMMAND, "agent", "--check-config", "--config", str(config), "--idle", "5m"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr
    assert f"ram_bytes_max     2147483648  ({config})" in done.stdout
    assert "idle              5m  (--idle)" in done.stdout
    config.write_text('ram_bytes_max = "many"\n')
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    assert 'error: ram_bytes_max = "many"' in done.stderr
