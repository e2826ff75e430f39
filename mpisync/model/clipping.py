"""Clipping in a worker's loop, of its own gradient: told once, for the mean is another thing to clip."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad

# What torch's functions call when they clip (since 2.6 one for the other), and the arguments that say how much.
_CLIPPING = {
    "clip_grad_norm_": "max_norm",
    "_clip_grads_with_norm_": "max_norm",
    "clip_grad_value_": "clip_value",
}
_INSIDE = "_group_tensors_by_device_and_dtype"
_watches: weakref.WeakSet[ClipWatch] = weakref.WeakSet()
_originals: list[Callable[..., Any]] = []


class ClipWatch:
    """A watch for ``torch.nn.utils.clip_grad_norm_`` and ``clip_grad_value_``, which tells once what they do here.

    It stands in for a function that all of them call from their module's globals, so it does not matter how the script
    has imported them. Where a torch has no such function nothing is told.

    Args:
        parameters: Clipping the gradients of others is nobody's business.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        if not _originals and hasattr(clip_grad, _INSIDE):
            _originals.append(getattr(clip_grad, _INSIDE))
            setattr(clip_grad, _INSIDE, _group)
        _watches.add(self)

    def undo(self) -> None:
        """Watch no longer; a second call does no harm."""
        _watches.discard(self)
        if not _watches and _originals:
            setattr(clip_grad, _INSIDE, _originals.pop())

    def meet(self, frame: FrameType, gradients: Iterable[object]) -> None:
        """Tell what the clipping in `frame` does, if it is of the session's gradients, and watch no longer."""
        limit = float(frame.f_locals[_CLIPPING[frame.f_code.co_name]])
        own = {id(parameter.grad) for parameter in self._parameters if parameter.grad is not None}
        if not math.isfinite(limit) or not any(id(gradient) in own for gradient in gradients):
            return  # an infinite one only measures
        by_value = frame.f_code.co_name == "clip_grad_value_"
        name, option = ("clip_grad_value_", "clip_value") if by_value else ("clip_grad_norm_", "clip_norm")
        print(
            f"mpisync: {name} in the loop clips each worker's own gradient, before the mean is taken, which is another "
            f"thing than clipping the mean: for that, delete the line and pass Session(..., {option}={limit:g})",
            file=sys.stderr,
            flush=True,
        )
        self._parameters = []


def _group(tensors: Any, *args: Any, **options: Any) -> Any:
    # a compiler cannot follow frames, and needs nothing of it
    frame = None if torch.compiler.is_compiling() else sys._getframe(1)
    if frame is not None and frame.f_code.co_name in _CLIPPING:  # else a norm is measured
        for watch in list(_watches):
            watch.meet(frame, tensors[0])
    return _originals[-1](tensors, *args, **options)
