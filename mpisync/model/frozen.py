"""Frozen parameters on their way to all ranks: block by block, so that their size costs no second copy of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpisync.device.base import aligned

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def in_blocks(tensors: Sequence[Tensor], block: Bytes, *, takes: bool) -> Iterator[Bytes]:
    """Yield the tensors' values in `block`, as much at a time as it holds; as they are, whatever their strides.

    Args:
        tensors: Of any dtype, shape and strides; none is copied as a whole.
        block: 64-byte aligned bytes; each yield is its beginning.
        takes: Write into the tensors what the block holds after a yield, instead of the other way.
    """
    flat, pending, used = torch.from_numpy(block), list[tuple[Tensor, Tensor]](), 0
    for piece in (piece for tensor in tensors for piece in _pieces(tensor.data, block.size)):
        size = piece.numel() * piece.element_size()
        if used + size > block.size:
            yield from _pass(pending, block[:used], takes=takes)
            pending, used = [], 0
        pending.append((piece, flat[used : used + size].view(piece.dtype).view(piece.shape)))
        used += aligned(size)
    yield from _pass(pending, block[:used], takes=takes)


def _pass(pending: list[tuple[Tensor, Tensor]], filled: Bytes, *, takes: bool) -> Iterator[Bytes]:
    """Copy the pieces into their views of the block, or back from them, around the yield of the block."""
    if not pending:
        return
    pieces, views = (list(side) for side in zip(*pending, strict=True))
    if not takes:
        torch._foreach_copy_(views, pieces)
    yield filled
    if takes:
        torch._foreach_copy_(pieces, views)


def _pieces(tensor: Tensor, most_bytes: int) -> Iterator[Tensor]:
    """Cut a tensor along its first dimensions into views that take so many bytes each at most."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return
    if size <= most_bytes:
        yield tensor
        return
    rows = most_bytes * len(tensor) // size
    if rows:
        for start in range(0, len(tensor), rows):
            yield tensor[start : start + rows]
    else:
        for row in tensor:
            yield from _pieces(row, most_bytes)
