"""The place of each parameter in flat memory.

One segment per dtype; each tensor begins on a 64-byte boundary and keeps its own memory format.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from mpisync.device.base import ALIGNMENT, Array
from mpisync.kernels.dtypes import DTYPES
from mpisync.model.signature import plain_name


@dataclass(frozen=True)
class TensorLayout:
    """The place of one parameter."""

    name: str
    segment: int
    offset: int  # in elements
    count: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Views:
    """Flat segments, and each travelling tensor as a view of them."""

    segments: tuple[Tensor, ...]
    tensors: tuple[Tensor, ...]


def lay_out(
    trained: Sequence[tuple[str, Tensor]],
) -> tuple[tuple[tuple[str, int], ...], tuple[TensorLayout, ...]]:
    """Place tensors in one segment per dtype; the places come in the order of `trained`."""
    names = [str(tensor.dtype).removeprefix("torch.") for _, tensor in trained]
    for name, (parameter, _) in zip(names, trained, strict=True):
        if name not in DTYPES:
            raise TypeError(
                f"parameter {plain_name(parameter)!r} is {name}: use one of {', '.join(DTYPES)}"
            )
    present = [name for name in DTYPES if name in names]
    counts = dict.fromkeys(present, 0)
    places = []
    for name, (parameter, tensor) in zip(names, trained, strict=True):
        step = ALIGNMENT // DTYPES[name].itemsize
        stride = tensor.stride() if is_dense(tensor) else torch.empty(tensor.shape, device="meta").stride()
        places.append(
            TensorLayout(
                plain_name(parameter),
                present.index(name),
                counts[name],
                tensor.numel(),
                tuple(tensor.shape),
                tuple(stride),
            )
        )
        counts[name] += -(-tensor.numel() // step) * step
    return tuple(counts.items()), tuple(places)


def tensor_of(segment: Array | Tensor, dtype: str) -> Tensor:
    """Return a flat segment as a tensor; uint16 arrays hold a 16-bit `dtype`."""
    if isinstance(segment, Tensor):
        return segment
    if not isinstance(segment, np.ndarray):  # on a device
        tensor = from_dlpack(segment)
        return tensor.view(getattr(torch, dtype)) if tensor.dtype is torch.uint16 else tensor
    with warnings.catch_warnings():
        # Parameters may be mapped read-only, to find whoever writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(segment)
    return tensor.view(getattr(torch, dtype)) if tensor.dtype is torch.uint16 else tensor


def view_of(flat: Tensor, place: TensorLayout) -> Tensor:
    """Return the tensor at `place` in its flat segment."""
    return flat[place.offset : place.offset + place.count].as_strided(place.shape, place.stride)


def is_dense(tensor: Tensor) -> bool:
    """Say whether the elements fill their memory without gaps or overlaps, in any order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def flat_tensor(dense: Tensor) -> Tensor:
    """Return the memory of a dense tensor as a tensor of uint8."""
    return dense.detach().as_strided((dense.numel(),), (1,)).view(torch.uint8)


def flat_bytes(dense: Tensor) -> np.ndarray[Any, Any]:
    """Return the memory of a dense tensor as uint8; of one on a device, a copy."""
    array: np.ndarray[Any, Any] = flat_tensor(dense).cpu().numpy()
    return array


def refuse_overlaps(named: Sequence[tuple[str, Tensor]]) -> None:
    """Refuse parameters that share memory without being one Parameter: they would come apart."""
    spans = sorted((p.data_ptr(), p.numel() * p.element_size(), name) for name, p in named if p.numel())
    for (start, size, one), (later, _, other) in pairwise(spans):
        if later < start + size:
            raise ValueError(
                f"parameters {plain_name(one)!r} and {plain_name(other)!r} share memory and are "
                "two Parameters: tie them by assigning the same Parameter to both"
            )
