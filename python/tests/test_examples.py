"""The scripts in `examples/adapters`: each is run whole, then killed by itself and run again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "small.py")

KILL_AT = 17


def run(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TIERKEEP_AGENT": "off"}
    command = [sys.executable, str(EXAMPLES / script), *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


def said(done: subprocess.CompletedProcess[str], word: str) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith(word)]
    return line.removeprefix(word).strip()


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_kills_itself_goes_on_and_ends_with_the_same_weights(
    script: str, ram: Path, tmp_path: Path
) -> None:
    whole = run(script, str(tmp_path / "whole"))
    assert said(whole, "starts at step") == "0"
    killed = run(script, str(tmp_path / "killed"), "--kill-at", str(KILL_AT))
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    again = run(script, str(tmp_path / "killed"))
    assert 0 < int(said(again, "starts at step")) <= KILL_AT
    assert said(again, "weights") == said(whole, "weights")
    assert said(again, "loss") == said(whole, "loss")


def test_the_lines_that_an_example_adds_are_as_many_as_its_page_says() -> None:
    page = (EXAMPLES / "README.md").read_text()
    told = {
        name: int(lines) for name, lines in re.findall(r"^\| (\w+\.py) \| (\d+) \|", page, re.M)
    }
    added = {
        name: sum(line.endswith("# +") for line in (EXAMPLES / name).read_text().splitlines())
        for name in SCRIPTS
    }
    assert told == added
