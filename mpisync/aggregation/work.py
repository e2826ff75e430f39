"""A gradient as the root knows it, and the samples that it was computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mpisync.aggregation.sample_pool import BatchId
from mpisync.policies import Arrival
from mpisync.transport.wire import GradientInfo


class Part(NamedTuple):
    """The samples of one computation."""

    sequence: int
    samples: int
    batches: int
    cost: float  # of a batch, as the loop says; NaN where it does not


class Work(NamedTuple):
    """The computations that a gradient is made of."""

    parts: Sequence[Part]  # its own last; before it those of the late gradients that are added in
    batches: Sequence[BatchId] = ()  # where they came from a pool

    @property
    def own(self) -> Part:
        """The gradient's own computation."""
        return self.parts[-1]

    @property
    def carried(self) -> list[int]:
        """The sequences of the late gradients that are added in."""
        return [part.sequence for part in self.parts[:-1]]


@dataclass(slots=True)
class Gradient:
    """An announced gradient, until its verdict and through its step."""

    arrival: Arrival
    info: GradientInfo
    work: Work
    is_tie: bool = False  # whether chance decided between it and another

    @property
    def worker(self) -> int:
        """The worker who computed it."""
        return self.arrival.worker
