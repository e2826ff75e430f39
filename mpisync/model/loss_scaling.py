"""Gradients that a GradScaler has scaled and nobody has unscaled: noticed before they are sent as they are."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

# It comes first in the sentences, which are long.
ADVICE = (
    "write scaler.unscale_(optimizer); session.step(loss); scaler.update(), and no scaler.step(optimizer): a gradient "
    "that overflowed is then rejected, and its worker's scale shrinks"
)
_MARK = "_mpisync_is_scaled"
_watches: weakref.WeakSet[ScaleWatch] = weakref.WeakSet()
_originals: dict[str, Callable[..., Any]] = {}


class ScaleWatch:
    """A watch for gradients of an optimizer that a scaler has scaled since they were last unscaled.

    The gradients themselves do not tell. So while there is a watch, `GradScaler.scale` looks whether a trained
    parameter is in the graph of what it scales (the first one is found within a few nodes of the loss), and
    `GradScaler.unscale_` says that it was called. A class that has a `scale` of its own, not calling torch's, is not
    seen.

    Args:
        optimizer: The one whose gradients are sent.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._is_scaled = False
        _watches.add(self)
        _install()

    def check(self) -> None:
        """Raise RuntimeError if the gradients are scaled."""
        if self._is_scaled:
            raise RuntimeError(
                f"the gradient is still scaled: {ADVICE}. Without unscale_ it would be too large by the scaler's scale"
            )

    def undo(self) -> None:
        """Watch no longer; a second call does no harm."""
        _watches.discard(self)
        if not _watches:
            _uninstall()

    def scaled(self, outputs: Iterable[Tensor]) -> None:
        """Take note of what was scaled."""
        if not self._is_scaled:
            self._is_scaled = any(self._trains(output) for output in outputs)

    def unscaled(self, optimizer: Optimizer) -> None:
        """Take note of an optimizer whose gradients were unscaled."""
        if optimizer is self._optimizer:
            self._is_scaled = False

    def _trains(self, output: Tensor) -> bool:
        """Say whether a parameter of the optimizer's is in the graph of a tensor."""
        open_nodes, seen = [output.grad_fn], set()
        while open_nodes:
            node = open_nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if id(getattr(node, "variable", None)) in self._parameters:
                return True
            open_nodes += [before for before, _ in node.next_functions]
        return False


def refuse_scaled(loss: object) -> None:
    """Raise ValueError for a loss that came from `GradScaler.scale` while there was a watch."""
    if getattr(loss, _MARK, False):
        raise ValueError(f"the loss is scaled, and records would show that: pass what scaler.scale was given; {ADVICE}")


def _install() -> None:
    if not _originals:
        for name, wrapper in (("scale", _scale), ("unscale_", _unscale)):
            _originals[name] = original = getattr(GradScaler, name)
            setattr(GradScaler, name, functools.wraps(original)(wrapper))


def _uninstall() -> None:
    while _originals:
        setattr(GradScaler, *_originals.popitem())


def _scale(scaler: GradScaler, outputs: Any) -> Any:
    # torch scales other iterables lazily, when nobody would look any more
    outputs = outputs if isinstance(outputs, Tensor | list | tuple) else list(outputs)
    scaled = _originals["scale"](scaler, outputs)
    if scaler.is_enabled():
        tensors = list(_tensors(scaled))
        for tensor in tensors:
            setattr(tensor, _MARK, True)
        for watch in _watches:
            watch.scaled(tensors)
    return scaled


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    else:
        for output in outputs:
            yield from _tensors(output)


def _unscale(scaler: GradScaler, optimizer: Optimizer) -> None:
    _originals["unscale_"](scaler, optimizer)
    for watch in _watches:
        watch.unscaled(optimizer)


def is_in_scaler_step() -> bool:
    """Say whether an enabled GradScaler is among the callers of this code."""
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        frame, scaler = caller, caller.f_locals.get("self")
        if isinstance(scaler, GradScaler) and scaler.is_enabled():
            return True
    return False
