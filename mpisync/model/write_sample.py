"""Samples of memory that nobody should write to: they tell of writes that torch does not count, such as p.data.add_().

A sample is small, and the next one is of other elements, so that each is looked at within a hundred samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mpisync.device.base import Array
from mpisync.model.tensor_layout import flat_bytes, flat_tensor, is_dense, tensor_of

_BLOCK_WORDS = 512  # of 8 bytes: a page
_LEAST_BYTES = 32 << 10  # a smaller sample costs no less
_TURNS = 100
_CHUNK_BYTES = 16 << 10
_MOST_CHUNKS = 64


class MemorySample:
    """A sample of one run of memory, spread over all of it.

    Args:
        memory: uint8, on an 8-byte boundary, a multiple of 8 long; the host's or a device's.

    Example:
        >>> memory = np.zeros(800, np.uint8)
        >>> sample = MemorySample(memory)
        >>> sample.take()
        >>> memory[80] = 1
        >>> sample.written()
        80
    """

    def __init__(self, memory: Array) -> None:
        is_host = isinstance(memory, np.ndarray)
        words = memory.view(np.uint64) if is_host else tensor_of(memory, "uint8").view(torch.int64)
        blocks = len(words) // _BLOCK_WORDS
        self._blocks = words[: blocks * _BLOCK_WORDS].reshape(blocks, _BLOCK_WORDS)
        self._rest = words[blocks * _BLOCK_WORDS :]
        self._turns = min(max(1, -(-memory.nbytes // _LEAST_BYTES)), _TURNS)
        self._turn = 0
        self._kept: tuple[bytes, bytes] | None = None

    def take(self) -> None:
        """Keep the next sample of the memory as it is now."""
        self._turn = (self._turn + 1) % self._turns
        self._kept = self._now()

    def _now(self) -> tuple[bytes, bytes]:
        return _bytes(self._blocks[self._turn :: self._turns]), _bytes(self._rest)

    def written(self) -> int | None:
        """Return the offset, in bytes, of a word that has changed since the sample was taken; None if none has."""
        now = self._now()
        if self._kept is None or now == self._kept:
            return None
        before, after = (np.frombuffer(b"".join(parts), np.uint64) for parts in (self._kept, now))
        word = int(np.flatnonzero(before != after)[0])
        blocks: int = self._blocks.shape[0]
        sampled = len(now[0]) // 8
        if word >= sampled:
            return 8 * (blocks * _BLOCK_WORDS + word - sampled)
        row, column = divmod(word, _BLOCK_WORDS)
        return 8 * int((self._turn + row * self._turns) * _BLOCK_WORDS + column)


def _memory(tensor: Tensor) -> np.ndarray | Tensor:
    """Return the memory of a dense tensor as uint8; of a device's, which only the sample is to leave, as a tensor."""
    return flat_bytes(tensor) if tensor.device.type == "cpu" else flat_tensor(tensor)


def _bytes(words: np.ndarray | Tensor) -> bytes:
    return words.tobytes() if isinstance(words, np.ndarray) else words.cpu().numpy().tobytes()


class TensorSample:
    """A sample of a few tensors out of many.

    Of tensors of more than 100 MB in all it takes more than a hundred samples to come round.

    Args:
        tensors: As they are now.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        arrays = [_memory(tensor) if is_dense(tensor) else np.empty(0, np.uint8) for tensor in tensors]
        self._addresses = [tensor.data_ptr() for tensor in tensors]
        chunks = [
            (index, array[start : start + _CHUNK_BYTES])
            for index, array in enumerate(arrays)
            for start in range(0, array.nbytes, _CHUNK_BYTES)
        ]
        self._each = min(-(-len(chunks) // _TURNS), _MOST_CHUNKS)
        self._next = itertools.cycle(chunks)
        self._kept: list[tuple[int, np.ndarray | Tensor, bytes]] = []

    def take(self) -> None:
        """Keep the next sample of the tensors as they are now."""
        chunks = itertools.islice(self._next, self._each)
        self._kept = [(index, chunk, _bytes(chunk)) for index, chunk in chunks]

    def written(self) -> int | None:
        """Return the number of a tensor that has changed, or has other memory, since the sample was taken."""
        for index, chunk, kept in self._kept:
            moved = self._tensors[index].data_ptr() != self._addresses[index]
            if moved or _bytes(chunk) != kept:
                return index
        return None
