"""A byte-level language model on the text of Python's own standard library.

A sample is a paragraph, what stands between blank lines, so lengths are as people write them: from 16 to 512 bytes,
half of them below 140, a twentieth above 430. A batch holds samples of like length and costs in proportion to it.
"""

from __future__ import annotations

import math
import random
import re
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mpisync.tasks.base import Task

__all__ = ["Text"]

LEAST_BYTES, MOST_BYTES = 16, 512
TEXT_BYTES = 4 << 20  # read at most, so that it takes about half a second
BEGIN = 256  # what stands before the first byte


def paragraphs(text: bytes) -> list[bytes]:
    r"""Return the paragraphs of a text that are neither too short nor too long.

    Example:
        >>> paragraphs(b"import os" + b"\n\n" + b"def f(x):\n    return x" + b"\n \n\n" + b"x = 1")
        [b'def f(x):\n    return x']
    """
    return [part for part in re.split(rb"\n[ \t]*(?:\n[ \t]*)+", text) if LEAST_BYTES <= len(part) <= MOST_BYTES]


def read_library(folder: Path) -> tuple[list[bytes], list[bytes]]:
    """Return the paragraphs of a folder's .py files to train on, and those of every tenth file, which are held out.

    Raises:
        FileNotFoundError: There is too little text, as where the library is only there compiled or in a zip file.
    """
    training: list[bytes] = []
    held_out: list[bytes] = []
    left = TEXT_BYTES
    for number, path in enumerate(sorted(folder.glob("*.py"))):
        text = path.read_bytes()
        left -= len(text)
        if left < 0:
            break
        (held_out if number % 10 == 9 else training).extend(paragraphs(text))
    if len(held_out) < 100:
        raise FileNotFoundError(
            f"{folder} has {len(training)} paragraphs to train on and {len(held_out)} to hold out, at least 100 are "
            "needed: the text is that of the standard library's .py files; use a Python that is installed with them"
        )
    return training, held_out


def pad(samples: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    """Return samples as one batch: bytes (B × longest, int64) and a mask of those that are some (the same, bool)."""
    longest = max(map(len, samples))
    text = np.zeros((len(samples), longest), np.int64)
    for row, sample in zip(text, samples, strict=True):
        row[: len(sample)] = np.frombuffer(sample, np.uint8)
    lengths = np.array([len(sample) for sample in samples])
    return torch.from_numpy(text), torch.from_numpy(np.arange(longest) < lengths[:, None])


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Batches of samples of like length; an item is a whole batch, so that a default sampler shuffles batches."""

    def __init__(self, samples: Iterable[bytes], batch_size: int) -> None:
        mixed = list(samples)
        random.Random(0).shuffle(mixed)  # samples of one length come from different files
        mixed.sort(key=len)
        self._groups = [mixed[first : first + batch_size] for first in range(0, len(mixed), batch_size)]

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return pad(self._groups[index])


class Block(nn.Module):
    """A transformer's layer: causal attention, then a perceptron, each normed before and added.

    Args:
        width: Features of a position.
        heads: Heads of attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (B × L × width) to features."""
        size, length, width = x.shape
        heads = self.mix(self.norm1(x)).view(size, length, 3, self._heads, width // self._heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each B × heads × L × width/heads
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(size, length, width))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class Transformer(nn.Module):
    """Predicts each byte from those before it. Padding comes last, so what is causal never sees it.

    Args:
        width: Features of a position.
        layers: How many blocks.
        heads: Heads of attention in each.
    """

    def __init__(self, width: int = 128, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(BEGIN + 1, width), nn.Embedding(MOST_BYTES, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, text: Tensor) -> Tensor:
        """Map bytes (B × L) to logits of the same bytes (B × L × 256)."""
        before = F.pad(text[:, :-1], (1, 0), value=BEGIN)
        x = self.bytes(before) + self.places.weight[: text.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class Text(Task):
    """A small transformer learns to predict the bytes of Python's standard library.

    Batches differ in cost as their samples' lengths do, some twentyfold: slowness that belongs to the sample. What is
    dropped for being late is then long, and the model sees less of what is long; so `evaluate` measures the longest
    quarter apart.

    Args:
        folder: Whose .py files to read: the standard library's by default.
    """

    name = "text"
    about = "bytes of the standard library's source, a causal transformer (528,256 parameters), variable lengths"
    metric = "bits per byte"
    target = 3.6
    uneven = True
    batch_size = 8
    steps = 300
    learning_rate = 2e-3

    def __init__(self, folder: str | Path | None = None) -> None:
        library = Path(folder or sysconfig.get_path("stdlib"))
        self._training, held_out = read_library(library)
        chosen = held_out[:: max(1, len(held_out) // 256)]  # some 40 kB, so that looking takes half a second
        self._testing = Batches(chosen, 16)

    def model(self) -> nn.Module:
        """Return the transformer."""
        return Transformer()

    def loader(self, batch_size: int | None = None) -> DataLoader[Any]:
        """Return batches of paragraphs of like length, in shuffled order: (bytes, mask)."""
        return DataLoader(Batches(self._training, batch_size or self.batch_size), batch_size=None, shuffle=True)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean cross entropy of a byte in nats."""
        text, mask = batch
        return F.cross_entropy(model(text)[mask], text[mask])

    def cost(self, batch: Any) -> float:
        """Return the bytes that are computed on, padding too: samples × the longest's length."""
        return float(batch[0].numel())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return bits per byte of held-out files' paragraphs, and those of their longest quarter."""
        bits, count = [], []
        with torch.no_grad():
            for index in range(len(self._testing)):
                text, mask = self._testing[index]
                bits.append(float(F.cross_entropy(model(text)[mask], text[mask], reduction="sum")) / math.log(2))
                count.append(int(mask.sum()))
        first = len(bits) * 3 // 4  # batches are sorted by length
        longest = sum(bits[first:]) / sum(count[first:])
        return {self.metric: sum(bits) / sum(count), "bits per byte, longest quarter": longest}
