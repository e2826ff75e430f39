"""What a worker's loop does to its model and optimizer that a session could not follow: each is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from mpisync.model.aliases import ComputedViews
from mpisync.model.clipping import ClipWatch
from mpisync.model.guards import GroupWatch, StepTrap
from mpisync.model.loss_scaling import ScaleWatch
from mpisync.model.optimizer_traps import OptimizerTrap
from mpisync.model.renorm import RenormTrap
from mpisync.model.structure import StructureWatch


class LoopGuards:
    """The guards of one loop, which make its mistakes raise RuntimeError until `undo`.

    Make them before the parameters are given other memory.

    Args:
        model: The session's.
        optimizers: Its.
        schedulers: Theirs.
        tells: Whether this rank speaks for all where nothing is refused.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], schedulers: Sequence[Any], *, tells: bool
    ) -> None:
        self._computed = ComputedViews(model)
        self._steps = StepTrap(*optimizers, *schedulers)
        self._optimizers = [OptimizerTrap(optimizer) for optimizer in optimizers]
        self._scaling = [ScaleWatch(optimizer) for optimizer in optimizers]
        names = [""] if len(optimizers) == 1 else [f"optimizer[{index}]." for index in range(len(optimizers))]
        self._groups = [GroupWatch(optimizer, name) for optimizer, name in zip(optimizers, names, strict=True)]
        self._structure, self._renorm = StructureWatch(model), RenormTrap(model)
        self._clipping = ClipWatch(model.parameters()) if tells else None

    def begin(self, *, is_first: bool) -> None:
        """Check the model as it is when a loop begins.

        Args:
            is_first: Whether there was none before; else the optimizer may have been set anew since then.
        """
        self._structure.examine()
        if not is_first:
            self.allow_groups()

    def check(self, *, has_gradient: bool) -> None:
        """Check what the loop has done since the last step.

        Args:
            has_gradient: Whether any parameter has one.
        """
        for watch in self._scaling:
            watch.check()
        if not has_gradient:  # then this says why, where it can
            self._structure.examine()
        for settings in self._groups:
            settings.check()
        self._computed.check()

    def check_structure(self, presence: bytes) -> None:
        """Check that the model is still the session's.

        Args:
            presence: Which parameters had a gradient, a byte each.
        """
        self._structure.check(presence)

    def check_groups(self) -> None:
        """Check the optimizers' settings."""
        for watch in self._groups:
            watch.check()

    def allow_groups(self) -> None:
        """Take the optimizers' settings as they are now for unchanged."""
        for watch in self._groups:
            watch.reset()

    def undo(self) -> None:
        """Let everything work again as it did before."""
        self._steps.undo()
        for trap in self._optimizers:
            trap.undo()
        for watch in self._scaling:
            watch.undo()
        self._renorm.undo()
        if self._clipping is not None:
            self._clipping.undo()
