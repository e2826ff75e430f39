"""The parameters of a model and the memory that its versions appear in: bound to it, or detached from it to be seen.

Bound parameters are views of one run of memory, which others may write to and which a copy of one view drags along.
Whoever looks gets them detached: each with memory of its own, all of one version, until the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mpisync.model.flat import FlatModel
from mpisync.model.looks import Looks
from mpisync.model.modes import ordinary_mode
from mpisync.model.tensor_layout import Views

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Binding:
    """The parameters of a model, detached at first.

    Args:
        model: Compiled or not.
        flat: Its parameters.
        views: Of the memory that versions appear in.
        copy: Returns copies of the views, all of one version.

    Attributes:
        is_detached: Whether the parameters have memory of their own, as they have at first and after a look.
    """

    def __init__(self, model: nn.Module, flat: FlatModel, views: Views, copy: Callable[[], Sequence[Tensor]]) -> None:
        self._flat, self._views, self._copy = flat, views, copy
        self.is_detached = True
        self._shown: Sequence[Tensor] = [parameter.data for parameter in flat.parameters]
        self._turn = 0
        self._looks = Looks(model, self.detach)

    def bind(self) -> None:
        """Show the memory: what was written to detached parameters is lost."""
        if self.is_detached:
            self._flat.bind(self._views)
            self._shown, self.is_detached = self._views.tensors, False

    def load(self) -> None:
        """Copy the memory into the detached parameters."""
        self._flat.load(self._views)

    def detach(self) -> None:
        """Give the parameters memory of their own, with the values of one version."""
        if self.is_detached:
            return
        with ordinary_mode(), torch.no_grad():
            self.show(self._copy())

    def show(self, values: Sequence[Tensor]) -> None:
        """Give the parameters these tensors, which nobody else has."""
        self._flat.detach(values)
        self._shown, self.is_detached = values, True

    def check_memory(self) -> None:
        """Raise RuntimeError where a parameter was given other memory; another parameter is looked at each time."""
        # What replaces memory (model.to, model.half) replaces all of it, so one at a time is enough.
        self._turn = (self._turn + 1) % len(self._shown)
        if self._flat.parameters[self._turn].data_ptr() != self._shown[self._turn].data_ptr():
            raise RuntimeError(_moved(self._flat.names[self._turn]))

    def written(self) -> list[str]:
        """Return the names of the detached parameters that differ, by a bit, from the memory."""
        pairs = zip(self._flat.names, self._flat.parameters, self._views.tensors, strict=True)
        return [name for name, parameter, view in pairs if not _equal(name, parameter.data, view, self._flat.home)]

    def end(self) -> None:
        """Leave the parameters with memory of their own and the values that they have, and end the watch."""
        self._looks.undo()
        self._flat.unbind()
        self._shown = ()  # the script's now: whoever counts who else looks into its memory must not find us


def _equal(name: str, one: Tensor, other: Tensor, home: torch.device) -> bool:
    """Say whether two tensors have the same bits: a NaN equals itself, and 0 is not -0."""
    if one.shape != other.shape or one.dtype is not other.dtype or one.device not in (other.device, home):
        raise RuntimeError(_moved(name))
    bits = _BITS[one.itemsize]
    return torch.equal(one.view(bits).to(other.device), other.view(bits))


def _moved(name: str) -> str:
    return (
        f"parameter {name!r} was given other memory in the loop (model.to(), model.half(), an assignment to .data), so "
        "it no longer follows the run: do that before Session"
    )
