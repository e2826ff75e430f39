"""The learning-rate scheduler, stepped once a version: on the root, and on the workers for scripts that read it."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class Schedule:
    """A scheduler that is stepped once a version; make it before steps are forbidden, which it may do all the same.

    Args:
        scheduler: The user's; None if there is none.
        optimizer: Whose learning rates it sets.
    """

    def __init__(self, scheduler: Any | None, optimizer: Optimizer) -> None:  # noqa: ANN401 (as in torch)
        self._scheduler = scheduler
        self._wants_loss = scheduler is not None and bool(_needed(scheduler))
        self._step: Any = None if scheduler is None else type(scheduler).step
        self._version = 0
        self._warned = False
        if scheduler is not None:
            # Else torch warns where the first mean is refused, and on workers, whose optimizers never step.
            vars(optimizer)["_opt_called"] = True

    def advance(self, loss: float) -> None:
        """Step for a new version, made from gradients with this mean loss."""
        self._version += 1
        if self._scheduler is None:
            return
        if not self._wants_loss:
            self._step(self._scheduler)
        elif not math.isnan(loss):
            self._step(self._scheduler, loss)
        elif not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self._scheduler).__name__} goes by the mean loss of the accepted gradients, but there is none "
                "or it is NaN: it is not stepped; pass the loss to session.step(loss) on every worker",
                stacklevel=2,
            )

    def lags(self, version: int) -> bool:
        """Say whether `follow` has something to do."""
        # A scheduler that goes by the loss, or is none of torch's, may do more than set rates: the root's alone does.
        return version > self._version and isinstance(self._scheduler, LRScheduler) and not self._wants_loss

    def follow(self, version: int) -> None:
        """Step as often as the root has stepped its own."""
        for _ in range(version - self._version):
            self._step(self._scheduler)
        self._version = version

    def state(self) -> dict[str, Any]:
        """Return the version that the scheduler is at, and its own state."""
        own = None if self._scheduler is None else self._scheduler.state_dict()
        return {"version": self._version, "scheduler": own}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._version = state["version"]
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])


def check_scheduler(scheduler: Any | None, optimizer: Optimizer) -> None:  # noqa: ANN401
    """Raise TypeError or ValueError for a scheduler that cannot be stepped once a version."""
    if scheduler is None:
        return
    name = type(scheduler).__name__
    if not callable(getattr(type(scheduler), "step", None)):
        raise TypeError(f"scheduler must have a step() as those of torch.optim.lr_scheduler, but {name} has none")
    needed = _needed(scheduler)
    if len(needed) > 1 or any("metric" not in word and "loss" not in word for word in needed):
        raise TypeError(
            f"{name}.step needs {', '.join(needed)}, and the session knows the mean loss only: step it in on_step=, "
            "which runs at the root after every update"
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError(f"the scheduler, {name}, is of another optimizer than the session's: make it from that one")


def _needed(scheduler: Any) -> list[str]:  # noqa: ANN401
    """Return the arguments without which the scheduler's step() cannot be called."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    arguments = list(inspect.signature(type(scheduler).step).parameters.values())[1:]
    return [a.name for a in arguments if a.default is inspect.Parameter.empty and a.kind not in kinds]
