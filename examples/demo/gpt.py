"""A small GPT over characters, and the text it reads: Python's own language reference.

Small, so that a step takes a tenth of a second on one core, but with everything that makes
resuming hard: tied weights, dropout (which draws random numbers) and an optimizer with moments.
"""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTEXT = 64
BATCH = 8
WIDTH = 160
HEADS = 4
LAYERS = 4
DROPOUT = 0.1


class Text:
    """The text as numbers, and the batch that belongs to a step and a rank."""

    def __init__(self) -> None:
        text = "\n\n".join(topics[name] for name in sorted(topics))
        alphabet = sorted(set(text))
        number = {char: at for at, char in enumerate(alphabet)}
        self.alphabet_size = len(alphabet)
        self.numbers = torch.tensor([number[char] for char in text])

    def batch(self, seed: int, step: int, rank: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each of shape (BATCH, CONTEXT).

        A pure function of its arguments: a resumed run reads on where it was, with no loader whose
        position would have to be saved.
        """
        draw = torch.Generator().manual_seed((seed * 1_000_000 + step) * 1_000 + rank)
        starts = torch.randint(len(self.numbers) - CONTEXT - 1, (BATCH,), generator=draw)
        rows = torch.stack([self.numbers[at : at + CONTEXT + 1] for at in starts.tolist()])
        return rows[:, :-1], rows[:, 1:]


class Block(nn.Module):
    """Attention, then a feed-forward layer, each added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.norm_feed = nn.LayerNorm(WIDTH)
        self.feed = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(DROPOUT)
        )

    def attend(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.query_key_value(x).view(batch, length, 3, HEADS, width // HEADS)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        dropout = DROPOUT if self.training else 0.0
        seen = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return self.projection(seen.transpose(1, 2).reshape(batch, length, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm_attention(x))
        return x + self.feed(self.norm_feed(x))


class Gpt(nn.Module):
    def __init__(self, alphabet_size: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(alphabet_size, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.dropout = nn.Dropout(DROPOUT)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, alphabet_size, bias=False)
        self.apply(self._start)
        # One tensor under two names. It is stored once, and is one tensor again when restored.
        self.head.weight = self.characters.weight

    @staticmethod
    def _start(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of the next character, in nats."""
        x = self.dropout(self.characters(inputs) + self.positions.weight[: inputs.shape[1]])
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())
