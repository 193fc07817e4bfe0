"""The state of the random number generators, as something that a state can hold."""

from __future__ import annotations

import array
import importlib
import logging
import random
import sys
from typing import Any

logger = logging.getLogger("tierkeep")


class Rng:
    """The process-wide random number generators: Python's, numpy's, torch's on the CPU and on every
    CUDA device. numpy and torch are taken along if the script has imported them.

    Put one into the state, as in `{"model": model, "rng": tierkeep.Rng()}`. Generators of your own
    (`torch.Generator`, `numpy.random.Generator`) are not in it: store their state beside it. It
    comes back last, whatever else draws random numbers while it is restored.
    """

    def state_dict(self) -> dict[str, Any]:
        """The states as they are now."""
        version, words, gauss = random.getstate()
        # 625 words of 32 bits: as bytes they take a tenth of the room that a list of ints does.
        packed = array.array("I", words).tobytes()
        state: dict[str, Any] = {"python": {"version": version, "words": packed, "gauss": gauss}}
        if "numpy" in sys.modules:
            state["numpy"] = sys.modules["numpy"].random.get_state(legacy=False)
        torch = sys.modules.get("torch")
        if torch is not None:
            state["torch"] = torch.get_rng_state()
            if torch.cuda.is_initialized():
                state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts them back, those of CUDA devices as far as this process has as many."""
        python = state["python"]
        words = array.array("I")
        words.frombytes(python["words"])
        random.setstate((python["version"], tuple(words), python["gauss"]))
        # Imported where need be: a generator that is first used later would begin anew, unnoticed.
        if "numpy" in state:
            importlib.import_module("numpy").random.set_state(state["numpy"])
        if "torch" in state:
            torch = importlib.import_module("torch")
            torch.set_rng_state(state["torch"].cpu())
            self._load_cuda(torch, state.get("cuda", []))

    @staticmethod
    def _load_cuda(torch: Any, states: list[Any]) -> None:
        if not states:
            return
        devices = torch.cuda.device_count()
        if devices < len(states):
            # A job goes on with fewer devices a process: it is no longer the same in any case.
            logger.warning(
                "random numbers of %d CUDA devices were saved, this process has %d: the others' "
                "are left out",
                len(states),
                devices,
            )
        for device, state in enumerate(states[:devices]):
            torch.cuda.set_rng_state(state.cpu(), device)

    def __repr__(self) -> str:
        return "Rng()"
