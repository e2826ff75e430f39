"""What a step is made of once its gradients are in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mpisync.aggregation.members import Member
from mpisync.aggregation.running_sum import Sums
from mpisync.aggregation.work import Work
from mpisync.policies import Arrival
from mpisync.records import StepRecord
from mpisync.transport.layout import SgdSpan
from mpisync.transport.wire import Header


@dataclass(frozen=True)
class AcceptedGradient:
    """An accepted gradient of the open step."""

    member: Member
    header: Header
    arrival: Arrival
    work: Work
    is_tie: bool


@dataclass
class ClosedStep:
    """A step that has its gradients: update the parameters, then `publish`.

    The gradients are folded when their mean, or what depends on it, is first asked for; or never, where
    `fused_sgd_step` folds them and updates the parameters in one pass.

    Attributes:
        step: The step's number, which is the version of the parameters to be updated.
        accepted: (worker, sequence) of the accepted gradients, in order of acceptance.
        extras: What the accepted gradients carried along, in the same order.
        samples: Samples of the accepted gradients.
        loss: Their mean loss; NaN where a worker gave none.
        fingerprints: Of the accepted gradients, to notice workers that compute the same.
    """

    step: int
    accepted: list[tuple[int, int]]
    extras: list[np.ndarray]
    samples: int
    loss: float
    fingerprints: list[int]
    closed_s: float
    _fold: Callable[[], Sums] = field(repr=False)
    _fused_sgd_step: Callable[[Sequence[SgdSpan]], bool] = field(repr=False)
    _publish: Callable[[ClosedStep], StepRecord] = field(repr=False)
    _mean: list[np.ndarray] = field(repr=False)
    _has_descended: bool = False
    _sums: Sums | None = field(default=None, repr=False)

    @property
    def sums(self) -> Sums:
        """What the finished sum says of itself."""
        return self._finish()

    def _finish(self) -> Sums:
        """Fold the gradients, where neither this nor a fused step has done it."""
        if self._sums is None:
            self._sums = Sums(finite=True) if self._has_descended else self._fold()
        return self._sums

    @property
    def mean(self) -> list[np.ndarray]:
        """The mean gradient, one array a segment, in the accumulator's dtype.

        Raises:
            RuntimeError: The step has descended.
        """
        if self._has_descended:
            raise RuntimeError("a step that has descended has no mean: ask for it instead of fused_sgd_step()")
        self._finish()
        return self._mean

    @property
    def finite(self) -> bool:
        """Whether every element of the mean is finite; when not, leave the parameters alone."""
        return self.sums.finite

    def fused_sgd_step(self, spans: Sequence[SgdSpan]) -> bool:
        """Subtract each span's rate times its mean gradient from the parameters, in one pass over memory.

        Bit by bit that is what `torch.optim.SGD` does with the mean, without writing the mean down.

        Returns:
            Whether it was done; not where the mean might not be finite, since parameters are never touched by an
            update that will be refused, nor where it exists already or norms are wanted.
        """
        if self._sums is None:
            self._has_descended = self._fused_sgd_step(spans)
        return self._has_descended

    def publish(self) -> StepRecord:
        """Make the parameters, as they are now, the next version; what happened in the step."""
        return self._publish(self)
