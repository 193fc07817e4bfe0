"""A rank of its own on one node: for each line that it hears it saves, and says what became of it.

`python benches/saver.py DESTINATION SOCKET BYTES REPLICAS`; `between.Saver` starts it on a node.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

import tierkeep


def main() -> None:
    destination, socket, size, replicas = sys.argv[1:]
    state = {"w": np.arange(int(size) // 8, dtype=np.int64)}
    ckpt = tierkeep.Checkpointer(
        destination,
        agent=socket,
        replicas=int(replicas),
        slots=3,
        disk_every=10**9,
        rank=0,
        world_size=1,
    )
    begun = time.perf_counter()
    found = ckpt.restore(state)
    took = time.perf_counter() - begun
    good = found is None or bool((state["w"][:8] == np.arange(8) + found.step).all())
    print(json.dumps({"restored": found and found.step, "seconds": took, "good": good}), flush=True)
    step = found.step if found else 0
    for _ in sys.stdin:
        step += 1
        state["w"] += 1
        save = ckpt.save(step, state)
        begun = time.perf_counter()
        try:
            save.wait("peer", 120)
            said = {"step": step, "seconds": time.perf_counter() - begun}
        except tierkeep.TierkeepError as e:
            said = {"step": step, "error": f"{type(e).__name__}: {e}"}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
