"""Tensors beside the gradients, as one run of bytes: module buffers and frozen parameters.

Module buffers (BatchNorm's statistics) are private to a worker while it computes, travel with its
gradient, are averaged over the accepted ones, and come back with the parameters. Loading the
published bytes is also how a late step is undone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpisync.transport.layout import aligned

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of norms, users' own too
CHUNK_BYTES = 1 << 18  # of one mean: temporaries stay in cache, and constants are skipped in pieces


@dataclass(frozen=True)
class Item:
    """One tensor: where it is in the module, and where in the bytes."""

    name: str
    owner: nn.Module
    attribute: str
    shape: torch.Size
    dtype: torch.dtype
    offset: int

    def current(self) -> Tensor:
        """Return the tensor that the module has now; modules may assign a new one."""
        tensor: Tensor = getattr(self.owner, self.attribute)
        if tensor.shape != self.shape or tensor.dtype != self.dtype:
            raise ValueError(
                f"{self.name!r} was {describe(self.shape, self.dtype)} when the session began and "
                f"is {describe(tensor.shape, tensor.dtype)} now: a tensor that travels with the "
                "gradient keeps its shape and dtype; register it with its final shape"
            )
        return tensor.data


class PackedTensors:
    """Tensors of a module, packed by dtype, in the order that they have in the module.

    Attributes:
        size_bytes: What they take, fixed from the beginning.
    """

    def __init__(self, model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
        by_dtype: dict[torch.dtype, list[tuple[str, Tensor]]] = {}
        for name, tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append((name, tensor))
        self._items: list[Item] = []
        self._runs: list[tuple[torch.dtype, int, int]] = []  # dtype, first byte, last byte + 1
        self.size_bytes = 0
        for dtype, members in sorted(by_dtype.items(), key=lambda pair: str(pair[0])):
            begin = self.size_bytes
            for name, tensor in members:
                self._place(model, name, tensor)
            self._runs.append((dtype, begin, self.size_bytes))
            self.size_bytes = aligned(self.size_bytes)

    def _place(self, model: nn.Module, name: str, tensor: Tensor) -> None:
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        self._items.append(
            Item(name, owner, attribute, tensor.shape, tensor.dtype, self.size_bytes)
        )
        self.size_bytes += tensor.numel() * tensor.element_size()

    def views(self, packed: Bytes) -> list[Tensor]:
        """Return each tensor as a view of `packed`, `size_bytes` long and 64-byte aligned."""
        flat = torch.from_numpy(packed)
        views = []
        for item in self._items:
            count = item.shape.numel() * item.dtype.itemsize
            part = flat[item.offset : item.offset + count]
            views.append(part.view(item.dtype).view(item.shape))
        return views

    @torch.no_grad()
    def pack(self, views: list[Tensor]) -> None:
        """Copy the module's present tensors into the bytes that `views` shows."""
        if views:
            torch._foreach_copy_(views, [item.current() for item in self._items])

    @torch.no_grad()
    def load(self, views: list[Tensor]) -> None:
        """Write the bytes that `views` shows into the module's tensors, in place."""
        if views:
            torch._foreach_copy_([item.current() for item in self._items], views)

    def average(self, target: Bytes, packed: Sequence[Bytes]) -> None:
        """Write the mean of `packed` to `target`, which may be one of them.

        Floats on which all agree stay exactly as they are, so that constants (an attention mask's
        -inf, rotary tables) never drift. Integers and bools come from the first.
        """
        for dtype, begin, end in self._runs:
            mean = dtype.is_floating_point or dtype.is_complex
            for start in range(begin, end, CHUNK_BYTES):
                stop = min(start + CHUNK_BYTES, end)
                parts = [one[start:stop] for one in packed]
                if mean and not all(np.array_equal(part, parts[0]) for part in parts[1:]):
                    target[start:stop] = _mean(parts, dtype)
                else:
                    target[start:stop] = parts[0]


    def differing(self, packed: Sequence[Bytes]) -> list[str]:
        """Return the names of tensors that differ in `packed` and are no running statistics, as far as one can tell."""
        names = []
        for item in self._items:
            end = item.offset + item.shape.numel() * item.dtype.itemsize
            parts = [one[item.offset : end] for one in packed]
            known = type(item.owner).__module__.startswith("torch.") or item.attribute in _STATISTICS
            if not known and not all(np.array_equal(part, parts[0]) for part in parts[1:]):
                names.append(item.name)
        return names


def _mean(parts: Sequence[Bytes], dtype: torch.dtype) -> Bytes:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    stacked = torch.stack([torch.from_numpy(part).view(dtype).to(wide) for part in parts])
    first = stacked[0]
    mean = torch.where((stacked == first).all(0), first, stacked.mean(0))
    return mean.to(dtype).view(torch.uint8).numpy()


def describe(shape: Sequence[int], dtype: torch.dtype | str) -> str:
    """Say a tensor's shape and dtype: '[10, 64] float32'."""
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"
