"""The learning-rate schedulers, stepped once a version: on the root, and on the workers for scripts that read it."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class Schedule:
    """Schedulers that are stepped once a version; make it before steps are forbidden, which it may do all the same.

    Args:
        schedulers: The user's; none if there are none.
        optimizers: Whose learning rates they set.
        by_metric: Those of them that are stepped by the script's own metric instead, whenever there is one.
    """

    def __init__(
        self, schedulers: Sequence[Any], optimizers: Sequence[Optimizer], by_metric: Sequence[Any] = ()
    ) -> None:
        self._by_metric = [(one, type(one).step) for one in by_metric]
        self._has_metric = False
        per_version = [one for one in schedulers if not any(one is other for other in by_metric)]
        self._schedulers = [(one, type(one).step, bool(_needed(one))) for one in per_version]
        # A scheduler that goes by the loss, or is none of torch's, may do more than set rates: the root's alone does.
        self._followed = [
            (one, step) for one, step, wants_loss in self._schedulers if isinstance(one, LRScheduler) and not wants_loss
        ]
        self._version = 0
        self._warned = False
        for optimizer in optimizers if schedulers else ():
            # Else torch warns where the first mean is refused, and on workers, whose optimizers never step.
            vars(optimizer)["_opt_called"] = True

    def advance(self, loss: float) -> None:
        """Step for a new version, made from gradients with this mean loss."""
        self._version += 1
        for scheduler, step, wants_loss in self._schedulers:
            if not wants_loss:
                step(scheduler)
            elif not math.isnan(loss):
                step(scheduler, loss)
            elif not self._warned:
                self._warned = True
                warnings.warn(
                    f"{type(scheduler).__name__} goes by the mean loss of the accepted gradients, but there is none "
                    "or it is NaN: it is not stepped; pass the loss to session.step(loss) on every worker",
                    stacklevel=2,
                )

    def measure(self, metric: float) -> None:
        """Step those that go by the script's metric."""
        self._has_metric = True
        for scheduler, step in self._by_metric:
            step(scheduler, metric)

    @property
    def lacks_metric(self) -> bool:
        """Whether schedulers that go by the metric were never stepped, for want of one."""
        return bool(self._by_metric) and not self._has_metric

    def lags(self, version: int) -> bool:
        """Say whether `follow` has something to do."""
        return version > self._version and bool(self._followed)

    def follow(self, version: int) -> None:
        """Step as often as the root has stepped its own."""
        for _ in range(version - self._version):
            for scheduler, step in self._followed:
                step(scheduler)
        self._version = version

    def state(self) -> dict[str, Any]:
        """Return the version that the schedulers are at, and their own states."""
        owners = (*self._schedulers, *self._by_metric)
        return {"version": self._version, "schedulers": [one.state_dict() for one, *_ in owners]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._version = state["version"]
        for (scheduler, *_), own in zip((*self._schedulers, *self._by_metric), state["schedulers"], strict=True):
            scheduler.load_state_dict(own)


def check_schedulers(
    schedulers: Sequence[Any], optimizers: Sequence[Optimizer], by_metric: Sequence[Any] = ()
) -> None:
    """Raise TypeError or ValueError for a scheduler that cannot be stepped once a version, or by the metric."""
    for scheduler in by_metric:
        if callable(getattr(type(scheduler), "step", None)) and not _needed(scheduler):
            raise ValueError(
                f"metric_scheduler is stepped by a metric, as ReduceLROnPlateau is, but {type(scheduler).__name__}"
                ".step takes none: give it as scheduler="
            )
    for index, scheduler in enumerate(schedulers):
        _check(scheduler, optimizers)
        if any(scheduler is before for before in schedulers[:index]):
            raise ValueError(
                f"the scheduler, {type(scheduler).__name__}, is given twice, and each is stepped once a version: give "
                "one for each optimizer"
            )


def _check(scheduler: Any, optimizers: Sequence[Optimizer]) -> None:  # noqa: ANN401
    name = type(scheduler).__name__
    if not callable(getattr(type(scheduler), "step", None)):
        raise TypeError(f"scheduler must have a step() as those of torch.optim.lr_scheduler, but {name} has none")
    needed = _needed(scheduler)
    if len(needed) > 1 or any("metric" not in word and "loss" not in word for word in needed):
        raise TypeError(
            f"{name}.step needs {', '.join(needed)}, and the session knows the mean loss only: step it in on_step=, "
            "which runs at the root after every update"
        )
    own = getattr(scheduler, "optimizer", None)
    if own is not None and not any(own is optimizer for optimizer in optimizers):
        raise ValueError(f"the scheduler, {name}, is of another optimizer than the session's: make it from that one")


def _needed(scheduler: Any) -> list[str]:  # noqa: ANN401
    """Return the arguments without which the scheduler's step() cannot be called."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    arguments = list(inspect.signature(type(scheduler).step).parameters.values())[1:]
    return [a.name for a in arguments if a.default is inspect.Parameter.empty and a.kind not in kinds]
