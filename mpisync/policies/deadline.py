"""All that arrive in time: a time limit on each step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpisync.policies.base import Arrival, Decision, OpenStep, Policy, whole_number

__all__ = ["Deadline"]


@dataclass(frozen=True)
class Deadline(Policy):
    """Close each step when its time is up, or earlier when every worker is in.

    A step that has fewer than `at_least` gradients when its time is up waits for them, and then
    `grace` seconds more for those close behind.

    Invariant: every update is the mean of all gradients that were whole in time, from distinct
    workers, all computed at the very parameters being updated; at least `at_least` of them, or all
    that can still be had when fewer are alive.

    Source: the time-out that J. Chen, X. Pan, R. Monga, S. Bengio, R. Jozefowicz name beside backup
    workers in "Revisiting Distributed Synchronous SGD" (arXiv:1604.00981).

    Attributes:
        seconds: How long a step stays open, from its opening.
        at_least: How many gradients it needs all the same.
        grace: For how many seconds it stays open once it has those.

    Example:
        >>> policy = Deadline(0.5, at_least=2, grace=0.1)
        >>> step = OpenStep(step=0, opened_s=10.0, workers=4, alive={0, 1, 2, 3})
        >>> step.accepted.append(Arrival(worker=3, sequence=0, version=0, at_s=10.2))
        >>> policy.wakes_at(step)  # one more is needed, whatever the time
        inf
        >>> step.accepted.append(Arrival(worker=1, sequence=0, version=0, at_s=10.7))
        >>> round(policy.wakes_at(step), 6)
        10.8
    """

    seconds: float
    at_least: int = 1
    grace: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what makes no sense with any number of workers."""
        if not 0 < self.seconds < math.inf:  # false for NaN too
            raise ValueError(
                f"seconds must be finite and greater than 0, not {self.seconds!r}: "
                "use BackupWorkers(0) to wait for every worker"
            )
        if not 0 <= self.grace < math.inf:
            raise ValueError(
                f"grace must be finite and not negative, not {self.grace!r}: "
                "use 0 to close at once when enough are in"
            )
        at_least = whole_number("at_least", self.at_least, 1, "an update needs a gradient")
        object.__setattr__(self, "seconds", float(self.seconds))
        object.__setattr__(self, "grace", float(self.grace))
        object.__setattr__(self, "at_least", at_least)

    @property
    def staleness(self) -> int:
        """0: what was computed at older parameters never counts."""
        return 0

    def check(self, workers: int) -> None:
        """Refuse to need more gradients than there are workers."""
        if self.at_least > workers:
            raise ValueError(
                f"at_least must not exceed the number of workers, or a step can never close, "
                f"but at_least is {self.at_least} with {workers} worker{'s' * (workers != 1)}: "
                f"use at_least={max(workers, 1)} or less, or start more ranks"
            )

    def target(self, step: OpenStep) -> int:
        """As many as can be had: any of them may be in time."""
        return step.reachable

    def judge(self, arrival: Arrival, step: OpenStep) -> Decision:
        """Accept what is of this version and in time, one of each worker.

        What comes after the closing time is not accepted even if the root has not yet looked at its
        clock, so that what counts does not depend on how often it looks.
        """
        if arrival.version < step.step:
            return Decision.LATE
        if (
            arrival.version > step.step
            or arrival.at_s > self.wakes_at(step)
            or step.has(arrival.worker)
        ):
            return Decision.HOLD
        return Decision.ACCEPT

    def closes(self, step: OpenStep, now_s: float) -> bool:
        """Close when the time is up and enough are in, or when nobody is missing."""
        return now_s >= self.wakes_at(step) or 0 < len(step.accepted) >= step.reachable

    def wakes_at(self, step: OpenStep) -> float:
        """When the step's time is up; infinity while it lacks gradients that it needs."""
        if len(step.accepted) < self.at_least:
            return math.inf  # if deaths made these too many, it closes when nobody is missing
        enough_s = step.accepted[self.at_least - 1].at_s
        return max(step.opened_s + self.seconds, enough_s + self.grace)

    def __str__(self) -> str:
        """Return for example `deadline:0.5,at_least=3,grace=0.1`."""
        text = f"deadline:{_number(self.seconds)}"
        if self.at_least != 1:
            text += f",at_least={self.at_least}"
        if self.grace:
            text += f",grace={_number(self.grace)}"
        return text


def _number(value: float) -> str:
    return repr(value).removesuffix(".0")
