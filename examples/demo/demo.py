"""The demo: a training job is killed again and again, and nobody can tell from its losses.

The job of `train.py` runs three times with the same seed. The first time nothing happens to it. The
second time it is killed with SIGKILL inside a save and resumes from RAM; killed again, with the
RAM tier wiped, and resumes from disk; killed a third time, and each tier's copy is damaged by one
flipped byte, so that neither is whole, and it resumes from what is good of both. The third time
the node has an agent: killed right after a save, the job loses nothing, for the agent carries that
step to disk with nobody training; then the agent is killed, and the job goes on with the next one.
Every loss of all runs must be equal, to the last bit.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import report
from agent import Agent
from ranks import WORLD, Failed, Ranks

STEPS = 160
EVERY = 10
KILL_DELAY_MS_MAX = 20.0
PROBLEMS_SHOWN_MAX = 10
SEAL_SECONDS_MAX = 60.0
SHARED_MEMORY = Path("/dev/shm")


class Demo:
    def __init__(self, home: Path, ram: Path, seed: int) -> None:
        self.home, self.ram, self.seed = home, ram, seed
        self.chance = random.Random(seed)
        self.dest = home / "interrupted"
        self.starts = 0
        #: What `TIERKEEP_AGENT` says to the job.
        self.agent = "off"
        self.problems: list[str] = []

    def start(self, run: str) -> Ranks:
        self.starts += 1
        arguments = [str(self.home / run), "--diary", str(self.diary(run))]
        arguments += ["--steps", str(STEPS), "--every", str(EVERY), "--seed", str(self.seed)]
        self.diary(run).mkdir(parents=True, exist_ok=True)
        logs = self.home / "logs" / f"start-{self.starts}"
        return Ranks(arguments, self.ram, logs, self.agent)

    def diary(self, run: str) -> Path:
        return self.home / "diary" / run

    def run(self) -> int:
        say(f"\n1. uninterrupted: {STEPS} steps, saved every {EVERY}")
        began = time.monotonic()
        self.finish(self.start("uninterrupted"))
        say(f"   done in {time.monotonic() - began:.0f} s")

        say("\n2. interrupted: the same job with the same seed")
        self.die_in_a_save(self.start("interrupted"), around=40)
        ranks = self.start("interrupted")
        self.expect_tiers(ranks, ["ram", "ram"])

        self.die_in_a_save(ranks, around=80)
        empty(self.ram)
        say("   wiped the ram tier")
        ranks = self.start("interrupted")
        self.expect_tiers(ranks, ["disk", "disk"])

        step = self.die_when_on_disk(ranks, after=self.pick(120))
        self.damage(step)
        ranks = self.start("interrupted")
        self.expect_tiers(ranks, ["ram", "ram"], step)
        self.expect_warning(ranks, rank=1)
        self.finish(ranks)
        say("   done")
        self.run_with_an_agent()
        return self.judge()

    def run_with_an_agent(self) -> None:
        say("\n3. with an agent: the same job; `tierkeep agent` owns the RAM tier")
        empty(self.ram)
        self.dest = self.home / "hosted"
        agent = Agent(self.ram, self.home / "logs" / "agent.log")
        self.agent = str(agent.socket)
        try:
            ranks = self.start("hosted")
            step = self.die_after_a_save(ranks, self.pick(60))
            self.await_seal(step)
            ranks = self.start("hosted")
            self.expect_tiers(ranks, ["ram", "ram"], step, "hosted")
            self.await_due(ranks, self.pick(110))
            self.next(ranks)  # Between two saves: one under way would wait for the next agent.
            agent.kill()
            _, step = self.next(ranks)
            say(f"   killed the agent; training goes on with step {step}")
            agent.start()
            say("   started another one")
            self.finish(ranks)
            say("   done")
        finally:
            agent.kill()

    def die_after_a_save(self, ranks: Ranks, target: int) -> int:
        """Kills the job as soon as a save has returned on both ranks."""
        try:
            step = self.await_due(ranks, target)
            self.next(ranks)  # Both have it: the step after it needs both.
        finally:
            ranks.kill()
        self.note_errors(ranks)
        say(f"   killed right after the save of step {step} returned")
        return step

    def await_seal(self, step: int) -> None:
        began = time.monotonic()
        while not self.files(self.dest, step, "CHECKPOINT.json"):
            if time.monotonic() - began > SEAL_SECONDS_MAX:
                raise Failed(f"the agent did not carry step {step} to disk")
            time.sleep(0.01)
        took = time.monotonic() - began
        say(f"   step {step} is on disk {took:.2f} s later, with nobody training")

    def pick(self, around: int) -> int:
        """A step near `around` at which a save is due."""
        return around + EVERY * self.chance.randint(-1, 1)

    def finish(self, ranks: Ranks) -> None:
        try:
            while (words := ranks.line()) is not None:
                show_progress(words)
        finally:
            ranks.kill()
        self.note_errors(ranks)

    def die_in_a_save(self, ranks: Ranks, around: int) -> None:
        """Kills the job some milliseconds after it said that it now saves."""
        step, delay_ms = self.pick(around), self.chance.uniform(0.0, KILL_DELAY_MS_MAX)
        try:
            self.await_due(ranks, step)
            time.sleep(delay_ms / 1e3)
        finally:
            ranks.kill()
        self.note_errors(ranks)
        say(f"   killed {delay_ms:.1f} ms after step {step} began to be saved")

    def die_when_on_disk(self, ranks: Ranks, after: int) -> int:
        """Kills the job between two saves, once its newest step lies in RAM and on disk.

        Only then are there two copies, of which one may be damaged without losing the step.
        """
        try:
            due = self.await_due(ranks, after)
            while True:
                kind, step = self.next(ranks)
                if kind == "due":
                    due = step
                # Not in the last moment before the next save, which would put a newer step in RAM.
                elif step < due + EVERY - 1 and self.files(self.dest, due, "CHECKPOINT.json"):
                    break
        finally:
            ranks.kill()
        self.note_errors(ranks)
        say(f"   killed in step {step + 1}, with step {due} sealed on disk")
        return due

    def await_due(self, ranks: Ranks, target: int) -> int:
        while True:
            kind, step = self.next(ranks)
            if kind == "due" and step >= target:
                return step

    def next(self, ranks: Ranks) -> tuple[str, int]:
        words = ranks.line()
        if words is None:
            raise Failed("the job ended before it could be killed: no step was sealed on disk")
        show_progress(words)
        return words[0], int(words[1])

    def damage(self, step: int) -> None:
        """Flips one byte of rank 1's copy in RAM and one of rank 0's on disk."""
        self.flip(self.ram, step, rank=1, where="in ram")
        broken = self.flip(self.dest, step, rank=0, where="on disk")
        command = [str(Path(sys.executable).with_name("tierkeep")), "verify", str(self.dest)]
        environment = {**os.environ, "TIERKEEP_RAM_DIR": str(self.ram)}
        verify = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        told = [line for line in (verify.stdout + verify.stderr).splitlines() if broken in line]
        for line in told:
            say(f"   tierkeep verify: {line.strip().replace(str(self.dest), shown(self.dest))}")
        if verify.returncode == 0 or not told:
            self.problems.append(
                f"`tierkeep verify` exited with {verify.returncode} and did not name {broken}: "
                f"{verify.stdout}{verify.stderr}"
            )

    def flip(self, root: Path, step: int, rank: int, where: str) -> str:
        """Inverts one byte among the tensors of a payload; returns the payload's name."""
        payloads = self.files(root, step, f"rank-{rank:06}-*.safetensors")
        if len(payloads) != 1:
            raise Failed(f"rank {rank} has {len(payloads)} payloads of step {step} {where}, not 1")
        with payloads[0].open("r+b") as file:
            tensors_begin = 8 + int.from_bytes(file.read(8), "little")
            at = self.chance.randrange(tensors_begin, payloads[0].stat().st_size)
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 0xFF]))
        change = f"0x{byte:02x} -> 0x{byte ^ 0xFF:02x}"
        say(f"   flipped byte {at:,} of rank {rank}'s copy {where}: {change}")
        return payloads[0].name

    @staticmethod
    def files(root: Path, step: int, name: str) -> list[Path]:
        return sorted(root.rglob(f"{step:020}/*/{name}"))

    def expect_tiers(
        self, ranks: Ranks, tiers: list[str], step: int | None = None, run: str = "interrupted"
    ) -> None:
        """Waits until the job has restored, and looks where from."""
        try:
            words = ranks.line()
            # Rank 1 may still be restoring; when a step is done, both ranks have.
            self.next(ranks)
            starts = [mine[-1] for mine in report.read(self.diary(run), WORLD).starts]
        except BaseException:
            ranks.kill()
            raise
        at = f"resumed at step {starts[0].step} from {report.tiers(starts)}"
        say(f"   {at} in {max(start.seconds for start in starts):.3f} s")
        if words is None or [start.tier for start in starts] != tiers:
            self.problems.append(f"{at}, expected {', '.join(tiers)}")
        if step is not None and starts[0].step != step:
            self.problems.append(f"{at}, expected step {step}")
        if len({start.step for start in starts}) != 1 or starts[0].step == 0:
            self.problems.append(f"the ranks resumed at {[start.step for start in starts]}")

    def expect_warning(self, ranks: Ranks, rank: int) -> None:
        warnings = ranks.warnings(rank)
        for warning in warnings:
            say(f"   rank {rank}: {warning}")
        if not warnings:
            self.problems.append(f"rank {rank} took another copy and did not say so")

    def note_errors(self, ranks: Ranks) -> None:
        self.problems += [f"rank {rank}: {line}" for rank, line in ranks.errors()]

    def judge(self) -> int:
        whole = report.read(self.diary("uninterrupted"), WORLD)
        broken = report.read(self.diary("interrupted"), WORLD)
        hosted = report.read(self.diary("hosted"), WORLD)
        for run in (broken, hosted):
            self.problems += report.differences(whole, run, STEPS)
        path = self.home / "loss.png"
        report.picture(whole, broken, self.seed, path)
        say(f"\n{report.table(whole, broken)}\n\n   picture: {shown(path)}")
        if self.problems:
            say(f"\nfailed, seed {self.seed}:")
            for problem in self.problems[:PROBLEMS_SHOWN_MAX]:
                say(f"   {problem}")
            if len(self.problems) > PROBLEMS_SHOWN_MAX:
                say(f"   and {len(self.problems) - PROBLEMS_SHOWN_MAX} more")
            say(f"hint: the logs are in {shown(self.home / 'logs')}")
            return 1
        ranks = [*broken.starts, *hosted.starts]
        losses = sum(len(start.losses) for rank in ranks for start in rank)
        say(f"   all {losses} losses and the final weights are equal, bit for bit")
        command = shown(Path(sys.executable).with_name("tierkeep"))
        say(f"   look around: {command} ls {shown(self.home / 'interrupted')}")
        return 0


def say(line: str) -> None:
    show_progress(None)
    print(line, flush=True)


def show_progress(words: list[str] | None) -> None:
    """Rank 0's last step, on a terminal only; None wipes it away."""
    if not sys.stderr.isatty():
        return
    if words is None:
        sys.stderr.write("\r\x1b[K")
    elif words[0] in ("step", "due"):
        sys.stderr.write(f"\r\x1b[K   step {words[1]} of {STEPS}, loss {words[2]}")
    sys.stderr.flush()


def shown(path: Path) -> str:
    return os.path.relpath(path)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir(mode=0o700)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="repeats a demo; default: a fresh one")
    parser.add_argument("--home", type=Path, default=Path("build/demo"), help="where it all lies")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1_000_000)
    home = options.home.absolute()

    say("tierkeep demo: a small GPT, two ranks on the CPU, killed four times, and its agent once")
    say(f"seed {seed}; again with: make demo SEED={seed}")
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    memory = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    ram = Path(tempfile.mkdtemp(prefix="tierkeep-demo-", dir=memory))
    if memory is None:
        say(f"note: {SHARED_MEMORY} cannot be written; the ram tier lies in {ram}")
    try:
        return Demo(home, ram, seed).run()
    except Failed as failure:
        say(f"\nfailed, seed {seed}: {failure}")
        return 1
    except KeyboardInterrupt:
        say("\nstopped")
        return 130
    finally:
        shutil.rmtree(ram, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
