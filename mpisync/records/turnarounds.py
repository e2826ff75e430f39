"""How long workers took for their gradients, late ones too, as the last steps' records tell it.

A worker's time is its turnaround: from when it could begin, which is when the version was published
or its verdict was given, until its gradient had arrived. It holds the computation, the wait for the
batch and the way to the root.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mpisync.records.schema import ArrivalRecord, StepRecord

_RARE = 900  # a change is believed that chance shows less than once in so many times


@dataclass(slots=True)
class _Begun:
    """Where a worker stands: what it computes, and since when."""

    version: int
    at_s: float


class Turnarounds:
    """The turnarounds in consecutive steps' records of a run without staleness.

    What was begun before the first record is left out, for nobody knows when. What has not arrived
    by the end of the last one has a lower bound only.

    Args:
        records: The steps, one after another; at least one.
        workers: How many workers the run has.

    Attributes:
        seconds: Of each worker, its turnarounds by version.
        pending: Of each worker, (version, seconds so far) of what it computes at the end.

    Example:
        >>> late = ArrivalRecord(1, 0, 0, "late", offset_s=2.0, late_by=1)
        >>> turnarounds = Turnarounds([
        ...     StepRecord(0, 0.0, 1.0, 1.5, 1, 2, [(0, 0, 0)], [ArrivalRecord(0, 0, 0, "accepted", 1.0)]),
        ...     StepRecord(1, 1.5, 4.0, 4.0, 1, 2, [(0, 1, 1)], [late, ArrivalRecord(0, 1, 1, "accepted", 2.5)]),
        ... ], workers=2)
        >>> turnarounds.seconds
        [{0: 1.0, 1: 2.5}, {0: 3.5}]
        >>> turnarounds.pending
        [(2, 0.0), (1, 0.5)]
    """

    def __init__(self, records: Sequence[StepRecord], workers: int) -> None:
        """Go through the records once."""
        first, now_s = records[0], records[-1].published_s
        self.seconds: list[dict[int, float]] = [{} for _ in range(workers)]
        begun = [_Begun(first.step, first.opened_s) for _ in range(workers)]
        for record in records:
            for arrival in record.arrivals:
                worker = begun[arrival.worker]
                at_s = record.opened_s + arrival.offset_s
                if arrival.version >= first.step:
                    self.seconds[arrival.worker][arrival.version] = at_s - worker.at_s
                _begin(worker, arrival, record, at_s)
        self.pending = [(worker.version, now_s - worker.at_s) for worker in begun]

    def __iter__(self) -> Iterator[float]:
        """Go through all that is known."""
        for of_one in self.seconds:
            yield from of_one.values()

    def table(self, first: int, steps: int) -> list[list[float]]:
        """Return what each worker takes, or would take, at each of `steps` versions from `first` on.

        A worker that has become slower or faster counts with what it took since. A version at which
        nothing is known of a worker has one of its other turnarounds, each in its turn, so that its
        slow ones keep their share. What has not arrived counts once it is slower than the worker's
        usual.

        Returns:
            A row for each version, in it a time for each worker, in seconds.
        """
        versions = range(first, first + steps)
        columns = []
        for of_one, (version, so_far_s) in zip(self.seconds, self.pending, strict=True):
            known = {v: s for v, s in of_one.items() if v in versions}
            for v in list(known)[: changed_at(list(known.values()))]:
                del known[v]
            usual_s = statistics.median(known.values() or of_one.values() or [0.0])
            if not known or so_far_s > usual_s:
                known[min(version, versions[-1])] = max(so_far_s, usual_s)
            others = itertools.cycle(list(known.values()))
            columns.append([known[v] if v in known else next(others) for v in versions])
        return [list(row) for row in zip(*columns, strict=True)]


def changed_at(values: Sequence[float]) -> int:
    """Return where the last change is: all values from there on are greater, or all less, than all before.

    Of n values from one distribution the last m are so by chance 2 times in n over m. Only what is so
    less than once in 900 times counts: the last 4 of 16 values, or the last 3 of 24 and more.

    Returns:
        The place of the first value after the change; 0 if there is none.

    Example:
        >>> changed_at([1.0, 1.1] * 6 + [2.0, 2.2] * 2), changed_at([1.0, 1.1] * 6 + [2.0, 2.2])
        (12, 0)
    """
    least, most = list(itertools.accumulate(values, min)), list(itertools.accumulate(values, max))
    least_after, most_after = math.inf, -math.inf
    for place in range(len(values) - 1, 0, -1):
        least_after, most_after = min(least_after, values[place]), max(most_after, values[place])
        apart = least_after > most[place - 1] or most_after < least[place - 1]
        if apart and math.comb(len(values), place) > 2 * _RARE:
            return place
    return 0


def _begin(worker: _Begun, arrival: ArrivalRecord, record: StepRecord, at_s: float) -> None:
    """Take note of what a worker begins once its gradient has its verdict."""
    if arrival.verdict == "accepted":
        worker.version, worker.at_s = record.step + 1, record.published_s
    else:
        worker.version, worker.at_s = record.step, max(at_s, record.opened_s)


def time_per_step(table: Sequence[Sequence[float]], n: int) -> list[float]:
    """Play steps that take the first `n` gradients of each version; who is late goes on computing.

    Args:
        table: A row for each version, in it each worker's seconds.
        n: How many gradients close a step.

    Returns:
        How long each step took, in seconds.

    Example:
        >>> time_per_step([[1.0, 1.0, 5.0], [1.0, 2.0, 1.0]], n=2)
        [1.0, 2.0]
        >>> time_per_step([[1.0, 1.0, 5.0], [1.0, 2.0, 1.0]], n=3)
        [5.0, 2.0]
    """
    now_s, took_s = 0.0, []
    free_s = [0.0] * len(table[0])  # when each is done with what it began before
    for row in table:
        arrivals_s = [(free if free > now_s else now_s) + s for free, s in zip(free_s, row, strict=True)]
        closed_s = sorted(arrivals_s)[n - 1]
        free_s = [
            free if free > closed_s else arrival for free, arrival in zip(free_s, arrivals_s, strict=True)
        ]
        took_s.append(closed_s - now_s)
        now_s = closed_s
    return took_s
