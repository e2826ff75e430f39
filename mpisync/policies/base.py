"""Policies: the rules by which a step accepts gradients and closes.

A policy is a pure function of what it is shown: no clock, no MPI, no arrays. `mpisync.policies.player`
plays it, for the root of a run, a simulated one and a process alone, by five rules:

1. Every arrival is judged (`Policy.judge`): when its header comes, to learn whether its payload is
   worth asking for, and again when it is whole, with the time of that as `Arrival.at_s`.
2. ACCEPT of a whole gradient appends it to `OpenStep.accepted`. HOLD keeps it in `OpenStep.held`;
   what is held is judged again after each acceptance and when the next step opens. LATE is final.
3. `Policy.closes` is asked after each acceptance, when a gradient was held, when a worker has died
   and at `Policy.wakes_at`.
4. A worker whose gradient got its verdict begins its next one at the version that
   `Policy.resumes_at` names, and not before that version is published.
5. When a step's version is published the policy of the next step is `Policy.after` of its record,
   which has the norms if the policy `wants_norms`.
"""

from __future__ import annotations

import abc
import enum
import math
import operator
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from mpisync.records.schema import StepRecord

__all__ = ["Arrival", "Decision", "OpenStep", "Policy"]


class Decision(enum.Enum):
    """The fate of a gradient that has arrived, as things stand.

    Example:
        >>> Decision.LATE.name
        'LATE'
    """

    ACCEPT = "accept"
    """The gradient counts in the open step."""
    HOLD = "hold"
    """The gradient cannot count in the open step now: keep it and judge it again."""
    LATE = "late"
    """No step can use the gradient any more."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One gradient, as a policy sees it.

    Attributes:
        worker: Who computed it, from 0.
        sequence: Which computation of that worker it is, from 0.
        version: The version of the parameters it was computed at.
        at_s: When it arrived, by the root's monotonic clock.

    Example:
        >>> Arrival(worker=2, sequence=7, version=5, at_s=0.25).version
        5
    """

    worker: int
    sequence: int
    version: int
    at_s: float


@dataclass(slots=True)
class OpenStep:
    """The open step. Its owner changes it, a policy only reads it.

    Attributes:
        step: Its number, which is the version of the parameters it updates.
        opened_s: When it opened, by the root's monotonic clock.
        workers: How many workers the run was started with.
        alive: Those that have not died.
        accepted: What counts so far, whole, in order of acceptance.
        held: What has arrived and waits for its turn; it outlives the step.
        remaining: How many more gradients there are samples for; None where samples never run out.

    Example:
        >>> step = OpenStep(step=0, opened_s=0.0, workers=4, alive={0, 1, 3})
        >>> step.accepted.append(Arrival(worker=2, sequence=0, version=0, at_s=0.1))
        >>> step.has(2), step.has(3), step.reachable  # worker 2 died after its gradient was in
        (True, False, 4)
    """

    step: int
    opened_s: float
    workers: int
    alive: Set[int]
    accepted: list[Arrival] = field(default_factory=list)
    held: list[Arrival] = field(default_factory=list)
    remaining: int | None = None

    def has(self, worker: int) -> bool:
        """Say whether this worker's gradient is in already."""
        for arrival in self.accepted:  # a plain loop: half the price of any() with a generator
            if arrival.worker == worker:
                return True
        return False

    @property
    def reachable(self) -> int:
        """The number of workers whose gradients this step can have: those alive, and the dead that are in."""
        if len(self.alive) == self.workers:
            return self.limited(self.workers)
        return self.limited(len({arrival.worker for arrival in self.accepted}.union(self.alive)))

    def limited(self, gradients: int) -> int:
        """Return `gradients`, or as many as there are samples for."""
        return gradients if self.remaining is None else min(gradients, len(self.accepted) + self.remaining)


class Policy(abc.ABC):
    """The rules of a step: when it closes, and which gradients count in it.

    Policies are immutable and print as their command-line form (see `parse_policy`).

    Example:
        >>> from mpisync.policies import BackupWorkers
        >>> policy = BackupWorkers(1)
        >>> step = OpenStep(step=0, opened_s=0.0, workers=3, alive={0, 1, 2})
        >>> for worker in (2, 0):
        ...     arrival = Arrival(worker, sequence=0, version=0, at_s=0.1)
        ...     assert policy.judge(arrival, step) is Decision.ACCEPT
        ...     step.accepted.append(arrival)
        >>> policy.closes(step, now_s=0.1)
        True
    """

    @property
    @abc.abstractmethod
    def staleness(self) -> int | None:
        """The number of versions that an accepted gradient may lag; None for any number.

        At 0 a worker gives one gradient a step at most: once accepted it resumes at the next.
        """

    @property
    def steps(self) -> int | None:
        """The version at which the run must end; None where the policy sets no end."""
        return None

    @abc.abstractmethod
    def check(self, workers: int) -> None:
        """Refuse a number of workers with which a step could never close.

        Raises:
            ValueError: It says which number breaks which rule, and what to do.
        """

    @abc.abstractmethod
    def target(self, step: OpenStep) -> int:
        """Return N: how many gradients the step wants, as things stand."""

    @abc.abstractmethod
    def judge(self, arrival: Arrival, step: OpenStep) -> Decision:
        """Say what becomes of a gradient that has arrived."""

    @abc.abstractmethod
    def closes(self, step: OpenStep, now_s: float) -> bool:
        """Say whether the step closes now."""

    def lacks(self, step: OpenStep) -> int:
        """Return at least how many more gradients the step needs to close; 1 where time may close it.

        Whoever owns the step may let so many arrive before it looks at them.
        """
        return 1

    def wakes_at(self, step: OpenStep) -> float:
        """Return when to ask `closes` again though nothing arrives; infinity if time plays no part."""
        return math.inf

    def resumes_at(self, worker: int, sequence: int, newest: int) -> int:
        """Return the version at which a worker begins computation `sequence`.

        Args:
            worker: Whose computation it is.
            sequence: Its number.
            newest: The newest version there is for it. For a worker whose gradient was accepted
                under staleness 0 that is the version which the open step will make.
        """
        return newest

    @property
    def wants_norms(self) -> bool:
        """Whether the policy reads `StepRecord.norms`, which cost the root a little."""
        return False

    @property
    def why(self) -> str | None:
        """The reason why the step is played as it is, for its record; None where nothing was decided."""
        return None

    def after(self, record: StepRecord) -> Policy:
        """Return the policy of the next step, given the record of the one that was closed."""
        return self

    def state(self) -> dict[str, Any]:
        """Return what the policy has learnt of the run, in plain values; nothing where each step is a new one to it."""
        return {}

    def load(self, state: Mapping[str, Any], shift_s: float = 0.0) -> Policy:
        """Return this policy with what another, of the same form, had learnt.

        Args:
            state: What `state` returned there.
            shift_s: How far this run's clock is ahead of that one's.
        """
        return self

    @abc.abstractmethod
    def __str__(self) -> str:
        """Return the command-line form, which `parse_policy` reads."""


def whole_number(name: str, value: int, minimum: int, advice: str) -> int:
    """Return `value` as an int, or refuse it by name."""
    try:
        number = int(operator.index(value))
    except TypeError:
        raise TypeError(f"{name} must be a whole number, not {value!r}") from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, not {number}: {advice}")
    return number


def number_text(value: float) -> str:
    """Return a number as a policy's form has it: `2` and not `2.0`."""
    return repr(value).removesuffix(".0")
