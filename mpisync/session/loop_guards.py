"""What a worker's loop does to its model and optimizer that a session could not follow: each is refused by name."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from mpisync.model.aliases import ComputedViews
from mpisync.model.guards import GroupWatch, forbid_steps
from mpisync.model.loss_scaling import ScaleWatch
from mpisync.model.optimizer_traps import OptimizerTrap
from mpisync.model.renorm import RenormTrap
from mpisync.model.structure import StructureWatch


class LoopGuards:
    """The guards of one loop, which make its mistakes raise RuntimeError until `undo`.

    Make them before the parameters are given other memory.

    Args:
        model: The session's.
        optimizer: Its.
        scheduler: Its; None if there is none.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, scheduler: Any | None) -> None:  # noqa: ANN401 (as in torch)
        self._computed = ComputedViews(model)
        self._steps = forbid_steps(optimizer, scheduler)
        self._optimizer, self._scaling = OptimizerTrap(optimizer), ScaleWatch(optimizer)
        self._groups, self._structure = GroupWatch(optimizer), StructureWatch(model)
        self._renorm = RenormTrap(model)

    def begin(self, *, is_first: bool) -> None:
        """Check the model as it is when a loop begins.

        Args:
            is_first: Whether there was none before; else the optimizer may have been set anew since then.
        """
        self._structure.examine()
        if not is_first:
            self._groups.reset()

    def check(self, *, has_gradient: bool) -> None:
        """Check what the loop has done since the last step.

        Args:
            has_gradient: Whether any parameter has one.
        """
        self._scaling.check()
        if not has_gradient:  # then this says why, where it can
            self._structure.examine()
        self._groups.check()
        self._computed.check()

    def check_structure(self, presence: bytes) -> None:
        """Check that the model is still the session's.

        Args:
            presence: Which parameters had a gradient, a byte each.
        """
        self._structure.check(presence)

    def check_groups(self) -> None:
        """Check the optimizer's settings."""
        self._groups.check()

    def allow_groups(self) -> None:
        """Take the optimizer's settings as they are now for unchanged."""
        self._groups.reset()

    def undo(self) -> None:
        """Let everything work again as it did before."""
        self._steps.undo()
        self._optimizer.undo()
        self._scaling.undo()
        self._renorm.undo()
