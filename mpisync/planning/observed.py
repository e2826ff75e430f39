"""Measured times of a run: read from a record or a table, and made usable, saying what was done."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from mpisync.planning.laws import Seconds
from mpisync.planning.runs import RunTimes, times_of_run
from mpisync.planning.tables import Table, read_table
from mpisync.records import StepRecord

__all__ = ["Observed", "during", "observe", "read_times"]

_WARM_UP_FACTOR = 2.0  # steps at the start in which everyone took so many times the median are warm-up
_LATE_STEPS = 5  # without a worker's times at the start, from which that is told, and a tenth of them
_LEAST_TIMES = 3  # of a worker, below which nothing can be drawn again for what it lacks


@dataclass(frozen=True)
class Observed:
    """Measured times that are whole: every step has one of every worker.

    Attributes:
        times_s: Seconds that each worker took for its gradient, (steps, workers), all positive;
            waiting for its batch is a part of it.
        measured: Which of them were measured; the others are draws from the same worker's times.
        workers: The number of each column's worker.
        hosts: The host of each column's worker, or its name in a table; empty where that is not known.
        notes: How the input was read, what was wrong with it and what was done, one sentence each.
        step_numbers: The number of each row's step; empty where times were drawn.
        overhead_s: What a step takes beyond the N-th gradient's computation, in seconds: messages,
            the update, the publication.
        policy: The policy that ran, in its command-line form.
        step_s: What a step of the run took, in seconds.
        data_s: How much of the times was waiting for data; None where that is not known.
        samples: The number of samples of each gradient, 0 where not known; None likewise.
        steps: The record's steps.

    Example:
        >>> observed = observe(np.array([[1.0, 2.0], [1.1, np.nan], [1.0, 2.2], [1.1, 2.1]]))
        >>> observed.measured.sum().item(), observed.notes
        (7, ["1 of 8 times is missing (not a number): it was drawn from the same worker's other times"])
    """

    times_s: Seconds
    measured: NDArray[np.bool_]
    workers: list[int]
    hosts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    step_numbers: NDArray[np.int64] = field(default_factory=lambda: np.arange(0))
    overhead_s: float = 0.0
    policy: str | None = None
    step_s: float | None = None
    data_s: Seconds | None = None
    samples: Seconds | None = None
    steps: list[StepRecord] = field(default_factory=list)


def read_times(
    path: str | os.PathLike[str], *, step: str | None = None, worker: str | None = None, seconds: str | None = None
) -> Observed:
    r"""Read a run's record, or a table: a line a step and a column a worker, or a line a gradient.

    Args:
        path: The file.
        step: The table's column of steps: its name, or its number from 1. Guessed by default.
        worker: That of workers, in a table with a line a gradient.
        seconds: That of times, likewise.

    Raises:
        ValueError: Nothing in it can be used; it says where and why.
        OSError: The file cannot be read.

    Example:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "times.csv")
        >>> with open(path, "w") as file:
        ...     _ = file.write("1.0,1.2\n1.1,1.3\n1.0,0.9\n")
        >>> read_times(path).times_s.shape
        (3, 2)
    """
    path = os.fspath(path)
    with open(path, "rb") as file:
        start = file.read(64).lstrip()
    if not start:
        raise ValueError(f"{path} is empty: give a run's record or a table of seconds, a line a step")
    if not start.startswith(b"{"):
        return observe(read_table(path, step=step, worker=worker, seconds=seconds))
    if (step, worker, seconds) != (None, None, None):
        raise ValueError(f"--step, --worker and --seconds name columns of a table, but {path} is a run's record")
    run = times_of_run(path)
    observed = observe(run)
    return replace(observed, overhead_s=run.overhead_s, policy=run.policy, step_s=run.step_s, steps=run.records)


def observe(source: Seconds | Table | RunTimes) -> Observed:
    """Make times whole: leave out who gave none, what is impossible and the warm-up; fill gaps.

    Args:
        source: A table, a run's times, or seconds by step and worker alone; NaN where there is none.

    Raises:
        ValueError: There is nothing that can be used.
    """
    if isinstance(source, np.ndarray):
        rows, columns = source.shape if source.ndim == 2 else (0, 0)
        source = Table(source, list(range(columns)), [], np.arange(rows), [])
    run = source if isinstance(source, RunTimes) else None
    notes = list(source.notes)
    times = np.array(source.times_s, np.float64)
    if times.ndim != 2 or not times.size:
        raise ValueError(f"times must be an array of steps × workers, not of shape {times.shape}")
    gaps = _gaps(times, notes, in_a_run=run is not None)
    steps = np.arange(len(times))
    workers = np.arange(times.shape[1])
    numbers, names = source.workers, source.names
    if (silent := gaps.all(axis=0)).any():
        who = ", ".join(str(numbers[w]) for w in workers[silent])
        notes.append(f"no time of worker {who} can be used: the plan is for the other {np.sum(~silent)}")
        workers = workers[~silent]
    if not len(workers):
        raise ValueError("no time can be used: all are missing, zero or negative")
    if (empty := gaps[:, workers].all(axis=1)).any():
        notes.append(f"{_many(empty.sum(), 'step')} left out, for lack of any time")
        steps = steps[~empty]
    steps = steps[_warm_up(times[np.ix_(steps, workers)], notes) :]
    place = np.ix_(steps, workers)
    measured = ~gaps[place]
    for w, first in zip(workers, measured.argmax(axis=0), strict=True):
        if first > max(_LATE_STEPS, len(steps) // 10):
            notes.append(f"worker {numbers[w]} has its first time in step {source.steps[steps[first]]}")
    return Observed(
        _fill(times[place], measured),
        measured,
        [numbers[w] for w in workers],
        [names[w] for w in workers] if names else [],
        notes,
        step_numbers=source.steps[steps],
        data_s=None if run is None else run.data_s[place],
        samples=None if run is None else run.samples[place],
    )


def during(observed: Observed, start: int, stop: int) -> Observed:
    """Return some of the steps, by their rows; gaps are filled from times in these alone.

    Example:
        >>> times_s = np.array([[1.0, 1.0]] * 9 + [[1.0, 3.0]] * 9)
        >>> times_s[12, 1] = np.nan
        >>> during(observe(times_s), 9, 18).times_s[:, 1].tolist()
        [3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    """
    rows = slice(start, stop)
    measured = observed.measured[rows]
    return replace(
        observed,
        times_s=_fill(observed.times_s[rows].copy(), measured),
        measured=measured,
        step_numbers=observed.step_numbers[rows],
        step_s=None,  # which is of all
        data_s=None if observed.data_s is None else observed.data_s[rows],
        samples=None if observed.samples is None else observed.samples[rows],
    )


def _gaps(times: Seconds, notes: list[str], *, in_a_run: bool) -> NDArray[np.bool_]:
    """Find the times that are none, make them NaN, and say what they are."""
    missing = ~np.isfinite(times)
    with np.errstate(invalid="ignore"):
        kinds = {"zero": times == 0, "negative": times < 0}
    for name, mask in kinds.items():
        if mask.any():
            notes.append(
                f"{_many(mask.sum(), 'time')} {name}, and a gradient takes longer than that: treated as missing"
            )
    gaps: NDArray[np.bool_] = missing | kinds["zero"] | kinds["negative"]
    times[gaps] = np.nan
    if (lost := int(missing.sum())) > 0:
        why = "busy with an older gradient, or the record ends before" if in_a_run else "not a number"
        was = "it was" if lost == 1 else "they were"
        notes.append(
            f"{lost} of {times.size} times {'is' if lost == 1 else 'are'} missing ({why}): "
            f"{was} drawn from the same worker's other times"
        )
    return gaps


def _warm_up(times: Seconds, notes: list[str]) -> int:
    """Return how many steps at the start are to be left out: there workers load and compile."""
    usual, fastest = float(np.nanmedian(times)), np.nanmin(times, axis=1)
    count, most = 0, min(5, len(times) // 10)
    while count < most and fastest[count] > _WARM_UP_FACTOR * usual:
        count += 1
    if count:
        notes.append(
            f"at the start {_many(count, 'step')} left out as warm-up (everyone took {fastest[0]:.3g} s or more, "
            f"the median is {usual:.3g} s)"
        )
    return count


def _fill(times: Seconds, measured: NDArray[np.bool_]) -> Seconds:
    """Draw what is missing from the same worker's times, or everyone's where it has too few.

    A computation's time is known whenever it ended, so the known times are no selection; only that
    which happened together is lost in the gaps.
    """
    rng = np.random.default_rng(0)
    everyone = times[measured]
    for column in np.flatnonzero(~measured.all(axis=0)):
        own = times[measured[:, column], column]
        pool = own if len(own) >= _LEAST_TIMES else everyone
        holes = np.flatnonzero(~measured[:, column])
        times[holes, column] = rng.choice(pool, len(holes))
    return times


def _many(number: int, noun: str) -> str:
    return f"1 {noun} is" if number == 1 else f"{number} {noun}s are"
