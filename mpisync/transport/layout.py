"""The layout of a gradient, or of a parameter version, in one run of bytes.

Both have the same shape: one segment per dtype, each starting on a 64-byte boundary, then `extras`: bytes that travel
with them unread (which parameters had a gradient, module buffers). Blocks are the pieces that messages carry, none
larger than BLOCK_BYTES, however large a segment or the extras are: MPI counts in 32 bits. A block never crosses a
segment's end, so that it can be folded by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mpisync.device.base import Array, aligned
from mpisync.kernels.dtypes import DTYPES, Dtype

BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Segment:
    """The part of one dtype: `count` elements, `offset` bytes from the start."""

    dtype: Dtype
    count: int
    offset: int

    @property
    def size_bytes(self) -> int:
        """The bytes of the elements, without padding."""
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class Block:
    """A piece that a message carries: elements `start` to `stop` of `segment`; segment -1 is the extras, in bytes."""

    segment: int
    start: int
    stop: int


@dataclass(frozen=True)
class SgdSpan:
    """The parameters that `fused_sgd_step` updates at one rate: elements `start` to `stop` of a segment."""

    segment: int
    start: int
    stop: int
    rate: float


@dataclass(frozen=True)
class Layout:
    """The segments and extras of a gradient or of a parameter version."""

    segments: tuple[Segment, ...]
    extras_bytes: int

    @classmethod
    def of(cls, segments: Sequence[tuple[str, int]], extras_bytes: int = 0) -> Layout:
        """Lay out (dtype name, count) pairs one after the other."""
        placed, offset = [], 0
        for name, count in segments:
            placed.append(Segment(DTYPES[name], count, offset))
            offset += aligned(placed[-1].size_bytes)
        return cls(tuple(placed), extras_bytes)

    @cached_property
    def extras_offset(self) -> int:
        """The offset at which the extras begin."""
        return sum(aligned(segment.size_bytes) for segment in self.segments)

    @cached_property
    def size_bytes(self) -> int:
        """The bytes in all, a multiple of the alignment."""
        return self.extras_offset + aligned(self.extras_bytes)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks in which messages carry the bytes; those of the extras, if any, are the last."""
        blocks: list[Block] = []
        for index, segment in enumerate(self.segments):
            blocks += _split(index, segment.count, BLOCK_BYTES // segment.dtype.itemsize)
        return (*blocks, *self.extras_blocks)

    @cached_property
    def extras_blocks(self) -> tuple[Block, ...]:
        """The blocks of the extras; none where there are none."""
        return tuple(_split(-1, self.extras_bytes, BLOCK_BYTES))

    @cached_property
    def wholes(self) -> tuple[Block, ...]:
        """Each segment as one block: what a fold uses when no gradient came in pieces."""
        return tuple(Block(i, 0, segment.count) for i, segment in enumerate(self.segments))

    def block_bytes(self, block: Block) -> int:
        """Return how many bytes `block` takes."""
        itemsize = 1 if block.segment < 0 else self.segments[block.segment].dtype.itemsize
        return (block.stop - block.start) * itemsize

    def view(self, memory: Array, block: Block) -> Array:
        """Return the elements of `block` in `memory`, a uint8 array of `size_bytes` laid out like this."""
        if block.segment < 0:
            return memory[self.extras_offset + block.start : self.extras_offset + block.stop]
        segment = self.segments[block.segment]
        first = segment.offset + block.start * segment.dtype.itemsize
        return memory[first : first + self.block_bytes(block)].view(segment.dtype.storage)

    def arrays(self, memory: Array) -> list[Array]:
        """Return each segment of `memory` as an array of its storage dtype."""
        return [self.view(memory, block) for block in self.wholes]

    def extras(self, memory: Array) -> Array:
        """Return the extras of `memory`, a uint8 view."""
        return memory[self.extras_offset : self.extras_offset + self.extras_bytes]


def _split(segment: int, count: int, step: int) -> list[Block]:
    return [Block(segment, start, min(start + step, count)) for start in range(0, count, step)]
