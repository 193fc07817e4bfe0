"""The codec of compressed chunks beside zstd and ZipNN, on what training a small GPT leaves.

Trains the demo's GPT, a few times as wide, for `--steps` steps (kept in `--dir` for the next time),
then compresses the weights as bf16 and as fp32 and AdamW's two moments, in chunks of 4 MiB each
alone, by each in turn, `--rounds` times. Ratios are stored to raw bytes, speeds are raw GB (10^9
bytes) a second of one core's CPU time, medians of the rounds. A table for people goes to stderr,
JSON to stdout.

ZipNN makes a new buffer for each result and has a call from Python for each chunk; the others write
where they wrote before. That is in the figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "demo"))

import gpt
import torch
import zipnn
from torch import Tensor

ROOT = Path(__file__).parents[1]
CHUNK_BYTES = 4 << 20
FILES = {"weights.bf16": 2, "weights.fp32": 4, "exp_avg.fp32": 4, "exp_avg_sq.fp32": 4}
SEED = 7


def trained(folder: Path, width: int, steps: int) -> None:
    """Writes FILES, unless they are there."""
    if all((folder / name).exists() for name in FILES):
        return
    folder.mkdir(parents=True, exist_ok=True)
    gpt.WIDTH = width
    torch.manual_seed(SEED)
    text = gpt.Text()
    model = gpt.Gpt(text.alphabet_size)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        loss = model(*text.batch(SEED, step, 0))
        adam.zero_grad()
        loss.backward()
        adam.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", file=sys.stderr)
    weights = list(model.parameters())

    def write(name: str, tensors: list[Tensor]) -> None:
        raw = torch.cat([tensor.detach().flatten() for tensor in tensors]).view(torch.uint8)
        (folder / name).write_bytes(raw.numpy().tobytes())

    write("weights.bf16", [weight.bfloat16() for weight in weights])
    write("weights.fp32", weights)
    for moment in ("exp_avg", "exp_avg_sq"):
        write(f"{moment}.fp32", [adam.state[weight][moment] for weight in weights])


def by_zipnn(file: Path, width: int) -> dict[str, float]:
    dtype = {2: "bfloat16", 4: "float32"}[width]
    whole = file.read_bytes()
    made = {"bytes": 0, "compress_s": 0.0, "decompress_s": 0.0}
    for at in range(0, len(whole), CHUNK_BYTES):
        chunk = whole[at : at + CHUNK_BYTES]
        codec = zipnn.ZipNN(input_format="byte", bytearray_dtype=dtype, threads=1)
        given = bytearray(chunk)  # It may change what it is given.
        begun = time.process_time()
        stored = codec.compress(given)
        made["compress_s"] += time.process_time() - begun
        made["bytes"] += len(stored)
        begun = time.process_time()
        back = codec.decompress(stored)
        made["decompress_s"] += time.process_time() - begun
        if back != chunk:
            raise SystemExit("zipnn: other bytes came back")
    return made


def by_ours(file: Path, width: int) -> dict[str, Any]:
    command = [ROOT / "target" / "release" / "bench-compress", file, str(width)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=ROOT / "build" / "compress")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=320)
    asked = parser.parse_args()
    folder = asked.dir / f"width-{asked.width}-steps-{asked.steps}"
    trained(folder, asked.width, asked.steps)

    measured: dict[str, dict[str, dict[str, float]]] = {}
    for name, width in FILES.items():
        file = folder / name
        rounds: dict[str, list[dict[str, float]]] = {}
        by_zipnn(file, width)
        for _ in range(asked.rounds):
            found = by_ours(file, width)
            length = found.pop("length")
            found["zipnn"] = by_zipnn(file, width)
            for way, made in found.items():
                rounds.setdefault(way, []).append(made)

        def speed(all_of: list[dict[str, float]], part: str, length: int = length) -> float:
            return length / statistics.median(made[part] for made in all_of) / 1e9

        print(f"\n{name}, {length / 2**20:.1f} MiB", file=sys.stderr)
        measured[name] = {}
        for way, all_of in rounds.items():
            (stored,) = {made["bytes"] for made in all_of}
            row = {
                "ratio": round(stored / length, 4),
                "compress_gb_s": round(speed(all_of, "compress_s"), 2),
                "decompress_gb_s": round(speed(all_of, "decompress_s"), 2),
            }
            measured[name][way] = row
            cells = "  ".join(f"{value:6.4g}" for value in row.values())
            print(f"  {way:10} {cells}  (ratio, compress and decompress GB/s)", file=sys.stderr)
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
