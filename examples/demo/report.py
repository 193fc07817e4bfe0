"""What the demo found: the comparison that decides, the table and the picture."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any


@dataclass
class Start:
    """One start of the job, as one rank's diary tells it."""

    step: int
    tier: str | None
    seconds: float
    losses: list[tuple[int, str]] = field(default_factory=list)
    stalls_ms: list[float] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        return self.losses[-1][0] if self.losses else self.step


@dataclass
class Run:
    """Every start of a run, for each rank."""

    starts: list[list[Start]]
    fingerprints: list[str]


def read(folder: Path, world: int) -> Run:
    starts, fingerprints = [], []
    for rank in range(world):
        mine: list[Start] = []
        for line in (folder / f"rank-{rank}.jsonl").read_text().splitlines():
            note: dict[str, Any] = json.loads(line)
            match note["kind"]:
                case "start":
                    mine.append(Start(note["step"], note["tier"], note["seconds"]))
                case "loss":
                    mine[-1].losses.append((note["step"], note["loss"]))
                case "save":
                    mine[-1].stalls_ms.append(note["stall_ms"])
                case "end":
                    fingerprints.append(note["fingerprint"])
        starts.append(mine)
    return Run(starts, fingerprints)


def differences(whole: Run, broken: Run, steps: int) -> list[str]:
    """What is not equal, to the last bit, between the two runs; empty when all is well.

    Steps that were done twice, because a kill took them back, are compared both times.
    """
    found = []
    for rank, (expected, starts) in enumerate(zip(whole.starts, broken.starts, strict=True)):
        losses = dict(expected[0].losses)
        if sorted(losses) != list(range(1, steps + 1)):
            found.append(f"rank {rank}: the uninterrupted run has {len(losses)} of {steps} losses")
        done = set()
        for start in starts:
            for step, loss in start.losses:
                done.add(step)
                if loss != losses.get(step):
                    found.append(f"rank {rank}, step {step}: {loss} is not {losses.get(step)}")
        if len(done) != steps:
            found.append(f"rank {rank}: the interrupted run did {len(done)} of {steps} steps")
    if len(set(whole.fingerprints)) != 1 or whole.fingerprints != broken.fingerprints:
        found.append(f"final weights: {broken.fingerprints} is not {whole.fingerprints}")
    return found


def lost(before: list[list[Start]], at: int) -> int:
    """Steps that start number `at` has to do again."""
    return max(rank[at - 1].last_step - rank[at].step for rank in before)


def table(whole: Run, broken: Run) -> str:
    """A row for each start of the job. Stalls are medians over both ranks' saves."""
    rows = [("", "goes on at", "read from", "restore", "stall per save", "lost")]
    rows.append(("uninterrupted", "step 0", "-", "-", stall([r[0] for r in whole.starts]), "-"))
    for at in range(len(broken.starts[0])):
        starts = [rank[at] for rank in broken.starts]
        if at == 0:
            name, tier, restore, again = "first start", "-", "-", "-"
        else:
            name = f"resume {at}"
            tier = tiers(starts)
            restore = f"{max(start.seconds for start in starts):.3f} s"
            count = lost(broken.starts, at)
            again = "1 step" if count == 1 else f"{count} steps"
        rows.append((name, f"step {starts[0].step}", tier, restore, stall(starts), again))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "  " + "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def stall(starts: list[Start]) -> str:
    stalls = [ms for start in starts for ms in start.stalls_ms]
    return f"{median(stalls):.2f} ms" if stalls else "no save"


def tiers(starts: list[Start]) -> str:
    """'ram' when all ranks read from there, else one for each rank, in order."""
    names = [start.tier or "nothing" for start in starts]
    return names[0] if len(set(names)) == 1 else ", ".join(names)


def picture(whole: Run, broken: Run, seed: int, path: Path) -> None:
    """Rank 0's loss: the uninterrupted run broad and pale, the interrupted one thin upon it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5.2), layout="constrained")
    curve = [(step, float.fromhex(loss)) for step, loss in whole.starts[0][0].losses]
    axes.plot(*zip(*curve, strict=True), color="#a9c8e8", linewidth=6, label="uninterrupted")

    latest = max(value for _, value in curve)
    colours = {"ram": "#d1495b", "disk": "#2e7d32"}
    for at, start in enumerate(broken.starts[0]):
        points = [(step, float.fromhex(loss)) for step, loss in start.losses]
        if not points:
            continue
        label = "killed and resumed" if at == 0 else None
        axes.plot(*zip(*points, strict=True), color="#1b2a41", linewidth=1.1, label=label)
        if at == 0:
            continue
        tier = tiers([rank[at] for rank in broken.starts])
        colour = colours.get(tier, "#b26a00")
        axes.axvline(start.step, color=colour, linewidth=1, linestyle="--")
        axes.axvspan(start.step, start.step + lost(broken.starts, at), color=colour, alpha=0.12)
        words = f" from {tier}\n step {start.step}, {lost(broken.starts, at)} done again"
        # One below the other: two kills can be a few steps apart.
        height = latest - (at - 1) * (latest - axes.get_ylim()[0]) / 12
        axes.text(start.step, height, words, color=colour, fontsize=9, verticalalignment="top")

    axes.set_title(f"a small GPT, two ranks, killed three times with SIGKILL (seed {seed})")
    axes.set_xlabel("step")
    axes.set_ylabel("loss of rank 0, nats per character")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
