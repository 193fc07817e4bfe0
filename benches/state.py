"""A training state of a GPT's shapes: 1 GiB of float32 parameters and Adam moments."""

from __future__ import annotations

import torch
from torch import nn

WIDTH, LAYERS, WORDS, PLACES = 768, 7, 50_257, 1024


class Block(nn.Module):
    """One transformer block, as GPT-2 names its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)


class Gpt(nn.Module):
    """The parameters of a GPT; it is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(WORDS, WIDTH)
        self.wpe = nn.Embedding(PLACES, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(WIDTH)


def gpt_state() -> tuple[Gpt, torch.optim.Optimizer]:
    """The model and an AdamW that has taken a step, so that it has moments."""
    torch.manual_seed(0)
    model = Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Every tensor of the state, each once."""
    found = [t.detach() for t in model.state_dict().values()]
    for moments in optimizer.state.values():
        found += [v for v in moments.values() if isinstance(v, torch.Tensor)]
    return found


class Memcpy:
    """The reference: the same tensors into the same kind of memory, one thread, warm."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        import ctypes
        import mmap
        import os

        self._copy = ctypes.CDLL(None).memcpy
        self._copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        self._copy.restype = ctypes.c_void_p
        self.bytes = sum(t.numel() * t.element_size() for t in tensors)
        path = f"/dev/shm/tierkeep-bench-{os.getpid()}"
        with open(path, "w+b") as file:
            os.unlink(path)
            file.truncate(self.bytes)
            self._map = mmap.mmap(file.fileno(), self.bytes)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._pieces = []
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            self._pieces.append((start, tensor.data_ptr(), size))
            start += size
        self.out()

    def out(self) -> None:
        """State to memory, as a save does."""
        for there, here, size in self._pieces:
            self._copy(there, here, size)

    def back(self) -> None:
        """Memory to state, as a restore does."""
        for there, here, size in self._pieces:
            self._copy(here, there, size)
