"""The replay of a record: the same gradients, in the same order."""

from __future__ import annotations

import os
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mpisync.policies.base import Arrival, Decision, OpenStep, Policy
from mpisync.records.files import read_record
from mpisync.records.schema import RunHeader, StepChecker, StepRecord, recorded_late_work

__all__ = ["Replay"]

Gradient = tuple[int, int]  # (worker, sequence)


class Turn(NamedTuple):
    """The turn of a gradient: in which step it counts, as which of its gradients."""

    step: int
    place: int


@dataclass(frozen=True)
class Replay(Policy):
    """Accept exactly the recorded gradients, in the recorded order.

    A gradient is known by (worker, sequence). One whose turn comes later is held; one that no
    recorded step accepted is late. A step closes when its list is complete and every gradient that
    was computed at its version and counts in a later step has arrived too, so that stale gradients
    are computed at the very parameters at which they were. `resumes_at` says where each begins.
    After the last recorded step there is nothing to replay: the run ends at version `steps`.

    Invariant: every update is the mean of exactly the gradients that the record lists for it, in
    its order, each computed at the recorded version; what held for the recorded policy holds here.

    Source: the run recorded is one of J. Chen, X. Pan, R. Monga, S. Bengio, R. Jozefowicz,
    "Revisiting Distributed Synchronous SGD" (arXiv:1604.00981), under any of its algorithms.

    Attributes:
        record: A record's path, or its steps.
        header: The recorded run; None if only steps were given.

    Example:
        >>> policy = Replay([StepRecord(0, 0.0, 0.5, 0.6, 2, 3, [(2, 0, 0), (1, 0, 0)], [])])
        >>> step = OpenStep(step=0, opened_s=0.0, workers=3, alive={0, 1, 2})
        >>> policy.judge(Arrival(worker=1, sequence=0, version=0, at_s=0.1), step)
        <Decision.HOLD: 'hold'>
        >>> policy.judge(Arrival(worker=2, sequence=0, version=0, at_s=0.2), step)
        <Decision.ACCEPT: 'accept'>
        >>> policy.steps
        1
    """

    record: str | os.PathLike[str] | Sequence[StepRecord]
    header: RunHeader | None = field(init=False, repr=False, compare=False)
    _script: _Script = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Read the record and refuse what cannot be replayed."""
        header: RunHeader | None = None
        if isinstance(self.record, (str, os.PathLike)):
            object.__setattr__(self, "record", os.fspath(self.record))
            header, steps = read_record(self.record, strict=True)
        else:
            steps = list(self.record)
            checker = StepChecker()
            for step in steps:
                checker.check(step)
        if not steps:
            raise ValueError(f"a record must hold a step to be replayed, but {self} holds none")
        object.__setattr__(self, "header", header)
        carries = header is not None and recorded_late_work(header)[0] == "carry"
        object.__setattr__(self, "_script", _Script(steps, carries=carries))

    @property
    def staleness(self) -> int:
        """The greatest lag in the record; at least 1 if a worker counts twice in one step."""
        return self._script.staleness

    @property
    def steps(self) -> int:
        """The version that the last recorded step makes."""
        return self._script.end

    def lots(self, workers: int) -> list[list[list[tuple[int, int]]]]:
        """Return (epoch, number) of the batches of each gradient, by worker and in order, if they came from a pool."""
        own: list[list[list[tuple[int, int]]]] = [[] for _ in range(workers)]
        for (worker, _), lots in sorted(self._script.lots.items()):
            own[worker].append(lots)
        return own

    def metrics(self, step: int) -> list[tuple[int, float]]:
        """Return (version, value) of each evaluation by which the recorded step's schedulers were stepped."""
        return self._script.metrics.get(step, [])

    def check(self, workers: int) -> None:
        """Refuse another number of workers than was recorded."""
        needed = self._script.workers if self.header is None else self.header.workers
        if workers < needed or (self.header is not None and workers != needed):
            raise ValueError(
                f"a replay needs the workers of its record, but the record is of {needed} and here "
                f"{'is' if workers == 1 else 'are'} {workers}: start it with {needed} workers"
            )

    def target(self, step: OpenStep) -> int:
        """Return how many gradients the recorded step accepted."""
        return len(self._script.step(step.step))

    def judge(self, arrival: Arrival, step: OpenStep) -> Decision:
        """Accept the gradient whose turn it is, hold those whose turn comes later.

        A gradient that no step accepted is late once its worker is behind, or is needed.

        Raises:
            RuntimeError: The gradient counts, but was computed at another version than recorded.
        """
        script = self._script
        script.step(step.step)
        turn = script.turns.get((arrival.worker, arrival.sequence))
        if turn is None:
            late = step.step > arrival.version or script.needed(arrival, step.step)
            return Decision.LATE if late else Decision.HOLD
        recorded = script.versions[arrival.worker, arrival.sequence]
        if arrival.version != recorded:
            raise RuntimeError(
                f"the replay left its record: worker {arrival.worker}'s gradient "
                f"{arrival.sequence} was computed at version {arrival.version}, but is recorded at "
                f"{recorded}: replay with the settings of the record"
            )
        now = (step.step, len(step.accepted))
        if turn == now:
            return Decision.ACCEPT
        return Decision.HOLD if turn > now else Decision.LATE

    def closes(self, step: OpenStep, now_s: float) -> bool:
        """Close when the list is complete and what later steps need of this version is held."""
        if len(step.accepted) < len(self._script.step(step.step)):
            return False
        owed = self._script.owed.get(step.step)
        return not owed or owed <= {(arrival.worker, arrival.sequence) for arrival in step.held}

    def resumes_at(self, worker: int, sequence: int, newest: int) -> int:
        """Return the recorded version; never an old one for a gradient that can count nowhere."""
        recorded = self._script.versions.get((worker, sequence), newest)
        if (worker, sequence) in self._script.turns or self._script.carries:
            return recorded
        return max(recorded, newest)

    def __str__(self) -> str:
        """Return for example `replay:runs/record.jsonl`."""
        if isinstance(self.record, str):
            return f"replay:{self.record}"
        return f"replay:({len(self.record)} steps in memory)"  # type: ignore[arg-type]


class _Script:
    """A record, arranged for looking up what a replay asks."""

    def __init__(self, steps: Sequence[StepRecord], *, carries: bool) -> None:
        """Arrange the steps; with `carries`, late gradients count too, in their workers' next ones."""
        self.first = steps[0].step
        self.end = steps[-1].step + 1
        self.lists = [step.accepted for step in steps]
        self.versions = _versions(steps)
        arrivals = [arrival for step in steps for arrival in step.arrivals]
        self.lots = {(a.worker, a.sequence): a.lots for a in arrivals if a.lots is not None}
        self.metrics = {step.step: step.metrics for step in steps if step.metrics}
        self.turns: dict[Gradient, Turn] = {}
        self.owed: defaultdict[int, set[Gradient]] = defaultdict(set)
        for record in steps:
            for place, (worker, sequence, version) in enumerate(record.accepted):
                self.turns[worker, sequence] = Turn(record.step, place)
                if version < record.step:
                    self.owed[version].add((worker, sequence))
        self.carries = carries
        if carries:
            for step in steps:
                for late in step.arrivals:
                    if late.verdict == "late":
                        self.owed[late.version].add((late.worker, late.sequence))
        self.workers = 1 + max((worker for worker, _ in self.versions), default=0)
        self.staleness = self._staleness()
        self._counting: defaultdict[int, list[int]] = defaultdict(list)
        for worker, sequence in sorted(self.turns):
            self._counting[worker].append(sequence)
        _check_order(self.versions, self.turns)

    def _staleness(self) -> int:
        twice = any(
            count > 1
            for accepted in self.lists
            for count in Counter(worker for worker, _, _ in accepted).values()
        )
        lags = (turn.step - self.versions[gradient] for gradient, turn in self.turns.items())
        return max(int(twice), max(lags, default=0))

    def step(self, number: int) -> list[tuple[int, int, int]]:
        """Return the gradients that the recorded step accepted."""
        if not self.first <= number < self.end:
            raise ValueError(
                f"the record holds steps {self.first} to {self.end - 1}, but step {number} was "
                f"asked for: begin at version {self.first} and end at version {self.end}"
            )
        return self.lists[number - self.first]

    def needed(self, arrival: Arrival, step: int) -> bool:
        """Say whether the open step needs what its worker computes after this gradient."""
        sequences = self._counting.get(arrival.worker, [])
        after = bisect(sequences, arrival.sequence)
        if after == len(sequences):
            return False
        return self.versions[arrival.worker, sequences[after]] <= step


def _versions(steps: Iterable[StepRecord]) -> dict[Gradient, int]:
    """Return the version at which each gradient of the record was computed, whatever its verdict."""
    versions: dict[Gradient, int] = {}
    for step in steps:
        for worker, sequence, version in step.accepted:
            versions[worker, sequence] = version
        for arrival in step.arrivals:
            versions[arrival.worker, arrival.sequence] = arrival.version
    return versions


def _check_order(versions: dict[Gradient, int], turns: dict[Gradient, Turn]) -> None:
    """Refuse a record that no run could make, since a replay of it would wait for ever.

    A worker computes one gradient at a time, each at a version no older than the one before, and
    after that had its verdict.
    """
    before = -1
    floor = 0  # no later version of this worker can be below this
    last = Turn(0, -1)
    for gradient in sorted(versions):
        worker, sequence = gradient
        if worker != before:
            before, floor, last = worker, 0, Turn(0, -1)
        turn = turns.get(gradient)
        if versions[gradient] < floor or (turn is not None and turn < last):
            raise ValueError(
                f"a worker's gradients follow one another, but worker {worker}'s gradient "
                f"{sequence}, computed at version {versions[gradient]}, is recorded before its "
                "earlier ones were done: the record was not made by one run"
            )
        floor = versions[gradient]
        if turn is not None:
            floor, last = turn.step, turn
