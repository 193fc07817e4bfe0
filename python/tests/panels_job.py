"""One rank of a small training job (`panels_story`): it trains and saves until it is told to end.

python panels_job.py DESTINATION OPTIONS-AS-JSON
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np

import tierkeep


def main() -> None:
    destination, options = sys.argv[1], json.loads(sys.argv[2])
    rng = np.random.default_rng(options.get("rank", 0))
    inputs, wanted = rng.standard_normal((64, 1500)), rng.standard_normal((64, 800))
    weights = np.zeros((1500, 800), np.float32)
    state: dict[str, Any] = {"weights": weights, "momentum": np.zeros_like(weights), "step": 0}
    with tierkeep.Checkpointer(destination, **options) as ckpt:
        ckpt.restore(state)
        while not ckpt.stop_requested():
            slope = inputs.T @ (inputs @ state["weights"] - wanted) / 64
            state["momentum"] *= 0.9
            state["momentum"] += slope.astype(np.float32)
            state["weights"] -= 0.001 * state["momentum"]
            state["step"] += 1
            time.sleep(0.1)
            ckpt.step(state["step"], state)


if __name__ == "__main__":
    main()
