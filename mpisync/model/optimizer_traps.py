"""What only the root's optimizer can answer or do: a worker that asks its own is told so.

The root's optimizer alone makes updates, so a worker's has no state. Some optimizers also move the parameters outside
of step(): schedule-free ones train at one point and are to be evaluated at another; train() and eval() go between.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from torch.optim import Optimizer

_STATE = (
    "its state is empty or old, for the root's optimizer makes the updates: take session.state_dict()['optimizer'] on "
    "the last rank, in on_step= or after the loop"
)
_MODE = (
    "this optimizer's other point follows from its state, which the root's alone has: look at it in a hook, "
    "optimizer.register_step_post_hook(hook), where the root may call eval(), then look, then train(), before it "
    "publishes a version; after the session call eval() on the last rank, and take the parameters from there"
)
_ASKED = {
    "state_dict": _STATE,
    "load_state_dict": "it has no effect there, for the root's optimizer makes the updates: load checkpoints before "
    "Session, on every rank",
    "train": _MODE,
    "eval": _MODE,
}


def layers(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Yield the optimizer, and those that it wraps as `optimizer`."""
    seen: list[object] = []
    while isinstance(optimizer, Optimizer) and not any(optimizer is one for one in seen):
        yield optimizer
        seen.append(optimizer)
        optimizer = vars(optimizer).get("optimizer")  # type: ignore[assignment]


def check_mode(optimizer: Optimizer) -> None:
    """Raise ValueError for an optimizer that is not ready to step."""
    if _mode(optimizer) is False:
        raise ValueError(
            f"{type(optimizer).__name__} is in the mode for evaluation, in which it does not train: call "
            "optimizer.train() before Session, on every rank"
        )


def _mode(optimizer: Optimizer) -> bool | None:
    """Say whether the optimizer is in the mode for training; None where it knows no modes."""
    for one in layers(optimizer):
        for holder in (*one.param_groups, vars(one)):
            if isinstance(mode := holder.get("train_mode"), bool):
                return mode
    return None


class OptimizerTrap:
    """A trap on a worker for what only the root's optimizer can answer or do, until it is undone.

    Afterwards the first state_dict() or eval() warns: these are what a script calls at its end.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._has_modes = _mode(optimizer) is not None
        self._before = [(one, dict(vars(one))) for one in layers(optimizer)]
        for one, before in self._before:
            for name, why in _ASKED.items():
                if callable(getattr(one, name, None)):
                    vars(one)[name] = _refusal(f"optimizer.{name}() was called", why)
            if "state" in before:
                vars(one)["state"] = _AskedState()

    def undo(self) -> None:
        """Give the optimizer back; a second call does no harm."""
        for one, before in self._before:
            for name in (*_ASKED, "state"):
                vars(one).pop(name, None)
                if name in before:
                    vars(one)[name] = before[name]
        for one, _ in self._before[:1]:
            for name in ("state_dict", "eval") if self._has_modes else ("state_dict",):
                vars(one)[name] = _warning(one, name, _ASKED[name])
        self._before = []


def _refusal(what: str, why: str) -> Callable[..., NoReturn]:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise RuntimeError(f"{what} on a worker: {why}")

    return refuse


def _warning(optimizer: Optimizer, name: str, why: str) -> Callable[..., Any]:
    def warn(*positional: object, **named: object) -> object:
        vars(optimizer).pop(name, None)
        warnings.warn(f"optimizer.{name}() was called on a rank that was a worker: {why}", stacklevel=2)
        return getattr(optimizer, name)(*positional, **named)

    return warn


_READS = ("__getitem__", "__iter__", "__len__", "__contains__", "get", "items", "keys", "values", "setdefault")
_AskedState = type("_AskedState", (dict,), dict.fromkeys(_READS, _refusal("optimizer.state was read", _STATE)))
