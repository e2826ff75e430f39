"""Private copies of a model with the values of one version: its state_dict, and a twin that computes."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpisync.model.attributes import attributes
from mpisync.model.looks import unwatched

Values = Sequence[tuple[Tensor, Tensor]]
"""Tensors of a model, each with the value that it has in a version."""

_HOST = torch.device("cpu")
_LOCKS: dict[type, Callable[[], object]] = {type(make()): make for make in (threading.Lock, threading.RLock)}
_MOST = 1000  # objects that cannot be copied: more are made anew at each attempt


def state_of(model: nn.Module, values: Values, home: torch.device = _HOST) -> dict[str, Any]:
    """Return the model's own state_dict with these values.

    Every tensor has memory of its own on `home`, and no more than it needs; tied ones share it.
    """
    with unwatched(model):
        return _state_of(model, {id(tensor): value for tensor, value in values}, home)


def _state_of(model: nn.Module, new: Mapping[int, Tensor], home: torch.device) -> dict[str, Any]:
    tensors = [*model.parameters(), *model.buffers()]
    own = [tensor.data for tensor in tensors]
    private = [new.get(id(tensor), tensor).detach().to(home, copy=True) for tensor in tensors]
    try:
        # The values are lent to the model, so that its hooks and its own state_dict see nothing else.
        for tensor, value in zip(tensors, private, strict=True):
            tensor.data = value
        state: dict[str, Any] = model.state_dict()
    finally:
        for tensor, value in zip(tensors, own, strict=True):
            tensor.data = value
    kept = {value.untyped_storage().data_ptr() for value in private}
    copies: dict[tuple[object, ...], Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            state[name] = _copied(value, {})
        elif not _is_whole(value, kept):
            place = value.data_ptr(), value.shape, value.stride(), value.dtype
            state[name] = copies.setdefault(place, value.detach().clone())
    return state


def _is_whole(value: Tensor, kept: set[int]) -> bool:
    """Say whether a value is all of a private tensor."""
    storage = value.untyped_storage()
    return storage.data_ptr() in kept and storage.nbytes() == value.numel() * value.element_size()


def copy_of(model: nn.Module, values: Values, home: torch.device = _HOST) -> nn.Module:
    """Return a private copy of the model that computes with these values, on the device `home`.

    What was computed and kept (an activation) is copied without its graph, a lock is made anew; other objects that
    cannot be copied are shared with the model, which a warning names.

    Raises:
        TypeError: A module cannot be copied.
    """
    with unwatched(model):
        return _copy_of(model, values, home)


def _copy_of(model: nn.Module, values: Values, home: torch.device) -> nn.Module:
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers(), *(value for _, _, value in attributes(model))):
        if isinstance(tensor, Tensor):
            memo[id(tensor)] = copy.deepcopy(tensor, memo) if tensor.is_leaf else tensor.detach().clone()
    twin: nn.Module = _copied(model, memo)
    # By name: a module's own __deepcopy__ may know nothing of the memo.
    names, theirs = {id(tensor): name for name, tensor in _named(model)}, dict(_named(twin))
    with torch.no_grad():
        for tensor, value in values:
            if id(tensor) not in names:
                raise RuntimeError(
                    f"a tensor of the model, {list(tensor.shape)}, was taken out of it or replaced since the session "
                    "began, so there is no copy of this version: change the model before Session, on every rank"
                )
            theirs[names[id(tensor)]].data.copy_(value)
    for tensor in theirs.values():
        tensor.data = tensor.data.to(home)  # nothing, but for a model whose parameters are elsewhere meanwhile
    return twin


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _copied(original: Any, memo: dict[int, Any]) -> Any:  # noqa: ANN401 (as copy.deepcopy)
    """Return a deep copy, in which a stand-in takes the place of each object that cannot be copied."""
    stand_ins: dict[int, Any] = {}
    shared: list[object] = []
    while True:
        try:
            twin = copy.deepcopy(original, {**memo, **stand_ins})
            break
        except Exception as error:
            culprit = _culprit(error)
            if culprit is None or isinstance(culprit, nn.Module) or len(stand_ins) == _MOST:
                raise TypeError(
                    f"{_what(original, culprit)} cannot be copied ({error}), so the session can give no snapshot: give "
                    "its class a __deepcopy__, or evaluate on the values of session.state_dict()"
                ) from error
            shared.append(culprit)
            stand_ins[id(culprit)] = _stand_in(culprit)
    odd = [_what(original, one) for one in shared if stand_ins[id(one)] is one]
    if odd:
        warnings.warn(
            f"a snapshot shares with the model what cannot be copied: {', '.join(odd)}; if it must have its own, make "
            "it in forward, or give the class that holds it a __deepcopy__",
            stacklevel=2,
        )
    return twin


def _culprit(error: Exception) -> object:
    """Return the object that copy.deepcopy had in hand when it failed; None where it was none."""
    found, trace = None, error.__traceback__
    while trace is not None and not isinstance(error, RecursionError):
        if trace.tb_frame.f_code is copy.deepcopy.__code__:
            found = trace.tb_frame.f_locals["x"]
        trace = trace.tb_next
    return found


def _stand_in(culprit: object) -> object:
    if isinstance(culprit, Tensor):
        return culprit.detach().clone()
    return _LOCKS[type(culprit)]() if type(culprit) in _LOCKS else culprit


def _what(original: object, culprit: object) -> str:
    """Say an object's place in the model, and its type."""
    kind = f"{type(culprit).__module__}.{type(culprit).__name__}".removeprefix("builtins.")
    if isinstance(original, nn.Module):
        for name, module in original.named_modules():
            if module is culprit:
                return f"module {name!r} (a {kind})" if name else f"the model (a {kind})"
        for path, _, value in attributes(original):
            if value is culprit:
                return f"{path!r} (a {kind})"
    return f"a {kind}"
