"""What a step is made of once its gradients are in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mpisync.aggregation.members import Member
from mpisync.policies import Arrival, StepRecord
from mpisync.transport.wire import Header


class PeerFailed(RuntimeError):
    """An exception on another rank ended the training."""

    is_echo = True  # the traceback of the rank where it began says more than one from here


@dataclass(frozen=True)
class Taken:
    """An accepted gradient of the open step."""

    member: Member
    header: Header
    arrival: Arrival
    is_tie: bool


@dataclass
class ClosedStep:
    """A step that has its gradients: update the parameters, then `publish`.

    Attributes:
        step: The step's number, which is the version of the parameters to be updated.
        accepted: (worker, sequence) of the accepted gradients, in order of acceptance.
        mean: The mean gradient, one array a segment, in the accumulator's dtype.
        finite: Whether every element of the mean is finite; when not, leave the parameters alone.
        extras: What the accepted gradients carried along, in the same order.
        samples: Samples of the accepted gradients.
        loss: Their mean loss; NaN where a worker gave none.
        gradient_squares: Σ‖g_j‖² over the accepted gradients; 0.0 unless norms were asked for.
        mean_square: ‖mean‖², likewise.
        fingerprints: Of the accepted gradients, to notice workers that compute the same.
    """

    step: int
    accepted: list[tuple[int, int]]
    mean: list[np.ndarray]
    finite: bool
    extras: list[np.ndarray]
    samples: int
    loss: float
    gradient_squares: float
    mean_square: float
    fingerprints: list[int]
    closed_s: float
    reduced_s: float
    _publish: Callable[[ClosedStep], StepRecord] = field(repr=False)

    def publish(self) -> StepRecord:
        """Make the parameters, as they are now, the next version; what happened in the step."""
        return self._publish(self)
