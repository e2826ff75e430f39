"""A number by which workers that draw the same batches are noticed."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpisync.data.batch_size import parts_of

_ALWAYS, _THEN_EVERY = 64, 8  # batches
_LEAVES = 16  # tensors, arrays, strings and numbers of a batch that are looked at
_ELEMENTS = 256  # of each
_DEEPEST = 6
_KINDS = (Tensor, np.ndarray, np.generic, str, bytes, int, float, complex)


def fingerprint(batch: Any, sequence: int) -> int:  # noqa: ANN401 (a batch is whatever the loader yields)
    """Return 32 bits that follow from a sample of what is in a batch.

    Args:
        batch: Whatever the loader has yielded.
        sequence: The batch's number. Later ones are looked at now and then only.

    Returns:
        0 for a batch that was not looked at, or that has nothing to go by.

    Example:
        >>> fingerprint((torch.ones(2), "a"), 0) == fingerprint([torch.ones(2), "a"], 7) != fingerprint("a", 0)
        True
    """
    if sequence >= _ALWAYS and sequence % _THEN_EVERY:
        return 0
    value = 0
    for leaf in _leaves(batch):
        value = zlib.crc32(_sample(leaf), value)
    return value


def _leaves(batch: Any) -> list[Any]:  # noqa: ANN401
    """Return the first tensors, arrays, strings and numbers in a batch."""
    found: list[Any] = []
    _collect(batch, 0, found)
    return found[:_LEAVES]


def _collect(part: Any, depth: int, found: list[Any]) -> None:  # noqa: ANN401
    if type(part) is Tensor or isinstance(part, _KINDS):
        found.append(part)
    elif depth < _DEEPEST:
        for inner in part if type(part) in (tuple, list) else parts_of(part) or getattr(part, "__dict__", {}).values():
            _collect(inner, depth + 1, found)
            if len(found) >= _LEAVES:
                return


def _sample(leaf: Any) -> Any:  # noqa: ANN401 (whatever zlib takes)
    if isinstance(leaf, Tensor):
        try:
            if leaf.requires_grad:
                leaf = leaf.detach()
            leaf = (leaf.view(torch.int16) if leaf.dtype is torch.bfloat16 else leaf).numpy()
        except (RuntimeError, TypeError):  # sparse, nested, on a device: nothing here to look into
            return b""
    if isinstance(leaf, np.ndarray):
        if leaf.dtype.hasobject:
            return b""
        if leaf.size > _ELEMENTS:  # an odd stride: an even one meets the same column of every image
            flat = leaf.reshape(-1) if leaf.flags.c_contiguous else leaf.flat
            return flat[:: leaf.size // _ELEMENTS | 1].tobytes()
        return leaf.tobytes()
    if isinstance(leaf, bytes):
        return leaf[:_ELEMENTS]
    return str(leaf)[:_ELEMENTS].encode("utf-8", "replace")
