"""Traps for what an ordinary training loop does and a worker must not do."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from mpisync.model.loss_scaling import ADVICE, is_in_scaler_step
from mpisync.model.write_sample import TensorSample

REMEDY = (
    "the root makes the updates, so what a worker writes never becomes part of the model. Load a checkpoint, or "
    "initialise, before Session; clamp and the like in a hook, optimizer.register_step_post_hook(hook), which the root "
    "runs after every update (only a change for one computation may be made, with own_copy=True: the next version "
    "overwrites it)"
)


class StepTrap:
    """A trap that makes the step() of optimizers and schedulers raise until it is undone.

    Args:
        stepped: Optimizers, and schedulers.
    """

    def __init__(self, *stepped: Any) -> None:  # noqa: ANN401 (as in torch)
        self._optimizers: list[tuple[Optimizer, Any]] = []
        self._schedulers: list[tuple[Any, type]] = []
        for one in stepped:
            if isinstance(one, Optimizer):
                # A scheduler has put a wrapper of its own there, in the instance: it must come back.
                self._optimizers.append((one, vars(one).get("step")))
                vars(one)["step"] = _optimizer_step
            else:
                # Its class, not its instance: state_dict() returns whatever the instance holds.
                kind = type(one)
                self._schedulers.append((one, kind))
                names = {"step": _scheduler_step, "__module__": kind.__module__}
                one.__class__ = type(kind.__name__, (kind,), names)

    def undo(self) -> None:
        """Put both step() back as they were; a second call does no harm."""
        while self._optimizers:
            optimizer, step = self._optimizers.pop()
            del vars(optimizer)["step"]
            if step is not None:
                vars(optimizer)["step"] = step
        while self._schedulers:
            scheduler, kind = self._schedulers.pop()
            scheduler.__class__ = kind

    def __enter__(self) -> StepTrap:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def _optimizer_step(*_: object, **__: object) -> NoReturn:
    if is_in_scaler_step():
        raise RuntimeError(
            f"scaler.step() on a worker: {ADVICE}. The root updates the parameters, from the mean of the accepted "
            "gradients"
        )
    raise RuntimeError(
        "optimizer.step() was called on a worker: the root updates the parameters, from the mean "
        "of the accepted gradients; delete this line, session.step(loss) takes its place"
    )


# A scheduler that is made while the trap is set looks for this mark before it wraps step().
_optimizer_step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def _scheduler_step(*_: object, **__: object) -> NoReturn:
    raise RuntimeError(
        "scheduler.step() was called on a worker: the root steps the scheduler, once a version; "
        "delete this line and pass it as Session(..., scheduler=scheduler)"
    )


class GroupWatch:
    """A watch for changes of an optimizer's param_groups by a worker, where they have no effect.

    Args:
        optimizer: Whose.
        where: Which one it is, in messages, where there are several.
    """

    def __init__(self, optimizer: Optimizer, where: str = "") -> None:
        self._optimizer, self._where = optimizer, where
        self.reset()

    def reset(self) -> None:
        """Take the groups as they are now for unchanged."""
        self._groups = [_settings(group) for group in self._optimizer.param_groups]
        self._members = [list(group["params"]) for group in self._optimizer.param_groups]
        self._state, self._hooks = self._optimizer.state, self._hooks_now()

    def _hooks_now(self) -> int:
        # torch's own names, which an optimizer that skips Optimizer.__init__ does not have
        before = getattr(self._optimizer, "_optimizer_step_pre_hooks", ())
        return len(before) + len(getattr(self._optimizer, "_optimizer_step_post_hooks", ()))

    def check(self) -> None:
        """Raise RuntimeError if a group, a hook or another state came, or a setting changed, since the last reset."""
        if self._optimizer.state is not self._state:
            raise RuntimeError(
                "the optimizer's state was replaced on a worker (load_state_dict, an assignment), where it has no "
                "effect: the root's optimizer makes the updates; load it before Session, on every rank, or in "
                "on_step=, which runs at the root"
            )
        if self._hooks_now() != self._hooks:
            raise RuntimeError(
                "a step hook was added to the optimizer or taken away on a worker, where none runs: the root's "
                "optimizer makes the updates; do it before Session, on every rank"
            )
        groups = self._optimizer.param_groups
        if len(groups) != len(self._groups):
            raise RuntimeError(
                f"the optimizer has {len(groups)} param_groups on a worker and had "
                f"{len(self._groups)} when the session began: add groups before Session, on "
                "every rank"
            )
        for index, (group, before) in enumerate(zip(groups, self._groups, strict=True)):
            same = len(group) == len(before) and all(map(operator.is_, group.values(), before.values()))
            for key, value in () if same else before.items():
                now = group.get(key, "nothing")
                if key != "params" and now is not value and not _same(now, value):
                    raise RuntimeError(
                        f"{self._where}param_groups[{index}][{key!r}] was changed from {value} to {now} on a "
                        "worker, where it has no effect: the root's optimizer makes the updates; "
                        "use Session(..., scheduler=scheduler), or change it in on_step=, which "
                        "runs at the root"
                    )
            members, kept = group["params"], self._members[index]
            if len(members) != len(kept) or not all(map(operator.is_, members, kept)):
                raise RuntimeError(
                    f"{self._where}param_groups[{index}]['params'] was changed on a worker: choose the "
                    "parameters before Session, on every rank"
                )


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in group.items()
    }


def _same(one: Any, other: Any) -> bool:  # noqa: ANN401
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return one is other or bool(one == other)


class WriteWatch:
    """A watch for user code that writes to parameters in place, as far as torch counts such writes.

    Writes through ``p.data`` or ``p.numpy()`` are not counted: `MemorySample` and `Binding.written` see those.

    Args:
        named: The parameters with their names.
        remedy: What to do instead, for the message.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]], remedy: str) -> None:
        self._names, self._parameters = zip(*named, strict=True)
        self._remedy = remedy
        self.reset()

    def reset(self) -> None:
        """Take the parameters as they are now for untouched."""
        self._versions = [parameter._version for parameter in self._parameters]

    def published(self) -> None:
        """Tell autograd that the parameters have changed: it cannot see it, for another process wrote them.

        So a graph that was built on an old version cannot be gone through at a new one, as in one process.
        """
        try:
            increment_version(self._parameters)
        except TypeError:  # before torch 2.6 it takes one at a time
            for parameter in self._parameters:
                increment_version(parameter)
        self._versions = [version + 1 for version in self._versions]

    def check(self) -> None:
        """Raise RuntimeError naming the first parameter that was written to."""
        versions = [parameter._version for parameter in self._parameters]
        if versions != self._versions:
            pairs = zip(versions, self._versions, strict=True)
            index = next(index for index, (now, before) in enumerate(pairs) if now != before)
            raise RuntimeError(
                f"parameter {self._names[index]!r} was written to in place on a worker: {self._remedy}"
            )


class FrozenWatch:
    """A watch for loops that move frozen parameters, such as a target network's: they never travel.

    Args:
        named: The frozen parameters with their names.
    """

    def __init__(self, named: Sequence[tuple[str, Tensor]]) -> None:
        self._names, self._tensors = [name for name, _ in named], [tensor for _, tensor in named]
        self._versions = [tensor._version for tensor in self._tensors]
        self._sample = TensorSample(self._tensors)

    def check(self) -> None:
        """Raise RuntimeError naming a frozen parameter that has changed since the last check."""
        if not self._tensors:
            return
        versions = [tensor._version for tensor in self._tensors]
        index = self._sample.written()
        if versions != self._versions:
            pairs = zip(versions, self._versions, strict=True)
            index = next(index for index, (now, before) in enumerate(pairs) if now != before)
        if index is not None:
            raise RuntimeError(
                f"frozen parameter {self._names[index]!r} was changed in the loop: it does not travel, so the ranks' "
                "copies of it come apart. Make it a buffer (module.register_buffer), which travels with each gradient "
                "and is averaged, as BatchNorm's statistics are; for an average of the parameters use ema="
            )
        self._sample.take()
