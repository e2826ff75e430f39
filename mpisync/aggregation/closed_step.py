"""A step whose gradients are in: what its update is made of, until it is published."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mpisync.aggregation.running_sum import RunningSum, Sums
from mpisync.aggregation.work import Gradient
from mpisync.records import StepRecord
from mpisync.transport.layout import SgdSpan


class ClosedStep:
    """A step that has its gradients: update the parameters, then `publish`.

    The gradients are folded when their mean, or what depends on it, is first asked for; or never, where
    `fused_sgd_step` folds them and updates the parameters in one pass.

    Args:
        step: The step's number, which is the version of the parameters to be updated.
        gradients: The accepted ones, in order of acceptance.
        total: Their sum, as far as it was folded.
        parameters: To be updated, one array a segment.
        closed_s: When the step closed.
        clock: Monotonic seconds.
        publish: Publishes the parameters as they are, and records the step.
        initial: The worker whose initial parameters the mean is, in place of a gradient; None in an ordinary step.

    Attributes:
        accepted: (worker, sequence) of the accepted gradients, in order of acceptance.
        extras: What they carried along, in the same order.
        samples: Of all of them.
        loss: Their mean loss; NaN where a worker gave none.
        fingerprints: To notice workers that compute the same.
        reduced_s: When they were in the mean, or in the parameters.
    """

    def __init__(
        self,
        step: int,
        gradients: Sequence[Gradient],
        total: RunningSum,
        parameters: Sequence[np.ndarray],
        closed_s: float,
        clock: Callable[[], float],
        publish: Callable[[ClosedStep], StepRecord],
        *,
        initial: int | None = None,
    ) -> None:
        self.step, self.closed_s, self.initial = step, closed_s, initial
        self.accepted = [(one.arrival.worker, one.arrival.sequence) for one in gradients]
        self.extras = total.extras
        self.samples = sum(one.info.samples for one in gradients)
        self.loss = sum(one.info.loss for one in gradients) / len(gradients)
        self.fingerprints = [one.info.fingerprint for one in gradients]
        self.reduced_s = closed_s
        self._total, self._parameters = total, parameters
        self._clock, self._publish = clock, publish
        self._sums: Sums | None = None
        self._is_updated = False  # by `fused_sgd_step`

    @property
    def mean(self) -> list[np.ndarray]:
        """The mean gradient, one array a segment, in the accumulator's dtype.

        Raises:
            RuntimeError: There is none, since `fused_sgd_step` has updated the parameters.
        """
        if self._is_updated:
            raise RuntimeError("fused_sgd_step leaves no mean: ask for the mean instead of it")
        self.fold()
        return self._total.mean

    @property
    def finite(self) -> bool:
        """Whether every element of the mean is finite; when not, leave the parameters alone."""
        return self.fold().finite

    def fold(self) -> Sums:
        """Make the mean of the gradients, unless that was done, and return what the sum says of itself."""
        if self._sums is None:
            self._sums = self._total.finish()
            self.reduced_s = self._clock()
        return self._sums

    def fused_sgd_step(self, spans: Sequence[SgdSpan]) -> bool:
        """Subtract each span's rate times its mean gradient from the parameters, in one pass over memory.

        Bit by bit that is what `torch.optim.SGD` does with the mean, without writing the mean down.

        Returns:
            Whether it was done; not where the mean might not be finite, since parameters are never touched by an
            update that will be refused, nor where it exists already or norms are wanted.
        """
        if self._sums is None and self.initial is None and self._total.fused_sgd_step(self._parameters, spans):
            self._is_updated, self._sums = True, Sums(finite=True)
            self.reduced_s = self._clock()
        return self._is_updated

    def publish(self) -> StepRecord:
        """Make the parameters, as they are now, the next version, and return what happened in the step."""
        return self._publish(self)
