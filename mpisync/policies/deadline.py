"""All that arrive in time: a time limit on each step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mpisync.policies.base import Arrival, Decision, OpenStep, Policy, number_text, whole_number
from mpisync.records.kept import keep, recall
from mpisync.records.schema import StepRecord
from mpisync.records.turnarounds import Turnarounds

__all__ = ["Deadline"]

_WINDOW = 16  # steps whose arrivals set a limit
_PERIOD = 4  # steps from one limit to the next
_LEAST_MAD = 0.01  # of the median: workers alike to the microsecond are all in time


@dataclass(frozen=True)
class Deadline(Policy):
    """Close each step when its time is up, or earlier when every worker is in.

    A step that has fewer than `at_least` gradients when its time is up waits for them, and then
    `grace` seconds more for those close behind.

    With `mads` the limit follows the workers: it is the median of what they took in the last steps,
    late ones too, plus so many times the median absolute deviation from it (1 % of the median at
    least). `seconds` then is the limit of the first steps only. Half of the workers may straggle
    without any effect on it, and when all become slower it grows within a few steps, for late
    gradients tell their time too. `StepRecord.why` tells each new limit.

    Invariant: every update is the mean of all gradients that were whole in time, from distinct
    workers, all computed at the very parameters being updated; at least `at_least` of them, or all
    that can still be had when fewer are alive.

    Source: the time-out that J. Chen, X. Pan, R. Monga, S. Bengio, R. Jozefowicz name beside backup
    workers in "Revisiting Distributed Synchronous SGD" (arXiv:1604.00981).

    Attributes:
        seconds: How long a step stays open, from its opening.
        at_least: How many gradients it needs all the same.
        grace: For how many seconds it stays open once it has those.
        mads: How many median absolute deviations above the median the limit is; None for `seconds`.

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
    mads: float | None = None
    _limit_s: float | None = field(default=None, repr=False)
    _why: str | None = field(default=None, repr=False)
    _workers: int = field(default=0, repr=False)
    _recent: tuple[StepRecord, ...] = field(default=(), repr=False, hash=False)

    def __post_init__(self) -> None:
        """Refuse values that make no sense with any number of workers."""
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
        if self.mads is not None:
            if not 0 <= self.mads < math.inf:
                raise ValueError(
                    f"mads must be finite and not negative, not {self.mads!r}: "
                    "leave it out to keep the limit at `seconds`"
                )
            object.__setattr__(self, "mads", float(self.mads))
        at_least = whole_number("at_least", self.at_least, 1, "an update needs a gradient")
        object.__setattr__(self, "seconds", float(self.seconds))
        object.__setattr__(self, "grace", float(self.grace))
        object.__setattr__(self, "at_least", at_least)

    @property
    def staleness(self) -> int:
        """Always 0: gradients of older parameters never count."""
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
        """Return as many as can be had: any of them may be in time."""
        return step.reachable

    def judge(self, arrival: Arrival, step: OpenStep) -> Decision:
        """Accept gradients of this version that are in time, one of each worker.

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
        """Return when the step's time is up; infinity while it lacks gradients that it needs."""
        if len(step.accepted) < self.at_least:
            return math.inf  # if deaths made these too many, it closes when nobody is missing
        enough_s = step.accepted[self.at_least - 1].at_s
        limit_s = self.seconds if self._limit_s is None else self._limit_s
        return max(step.opened_s + limit_s, enough_s + self.grace)

    @property
    def why(self) -> str | None:
        """The origin of a new limit; None where the last one goes on."""
        return self._why

    def after(self, record: StepRecord) -> Deadline:
        """Take note of a step; every few of them, set the limit anew."""
        if self.mads is None:
            return self
        seen = max((arrival.worker + 1 for arrival in record.arrivals), default=0)
        known = replace(
            self,
            _workers=max(self._workers, record.alive, seen),
            _recent=(*self._recent, record)[-_WINDOW:],
            _why=None,
        )
        return known._limited(self.mads) if (record.step + 1) % _PERIOD == 0 else known

    def _limited(self, mads: float) -> Deadline:
        took_s = list(Turnarounds(self._recent, self._workers))
        if not took_s:
            return self
        median_s = statistics.median(took_s)
        mad_s = statistics.median(abs(s - median_s) for s in took_s)
        limit_s = median_s + mads * max(mad_s, _LEAST_MAD * median_s)
        why = f"limit {limit_s:.3g} s: median {median_s:.3g} s, median deviation {mad_s:.3g} s"
        return replace(self, _limit_s=limit_s, _why=why)

    def state(self) -> dict[str, Any]:
        """Return the limit, and the steps that the next one looks back on."""
        return {"limit_s": self._limit_s, "why": self._why, "workers": self._workers, "recent": keep(self._recent)}

    def load(self, state: Mapping[str, Any], shift_s: float = 0.0) -> Deadline:
        """Return this policy with what another had learnt; see `Policy.load`."""
        return replace(
            self,
            _limit_s=state["limit_s"],
            _why=state["why"],
            _workers=state["workers"],
            _recent=recall(state["recent"], shift_s),
        )

    def __str__(self) -> str:
        """Return for example `deadline:0.5,at_least=3,grace=0.1`."""
        text = f"deadline:{number_text(self.seconds)}"
        if self.at_least != 1:
            text += f",at_least={self.at_least}"
        if self.grace:
            text += f",grace={number_text(self.grace)}"
        if self.mads is not None:
            text += f",mads={number_text(self.mads)}"
        return text
