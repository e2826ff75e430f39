"""Tensors beside the gradients, as one run of bytes: module buffers.

Module buffers (BatchNorm's statistics) are private to a worker while it computes, travel with its
gradient, are averaged over the accepted ones, and come back with the parameters. Loading the
published bytes is also how a late step is undone.

Buffers keep their shape and dtype. One that is not persistent is no part of the model's state: where it is given
another shape, or taken away, it is a cache, and from then on that rank's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpisync.device.base import Array, aligned
from mpisync.model.signature import describe, plain_name
from mpisync.model.tensor_layout import flat_bytes, tensor_of

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

    def current(self) -> Tensor | None:
        """Return the tensor that the module has now, which may be a new one; None where it has become a cache.

        Raises:
            ValueError: It has another shape or dtype, or is gone, and is a part of the model's state.
        """
        tensor = getattr(self.owner, self.attribute, None)
        if isinstance(tensor, Tensor) and tensor.shape == self.shape and tensor.dtype == self.dtype:
            return tensor.data
        if self.attribute in self.owner._non_persistent_buffers_set:
            return None
        now = describe(tensor.shape, tensor.dtype) if isinstance(tensor, Tensor) else "gone"
        raise ValueError(
            f"buffer {self.name!r} was {describe(self.shape, self.dtype)} when the session began and is {now} now: a "
            "tensor that travels with the gradient keeps its shape and dtype. Register it with its final shape, or run "
            "one forward pass (model(x)) before Session, on every rank; if it is a cache, register it with "
            "persistent=False"
        )


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
        self._own: set[str] = set()  # caches: no longer the same on all ranks
        self._loaded: list[Tensor] = []  # what was published last
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
            Item(plain_name(name), owner, attribute, tensor.shape, tensor.dtype, self.size_bytes)
        )
        self.size_bytes += tensor.numel() * tensor.element_size()

    def views(self, packed: Array) -> list[Tensor]:
        """Return each tensor as a view of `packed`, `size_bytes` long and 64-byte aligned."""
        flat = tensor_of(packed, "uint8")
        views = []
        for item in self._items:
            count = item.shape.numel() * item.dtype.itemsize
            part = flat[item.offset : item.offset + count]
            views.append(part.view(item.dtype).view(item.shape))
        return views

    def pack(self, views: list[Tensor]) -> None:
        """Copy the module's present tensors into the bytes that `views` shows."""
        if views:
            with torch.no_grad():
                torch._foreach_copy_(views, self._current(self._loaded or views))

    def load(self, views: list[Tensor]) -> None:
        """Write the bytes that `views` shows into the module's tensors, in place."""
        if views:
            self._loaded = views
            with torch.no_grad():
                torch._foreach_copy_(self._current(views), views)

    def changed(self, views: list[Tensor]) -> list[str]:
        """Return the names of the module's tensors that are not, to the bit, what `views` shows."""
        pairs = zip(self._items, self._current(views), views, strict=True)
        return [item.name for item, now, view in pairs if not np.array_equal(flat_bytes(now), flat_bytes(view))]

    def _current(self, published: list[Tensor]) -> list[Tensor]:
        """Return the module's present tensors; for a cache that is this rank's own, what was published."""
        return [
            view if item.name in self._own else self._shared(item, view)
            for item, view in zip(self._items, published, strict=True)
        ]

    def _shared(self, item: Item, view: Tensor) -> Tensor:
        tensor = item.current()
        if tensor is None:
            self._own.add(item.name)
            warnings.warn(
                f"buffer {item.name!r}, which is not persistent, was {describe(item.shape, item.dtype)} when the "
                "session began and is not any more: it counts as a cache, and from now on every rank has its own",
                stacklevel=2,
            )
            return view
        return tensor

    def paired(self, views: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return the module's tensors that travel, each with its view; caches that are this rank's own are left out."""
        return [
            (getattr(item.owner, item.attribute), view)
            for item, view in zip(self._items, views, strict=True)
            if item.name not in self._own and item.current() is not None
        ]

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
