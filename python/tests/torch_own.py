"""torch's own tests of distributed checkpoints, against tierkeep's writer and reader.

    python python/tests/torch_own.py FOLDER [--ranks 2 4] [--only PATTERN] [--plain]

FOLDER has files of `test/distributed/checkpoint` of torch's repository, of the version that is
installed (they are in no wheel, and not in this repository); they need expecttest and zstandard.
They run on CPUs with gloo, with as many ranks as asked for: a file is translated (`"cuda"` means
`"cpu"`), and `FileSystemWriter`, `FileSystemReader` and what `dcp.save(checkpoint_id=...)` takes
are tierkeep's, in the processes of the ranks too. With `--plain` they stay torch's: a test that
fails there as well says nothing of tierkeep.

What is left out is named in `LEFT_OUT`, with the reason. It runs, too: an entry that passes is an
error of the list. Ends with a table, and 1 if something failed. Takes 10 to 15 seconds a test.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

RANKS = int(os.environ.get("TORCH_OWN_RANKS", "2"))

#: Seconds for one test, of which some hang when a rank of theirs fails.
TEST_SECONDS = 120

_FILES = "it transforms the files of FileSystemWriter, which are none of ours"
_FOUR = "it needs four ranks"
_PLAIN = "on CPUs it fails with torch's own writer, too"

#: By name, as fnmatch has it (`test_file.Class.test`), and the number of ranks where it matters.
LEFT_OUT: dict[tuple[str, int | None], str] = {
    ("*Rot13*", None): _FILES,
    ("*ZStandard*", None): _FILES,
    ("*_extensions[12]", None): _FILES,
    ("*.test_overwrite", None): "a save is the next step of its run: it overwrites nothing",
    ("*.TestNoCPU.*", None): "it is of nccl without gloo",
    ("*.test_dtype_mismatch_casting", None): "torch 2.15 has no allow_unsafe_types",
    ("*.test_read_write_shard_tensor_*", 4): _PLAIN,  # Ranks without a shard draw other numbers.
    ("*.TestCheckpointableReshard.*", 2): _FOUR,
    ("test_hsdp_checkpoint.*", 2): _FOUR,
    ("*.test_e2e_compile_*_model_type1", 2): _PLAIN,
    ("test_pipeline.*", None): "it saves tensors of the meta device: torch's own writer fails, too",
    ("*.test_save_with_fsdp1_and_load_with_fsdp2", None): _PLAIN,  # In the same digits.
}


def is_plain() -> bool:
    """Whether torch's own writer and reader are asked for."""
    return bool(os.environ.get("TORCH_OWN_PLAIN"))


# -- in the processes of the tests -----------------------------------------------------------


def substitute() -> None:
    """tierkeep in the place of torch's writer and reader; CPUs in the place of devices."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import _storage_utils, format_utils
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.testing._internal import common_distributed
    from torch.testing._internal.distributed._tensor import common_dtensor

    from tierkeep.torch import StorageReader, StorageWriter

    for module in () if is_plain() else (dcp, _storage_utils, format_utils):
        vars(module).update(FileSystemWriter=StorageWriter, FileSystemReader=StorageReader)
    for module in (common_distributed, common_dtensor):
        vars(module).update(skip_if_lt_x_gpu=lambda count, **_: lambda test: test)
    vars(common_dtensor).update(NUM_DEVICES=RANKS)
    vars(torch.accelerator).update(
        current_accelerator=lambda check_available=False: None,
        current_device_index=lambda: torch.device("cpu"),
        device_count=lambda: RANKS,
    )
    # Asked for no device, it takes an accelerator.
    on_cpu = functools.partialmethod(FSDP.__init__, device_id=torch.device("cpu"))
    type.__setattr__(FSDP, "__init__", on_cpu)


def fit(names: dict[str, Any]) -> None:
    """The classes of a module have as many ranks as was asked for."""
    from torch.testing._internal.common_distributed import MultiProcessTestCase

    for value in list(names.values()):
        own = isinstance(value, type) and value.__module__ == names["__name__"]
        if own and issubclass(value, MultiProcessTestCase):
            type.__setattr__(value, "world_size", property(lambda self: RANKS))


#: What a file says of devices, and what it means here.
_HERE = {
    r"\.cuda\((?:[^()]|\(\))*\)": '.to("cpu")',
    r'return f?"cpu:[^"]*"': 'return "gloo"',
    r'"cuda"': '"cpu"',
    r"device=(?:self\.rank|dist\.get_rank\(\))": 'device="cpu"',
    r"torch\.cuda\.device_count\(\)": "_own.RANKS",
    r"/tmp/": f"{tempfile.gettempdir()}/",
}


def translated(text: str) -> str:
    for pattern, here in _HERE.items():
        text = re.sub(pattern, here, text)
    return f"import torch_own as _own\n\n_own.substitute()\n{text}\n_own.fit(globals())\n"


class _Told(unittest.TestResult):
    """One line of JSON for each test."""

    def _tell(self, test: unittest.TestCase, outcome: str, detail: str) -> None:
        line = {"test": test.id(), "outcome": outcome, "detail": detail}
        print("torch_own " + json.dumps(line), flush=True)

    def addSuccess(self, test: unittest.TestCase) -> None:
        self._tell(test, "passed", "")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self._tell(test, "skipped", reason)

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        self._tell(test, "failed", self._exc_info_to_string(err, test))

    addError = addFailure

    def stopTest(self, test: unittest.TestCase) -> None:
        from tierkeep.torch import _runs

        _runs.close_all()
        _runs._seen.clear()


def inside(module: str, only: str) -> None:
    """Runs the tests of one translated file."""

    def chosen(suite: unittest.TestSuite) -> list[unittest.TestCase]:
        tests: list[unittest.TestCase] = []
        for one in suite:
            tests += chosen(one) if isinstance(one, unittest.TestSuite) else [one]
        return [test for test in tests if fnmatch.fnmatchcase(test.id(), only)]

    suite = unittest.defaultTestLoader.loadTestsFromModule(importlib.import_module(module))
    unittest.TestSuite(chosen(suite)).run(_Told())


# -- outside ---------------------------------------------------------------------------------


class Row(NamedTuple):
    test: str
    ranks: int
    outcome: str
    #: Why it is left out, or how it failed.
    detail: str


def left_out(test: str, ranks: int) -> str | None:
    for (pattern, only_at), reason in LEFT_OUT.items():
        if fnmatch.fnmatchcase(test, pattern) and only_at in (None, ranks):
            return reason
    return None


def judged(test: str, ranks: int, outcome: str, detail: str) -> Row:
    reason = None if is_plain() else left_out(test, ranks)
    if outcome == "skipped":
        return Row(test, ranks, "left out", f"torch skips it: {detail}")
    if reason is None:
        return Row(test, ranks, outcome, detail)
    if outcome == "passed":
        return Row(test, ranks, "failed", f"it passes, and is left out: {reason}")
    return Row(test, ranks, "left out", reason)


def ran(module: str, ranks: int, only: str, work: Path) -> list[Row]:
    """The rows of one file."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [work, *sys.path[:1], os.getenv("PYTHONPATH", "")])),
        "TORCH_OWN_RANKS": str(ranks),
        "TMPDIR": str(work / "tmp"),
        "TIERKEEP_AGENT": "off",
        "DISTRIBUTED_TESTS_DEFAULT_TIMEOUT": str(TEST_SECONDS),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, __file__, str(work), "--inside", module, "--only", only],
        env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    rows: list[Row] = []
    said: list[str] = []  # By the processes of a test, before it ended.
    for line in done.stdout.splitlines():
        if not line.startswith("torch_own "):
            said.append(line)
            continue
        told = json.loads(line.removeprefix("torch_own "))
        if "Expected exit code" in told["detail"]:  # A rank died, and its last words are no JSON.
            told["detail"] += "\n".join(["", *said])
        rows.append(judged(ranks=ranks, **told))
        said = []
    if done.returncode != 0 or (not rows and only == "*"):
        end = f"ended with {done.returncode}\n{done.stdout[-2000:]}"
        rows.append(Row(module, ranks, "failed", end))
    return rows


def report(rows: list[Row]) -> int:
    for row in rows:
        if row.outcome == "failed":
            print(f"--- {row.test}, {row.ranks} ranks\n{row.detail[-20_000:]}\n")
    for row in sorted(rows):
        why = f": {row.detail.splitlines()[0]}" if row.outcome == "left out" else ""
        print(f"{row.ranks} ranks  {row.outcome:8}  {row.test}{why}")
    for ranks in sorted({row.ranks for row in rows}):
        counts = Counter(row.outcome for row in rows if row.ranks == ranks)
        print(f"{ranks} ranks: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
    return int(any(row.outcome == "failed" for row in rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--only", default="*", help="of test_file.Class.test, as fnmatch has it")
    parser.add_argument("--plain", action="store_true", help="with torch's writer and reader")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.plain:
        os.environ["TORCH_OWN_PLAIN"] = "1"
    if said.inside:
        inside(said.inside, said.only)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # What it made goes, too.
    work = Path(tempfile.mkdtemp(prefix="torch-own-"))
    ram = Path(tempfile.mkdtemp(prefix="tierkeep-test-", dir="/dev/shm"))
    os.environ["TIERKEEP_RAM_DIR"] = str(ram)
    rows: list[Row] = []
    try:
        (work / "tmp").mkdir()
        for path in sorted(said.folder.rglob("test_*.py")):
            (work / path.name).write_text(translated(path.read_text()))
            if not fnmatch.fnmatchcase(path.stem, said.only.split(".")[0]):
                continue
            for ranks in said.ranks:
                rows += ran(path.stem, ranks, said.only, work)
                print(f"{path.stem}, {ranks} ranks: {len(rows)} tests so far", file=sys.stderr)
        return report(rows)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(ram, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
