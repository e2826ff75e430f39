"""Where each worker's time went, from arrivals and what workers say about themselves.

A record holds when each gradient arrived, how long its batch was waited for and how long it was
computed. When that began is not in it, and is estimated here: a worker goes on as soon as it has its
verdict and the version that it computes at. So one gradient of a worker lies in time as

    began ─ data ─ compute ─ send ─▶ arrived ─ wait ─▶ began the next

Send is what is left over between beginning and arrival: both ways of the messages, and the time a
sleeping worker took to wake up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpisync.reports.columns import ACCEPTED, Run

__all__ = ["Spans", "lay_out"]


@dataclass(frozen=True)
class Spans:
    """Each gradient's place in time, sorted by worker and then by sequence.

    Attributes:
        order: Positions of the gradients in the run's columns.
        began_s: When its worker went on to it (estimated), by the root's clock.
        data_s: How long it waited for the batch.
        compute_s: How long it computed.
        send_s: How long parameters and gradient were under way (estimated).
        arrived_s: When the gradient had arrived.
        until_s: When the worker went on (estimated): the next one's beginning, or its verdict.
        response_s: From the version's publication to the arrival; nan where that is not known.
        guessed: Whether not even data and compute are known.
    """

    order: np.ndarray
    began_s: np.ndarray
    data_s: np.ndarray
    compute_s: np.ndarray
    send_s: np.ndarray
    arrived_s: np.ndarray
    until_s: np.ndarray
    response_s: np.ndarray
    guessed: np.ndarray

    @property
    def wait_s(self) -> np.ndarray:
        """How long the worker waited after the arrival."""
        return np.asarray(self.until_s - self.arrived_s)


def lay_out(run: Run) -> Spans:
    """Lay a run's gradients out in time; no two of one worker overlap.

    Example:
        >>> import os, tempfile
        >>> from mpisync.records import ArrivalRecord, RecordWriter, RunHeader, StepRecord
        >>> from mpisync.reports.columns import read_run
        >>> path = os.path.join(tempfile.mkdtemp(), "record.jsonl")
        >>> with RecordWriter(path) as writer:
        ...     writer.header(RunHeader("backup:0", 1, 0, 0.0, "1", ["a"]))
        ...     for step in range(2):
        ...         came = ArrivalRecord(0, step, step, "accepted", 0.75, compute_s=0.5, data_s=0.125)
        ...         writer.step(StepRecord(step, step, step + 0.75, step + 1, 1, 1, [(0, step, step)], [came]))
        >>> spans = lay_out(read_run(path))
        >>> [float(spans.began_s[1]), float(spans.send_s[1]), float(spans.wait_s[0])]
        [1.0, 0.125, 0.25]
    """
    steps, gradients = run.steps, run.gradients
    worker, step, version = gradients["worker"], gradients["step"], gradients["version"]
    order = np.lexsort((gradients["sequence"], worker))
    worker, step, version = worker[order], step[order], version[order] - run.first
    starts = np.flatnonzero(np.diff(worker, prepend=-1))
    ends = np.flatnonzero(np.diff(worker, append=-1)) + 1
    arrived_s = gradients["arrived_s"][order]
    for begin, end in zip(starts, ends, strict=True):
        np.maximum.accumulate(arrived_s[begin:end], out=arrived_s[begin:end])

    accepted = gradients["verdict"][order] == ACCEPTED
    heard_s = np.maximum(arrived_s, steps["opened_s"][step])
    verdict_s = np.where(accepted, np.maximum(heard_s, steps["published_s"][step]), heard_s)
    visible_s = _visible_s(run)[np.clip(version, -1, len(run) - 1)]
    visible_s[(version < 0) | (version >= len(run))] = np.nan

    data_s, compute_s = (_known(gradients[name][order]) for name in ("data_s", "compute_s"))
    guessed = ~np.isfinite(gradients["compute_s"][order])
    latest_s = arrived_s - data_s - compute_s
    before_s, verdict_before_s = np.roll(arrived_s, 1), np.roll(verdict_s, 1)
    began_s = np.fmax(verdict_before_s, visible_s)
    # It is known to have begun so early; it cannot have before it was through with the last one.
    began_s = np.maximum(np.minimum(began_s, latest_s), before_s)
    began_s[starts] = np.minimum(np.maximum(latest_s, steps["opened_s"][:1])[starts], arrived_s[starts])
    room_s = arrived_s - began_s
    data_s = np.minimum(data_s, room_s)
    compute_s = np.where(guessed, room_s - data_s, np.minimum(compute_s, room_s - data_s))
    until_s = np.roll(began_s, -1)
    until_s[ends - 1] = verdict_s[ends - 1]
    return Spans(
        order=order,
        began_s=began_s,
        data_s=data_s,
        compute_s=compute_s,
        send_s=np.maximum(room_s - data_s - compute_s, 0.0),
        arrived_s=arrived_s,
        until_s=np.maximum(until_s, arrived_s),
        response_s=np.maximum(arrived_s - visible_s, 0.0),
        guessed=guessed,
    )


def _visible_s(run: Run) -> np.ndarray:
    """Return when each version could be had: in the midst of the step before, behind its update."""
    steps = run.steps
    updated_s = steps["published_s"] - np.clip(steps["publish_s"], 0.0, None)
    return np.append(steps["opened_s"][:1], np.maximum(updated_s, steps["closed_s"])[:-1])


def _known(column: np.ndarray) -> np.ndarray:
    known = np.nan_to_num(column.astype(float), nan=0.0, posinf=0.0, neginf=0.0)
    return np.asarray(known.clip(0.0))
