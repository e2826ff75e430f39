"""What a run's record says of its workers' times."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from mpisync.planning.laws import Seconds
from mpisync.records import ArrivalRecord, RunHeader, StepRecord, read_record
from mpisync.records.turnarounds import Turnarounds

__all__ = ["RunTimes", "times_of_run"]

_SILENT_FACTOR = 3.0  # a last computation that lasts so many times the worker's median is told


@dataclass(frozen=True)
class RunTimes:
    """The times in a record, by version and worker; NaN where a worker computed nothing at one.

    Late and rejected gradients are among them, at the version they were computed at, so that
    nothing beyond N is censored. A gradient that had not arrived when the run ended is not, but for
    one that had already taken far longer than usual: it counts with the time it had taken by then.

    Attributes:
        times_s: Waiting for data and computing, in seconds, (versions, workers).
        data_s: The waiting for data in it.
        samples: How many samples each gradient is the mean of.
        workers: Their numbers.
        names: Their hosts.
        steps: The versions; or places in the workers' sequences, where they gave several at one version.
        policy: That ran.
        overhead_s: What a step took beyond the computation of its last gradient, in seconds.
        step_s: What a step took, in seconds.
        records: The record's steps.
        notes: What is to be said of the record.
    """

    times_s: Seconds
    data_s: Seconds
    samples: Seconds
    workers: list[int]
    names: list[str]
    steps: NDArray[np.int64]
    policy: str
    overhead_s: float
    step_s: float
    records: list[StepRecord]
    notes: list[str]


def times_of_run(path: str | os.PathLike[str]) -> RunTimes:
    """Read a record's times.

    Raises:
        ValueError: The record is damaged other than by a torn last line, or has no times.
        OSError: It cannot be read.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        header, steps = read_record(path)
    notes = [str(one.message) for one in caught]
    if not steps:
        raise ValueError(f"the record {os.fspath(path)} holds no step yet: let the run go on for some")
    found, first = _by_version(header, steps, notes)
    if not np.isfinite(found[0]).any():
        raise ValueError(f"the record {os.fspath(path)} holds no compute times of gradients")
    if steps[-1].alive < header.workers:
        notes.append(f"{header.workers - steps[-1].alive} of {header.workers} workers were dead at the end")
    _count_silent(header, steps, found[0], first, notes)
    later = steps[min(5, len(steps) // 10) :]  # without the warm-up
    step_s = (later[-1].published_s - later[0].opened_s) / len(later)
    workers, versions = list(range(header.workers)), np.arange(len(found[0])) + (first or 0)
    return RunTimes(
        *found, workers, header.hosts, versions, header.policy, _overhead_s(later), step_s, steps, notes
    )  # fmt: skip


def _by_version(
    header: RunHeader, steps: list[StepRecord], notes: list[str]
) -> tuple[tuple[Seconds, Seconds, Seconds], int | None]:
    """Return times, the data's part of them and samples, by version and worker; the first version.

    Where a worker gave several at one version they are by sequence, and there is no first version.
    """
    arrivals = [arrival for step in steps for arrival in step.arrivals]
    keys = {(a.worker, a.version) for a in arrivals}
    several = len(keys) < len(arrivals)
    if several:
        notes.append(
            "workers gave several gradients at one version, so steps are not common to them: each worker's "
            "n-th gradients are taken together, and what is said of clustering in steps means little"
        )
    places = [a.sequence if several else a.version for a in arrivals]
    first, last = min(places, default=0), max(places, default=0)
    times_s, data_s = np.full((2, last - first + 1, header.workers), np.nan)
    samples = np.zeros_like(times_s)
    for place, arrival in zip(places, arrivals, strict=True):
        if arrival.compute_s is not None:
            at = place - first, arrival.worker
            data_s[at] = arrival.data_s or 0.0
            times_s[at] = arrival.compute_s + data_s[at]
            samples[at] = arrival.samples
    return (times_s, data_s, samples), None if several else first


def _count_silent(
    header: RunHeader, steps: list[StepRecord], times_s: Seconds, first: int | None, notes: list[str]
) -> None:
    """Count what a worker was computing when the run ended, if it had taken far longer than usual."""
    for worker, (version, silent_s) in enumerate(Turnarounds(steps, header.workers).pending):
        own = times_s[np.isfinite(times_s[:, worker]), worker]
        usual_s = float(np.median(own)) if len(own) else float(np.nanmedian(times_s))
        if silent_s <= _SILENT_FACTOR * usual_s:
            continue
        if first is None or not first <= version < first + len(times_s):
            continue
        if math.isnan(times_s[version - first, worker]):
            times_s[version - first, worker] = silent_s
            notes.append(
                f"worker {worker}'s last gradient had not come after {silent_s:.3g} s when the record ends "
                f"(usually {usual_s:.3g} s): counted as {silent_s:.3g} s"
            )


def _overhead_s(steps: list[StepRecord]) -> float:
    """Return what a step takes beyond a computation that began when it opened, in seconds."""
    beyond: list[float] = []
    fresh: set[int] = set()
    for step in steps:
        beyond += [x for a in step.arrivals if a.worker in fresh and (x := _beyond_s(a, step)) is not None]
        fresh = {worker for worker, _, _ in step.accepted}
    return (fmean(beyond) if beyond else 0.0) + fmean(s.published_s - s.closed_s for s in steps)


def _beyond_s(arrival: ArrivalRecord, step: StepRecord) -> float | None:
    if arrival.version != step.step or arrival.compute_s is None or not math.isfinite(arrival.offset_s):
        return None
    return max(0.0, arrival.offset_s - arrival.compute_s - (arrival.data_s or 0.0))
