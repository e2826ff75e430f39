"""Flat buffers of a model: the only place that knows which tensor lies where.

Parameters that are trained travel, tied ones once. They are laid out in segments, one per dtype,
each tensor on a 64-byte boundary and in its own memory format; what lies between is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mpisync.device.base import Array
from mpisync.kernels import fold
from mpisync.model.gradients import GradientCopier, PackKernel
from mpisync.model.packed_tensors import PackedTensors
from mpisync.model.signature import plain_name, signature
from mpisync.model.tensor_layout import Views, lay_out, refuse_overlaps, tensor_of, view_of


class Packed(NamedTuple):
    """The properties of a packed gradient, which its worker tells the root."""

    presence: bytes  # one byte per travelling parameter: 1 where it had a gradient
    peak: float  # the largest magnitude; inf where an element is not finite


class FlatModel:
    """A model as flat memory.

    Args:
        model: Whose parameters.
        on_host: Whether gradients are packed by the host's kernels; else by torch, on their device.

    Attributes:
        names: The parameters that travel, in a fixed order.
        parameters: The Parameter objects themselves; optimizers hold them too.
        places: Where each of them lies.
        segments: (dtype name, count of elements) of each segment, padding included.
        buffers: The module buffers, packed.
        home: The device that the model is on.
        frozen: The parameters that are not trained, with their names; they travel once, when the session begins.
    """

    def __init__(self, model: nn.Module, *, on_host: bool = True) -> None:
        named = list(model.named_parameters())
        trained = [(name, p) for name, p in named if p.requires_grad]
        refuse_overlaps(named)
        self.parameters = tuple(p for _, p in trained)
        self.segments, self.places = lay_out(trained)
        self.names = tuple(place.name for place in self.places)
        self.buffers = PackedTensors(model, model.named_buffers())
        self.frozen = [(plain_name(name), p) for name, p in named if not p.requires_grad]
        strides = {
            name: place.stride for (name, _), place in zip(trained, self.places, strict=True)
        }
        self.home = self.parameters[0].device if self.parameters else torch.device("cpu")
        self._copier = GradientCopier(self.segments, self.places, on_host=on_host)
        self._signature = signature(model, strides)
        self._bound = False
        self._gradients: tuple[Tensor, ...] = ()
        self._casts: Views | None = None

    def signature(self) -> bytes:
        """Return the canonical description of the model, equal on ranks that fit together."""
        return self._signature

    def views(self, segments: Sequence[Array | Tensor]) -> Views:
        """Return views of flat memory: one 1-D array or tensor per segment.

        16-bit segments may come as uint16 arrays; a segment may also be of another dtype than the
        parameters (an accumulator), and the views are then of that dtype.
        """
        flat = tuple(
            tensor_of(segment, name)
            for segment, (name, _) in zip(segments, self.segments, strict=True)
        )
        for tensor, (name, count) in zip(flat, self.segments, strict=True):
            if tensor.shape != (count,):
                raise ValueError(
                    f"the {name} segment has {count} elements, not {list(tensor.shape)}"
                )
        return Views(flat, tuple(view_of(flat[place.segment], place) for place in self.places))

    def zeros(self) -> Views:
        """Return new private segments of the host's memory in the parameters' dtypes."""
        return self.views(
            [torch.zeros(count, dtype=getattr(torch, name), device="cpu") for name, count in self.segments]
        )

    # --- parameters ---------------------------------------------------------------------------

    def bind(self, views: Views) -> None:
        """Make every travelling parameter a view of shared memory, whose values it takes."""
        self._show(views.tensors)
        self._bound = True

    def detach(self, copies: Sequence[Tensor]) -> None:
        """Give the parameters tensors of their own; gradients stay as they are."""
        self._show(copies)
        self._bound = False

    def _show(self, tensors: Sequence[Tensor]) -> None:
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            parameter.data = tensor

    def unbind(self) -> None:
        """Make parameters and gradients private again, with the values they have now, on the model's own device."""
        for parameter, gradient in zip(self.parameters, self._gradients, strict=False):
            if parameter.grad is gradient:
                parameter.grad = None
        self._gradients, self._casts = (), None
        self._copier.forget()
        if self._bound:
            for parameter in self.parameters:
                parameter.data = parameter.data.to(self.home, copy=True)
        self._bound = False

    @torch.no_grad()
    def load(self, views: Views) -> None:
        """Copy flat memory into the parameters."""
        torch._foreach_copy_([p.data for p in self.parameters], list(views.tensors))

    @torch.no_grad()
    def store(self, views: Views) -> None:
        """Copy the parameters into flat memory."""
        torch._foreach_copy_(list(views.tensors), [p.data for p in self.parameters])

    def paired(self, parameters: Sequence[Tensor], buffers: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return each parameter that travels, and each module buffer, with its value in one version."""
        pairs = zip(self.parameters, parameters, strict=True)
        return [*pairs, *self.buffers.paired(buffers)]

    # --- gradients ----------------------------------------------------------------------------

    def pack_gradients(self, slot: Views, kernel: PackKernel = fold.pack) -> Packed:
        """Move the gradients into `slot`: afterwards the parameters have none.

        So a left-over zero_grad() is harmless, and accumulation starts anew.

        Args:
            slot: Views of the memory that the root reads.
            kernel: Copies and checks large tensors: the `pack` of a `Reducer` with more threads.
        """
        self.refuse_thawed()
        gradients = [parameter.grad for parameter in self.parameters]
        for name, gradient in zip(self.names, gradients, strict=True):
            if gradient is not None and gradient.layout is not torch.strided:
                raise TypeError(
                    f"the gradient of parameter {name!r} is sparse: sparse gradients are not "
                    "supported; use Embedding(sparse=False)"
                )
        with torch.no_grad():  # gradients may have a graph of their own
            peak = self._copier.copy(gradients, slot, kernel)
        for parameter in self.parameters:
            parameter.grad = None
        return Packed(bytes(gradient is not None for gradient in gradients), peak)

    def refuse_thawed(self) -> None:
        """Raise RuntimeError if a parameter that is not trained has a gradient."""
        for name, parameter in self.frozen:
            if parameter.grad is not None:
                raise RuntimeError(
                    f"parameter {name!r} was frozen when the session began and has a gradient now: set requires_grad "
                    "before Session; what is to be trained later may be trained from the beginning, or frozen inside "
                    "session.batches"
                )

    def assign_gradients(self, mean: Views, presence: bytes) -> None:
        """Give the parameters the mean gradient, and None where `presence` has a 0.

        `mean` is in the accumulator's dtype: views of it where that is the parameter's own (no
        copy), else copies cast to it.
        """
        self._gradients = self._cast(mean)
        for parameter, gradient, present in zip(
            self.parameters, self._gradients, presence, strict=True
        ):
            parameter.grad = gradient if present else None

    def _cast(self, mean: Views) -> tuple[Tensor, ...]:
        kinds = [getattr(torch, name) for name, _ in self.segments]
        same = [flat.dtype is kind for flat, kind in zip(mean.segments, kinds, strict=True)]
        if self._casts is None:
            self._casts = self.views(
                [
                    flat if equal else torch.zeros(len(flat), dtype=kind, device=flat.device)
                    for flat, kind, equal in zip(mean.segments, kinds, same, strict=True)
                ]
            )
        for flat, cast, equal in zip(mean.segments, self._casts.segments, same, strict=True):
            if not equal:
                cast.copy_(flat)
        pairs = zip(self.places, mean.tensors, self._casts.tensors, strict=True)
        return tuple(own if same[place.segment] else cast for place, own, cast in pairs)
