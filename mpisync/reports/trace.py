"""A run as a timeline: a row a rank, in the trace-event format that Perfetto and Chrome show.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np

from mpisync.reports.columns import ACCEPTED, LATE, VERDICTS, Run
from mpisync.reports.spans import Spans, lay_out

__all__ = ["MOST_GRADIENTS", "steps_that_fit", "write_trace"]

MOST_GRADIENTS = 100_000  # some 70 MB; viewers hold a trace in memory
_PROCESS = 1  # one for all ranks: Perfetto orders processes as it likes, but not the threads of one
_FIRST_ROW = 1000  # worker 0's: Perfetto takes thread 0 for the machine's idle one
_ROOT = -1  # its row comes before theirs
_COLOURS = {"accepted": "good", "late": "bad", "rejected": "terrible"}  # Chrome's names


def steps_that_fit(run: Run) -> range:
    """Return the run's last steps, as numbered, that have no more than MOST_GRADIENTS.

    Example:
        >>> import os, tempfile
        >>> from mpisync.records import RecordWriter, RunHeader, StepRecord
        >>> from mpisync.reports.columns import read_run
        >>> path = os.path.join(tempfile.mkdtemp(), "record.jsonl")
        >>> with RecordWriter(path) as writer:
        ...     writer.header(RunHeader("backup:1", 2, 0, 0.0, "1", ["a", "a"]))
        ...     writer.step(StepRecord(7, 0.0, 0.5, 0.6, 1, 2, [(1, 0, 0)], []))
        >>> steps_that_fit(read_run(path))
        range(7, 8)
    """
    step = run.gradients["step"]
    begin = int(step[-MOST_GRADIENTS - 1]) + 1 if len(step) > MOST_GRADIENTS else 0
    return range(run.first + min(begin, max(len(run) - 1, 0)), run.first + len(run))


def write_trace(run: Run, steps: range, file: TextIO) -> int:
    """Write the timeline of some steps as JSON.

    Each rank is a row. The root's shows each step: gathering, reduce, update, publish, as recorded. A
    worker's shows each gradient: data, compute, send, and the wait for its verdict. A gradient's
    compute is named, coloured and categorised by its verdict. What is worked out rather than recorded
    is in the category "estimated" and has ``"estimated": true`` among its arguments.

    Args:
        run: The run.
        steps: The numbers of its steps whose verdicts are shown.
        file: Where to write.

    Returns:
        How many events were written.
    """
    about = {
        "policy": run.header.policy,
        "record": run.path,
        "steps": f"{steps.start} to {steps.stop - 1}",
        "estimated": "when workers began, and so data, compute, send and wait in time; arrivals, and "
        "what the root did, are recorded",
    }
    file.write(f'{{"displayTimeUnit":"ms","otherData":{json.dumps(about)},"traceEvents":[')
    number = 0
    for event in _events(run, range(steps.start - run.first, steps.stop - run.first)):
        file.write(f"{',' if number else ''}\n{json.dumps(event, separators=(',', ':'))}")
        number += 1
    file.write("\n]}\n")
    return number


class _Clock:
    """Turns the root's seconds into a trace's microseconds, whole nanoseconds each.

    Slices that touch do so exactly: a viewer takes the least overlap for nesting.
    """

    def __init__(self, zero_s: float) -> None:
        self._zero_s = zero_s

    def __call__(self, times_s: np.ndarray) -> np.ndarray:
        return np.rint((times_s - self._zero_s) * 1e9).astype(np.int64)


def _events(run: Run, steps: range) -> Iterator[dict[str, Any]]:
    yield from _rows(run)
    if not steps:
        return
    spans = lay_out(run)
    shown = np.flatnonzero(
        (run.gradients["step"][spans.order] >= steps.start) & (run.gradients["step"][spans.order] < steps.stop)
    )
    # Nothing begins before zero: some viewers leave out what does.
    zero_s = min(float(run.steps["opened_s"][steps.start]), float(spans.began_s[shown].min(initial=np.inf)))
    clock = _Clock(zero_s)
    yield from _root_events(run, steps, clock)
    yield from _worker_events(run, spans, shown, clock)


def _rows(run: Run) -> Iterator[dict[str, Any]]:
    """Name the rows, the root's before the workers'."""
    several = len(set(run.header.hosts)) > 1
    yield _meta("process_name", _ROOT, name=f"mpisync {run.header.policy}")
    for row, host in [(_ROOT, ""), *enumerate(run.header.hosts)]:
        name = "root" if row == _ROOT else f"worker {row} on {host}" if several else f"worker {row}"
        yield _meta("thread_name", row, name=name)
        yield _meta("thread_sort_index", row, sort_index=row)


def _meta(kind: str, row: int, **arguments: object) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": _PROCESS, "tid": _FIRST_ROW + row, "args": arguments}


def _slice(
    name: str, category: str, row: int, begin_ns: int, end_ns: int, arguments: dict[str, Any]
) -> dict[str, Any]:
    return {
        "ph": "X", "name": name, "cat": category, "pid": _PROCESS, "tid": _FIRST_ROW + row,
        "ts": begin_ns / 1e3, "dur": (end_ns - begin_ns) / 1e3, "args": arguments,
    }  # fmt: skip


def _root_events(run: Run, steps: range, clock: _Clock) -> Iterator[dict[str, Any]]:
    """Each step, and in it what the root did: all of it is recorded."""
    inside = slice(steps.start, steps.stop)
    column = {name: values[inside] for name, values in run.steps.items()}
    reduced_s = column["closed_s"] + column["reduce_s"].clip(0.0)
    updated_s = reduced_s + column["update_s"].clip(0.0)
    bounds_s = [column["opened_s"], column["closed_s"], reduced_s, updated_s, column["published_s"]]
    bounds = np.stack([clock(np.minimum(times_s, column["published_s"])) for times_s in bounds_s], axis=1)
    bounds = np.maximum.accumulate(bounds.ravel()).reshape(bounds.shape)
    last = run.last_workers()[inside]
    for n, step in enumerate(steps):
        times = [int(t) for t in bounds[n]]
        arguments = {
            "step": run.first + step,
            "wanted": int(column["target"][n]),
            "accepted": int(column["accepted"][n]),
            "alive": int(column["alive"][n]),
            "last": f"worker {last[n]}" if last[n] >= 0 else None,
            "samples": int(column["samples_used"][n]),
            "updated": bool(column["updated"][n]),
        }
        yield _slice(f"step {run.first + step}", "step", _ROOT, times[0], times[-1], arguments)
        for name, begin, end in zip(("gather", "reduce", "update", "publish"), times, times[1:], strict=False):
            if end > begin:
                yield _slice(name, "root", _ROOT, begin, end, {"step": run.first + step})


def _worker_events(
    run: Run, spans: Spans, shown: np.ndarray, clock: _Clock
) -> Iterator[dict[str, Any]]:
    """Each gradient in the order of workers and time."""
    lasted_s = (spans.began_s, spans.data_s, spans.compute_s)
    bounds = [clock(np.add.reduce([part[shown] for part in lasted_s[: n + 1]])) for n in range(3)]
    arrived = clock(spans.arrived_s[shown])
    bounds = [*(np.minimum(times, arrived) for times in bounds), arrived, clock(spans.until_s[shown])]
    gradients = {name: column[spans.order[shown]] for name, column in run.gradients.items()}
    for n in range(len(shown)):
        own = {name: column[n] for name, column in gradients.items()}
        worker, step = int(own["worker"]), run.first + int(own["step"])
        verdict = VERDICTS[own["verdict"]]
        late_by = step - int(own["version"]) if own["verdict"] == LATE else 0
        about = {
            "sequence": int(own["sequence"]),
            "version": int(own["version"]),
            "step": step,
            "verdict": verdict,
            "samples": int(own["samples"]),
            "bytes": int(own["bytes"]),
        }
        if np.isfinite(own["loss"]):
            about["loss"] = round(float(own["loss"]), 6)
        if np.isfinite(own["cost"]):
            about["cost"] = round(float(own["cost"]), 6)
        if late_by:
            about["late_by"] = late_by
        estimated = {"estimated": True}
        times = [int(times[n]) for times in bounds]
        compute = "compute" if own["verdict"] == ACCEPTED else f"compute ({verdict})"
        names = ("data", compute, "send", "wait")
        for name, begin, end in zip(names, times, times[1:], strict=False):
            if end <= begin:
                continue
            if name == compute:
                event = _slice(name, f"{verdict},estimated", worker, begin, end, {**about, **estimated})
                event["cname"] = _COLOURS[verdict]
            else:
                event = _slice(name, "estimated", worker, begin, end, {"version": about["version"], **estimated})
            yield event
        mark = f"late by {late_by}" if late_by else verdict
        yield {
            "ph": "i", "name": mark, "cat": verdict, "pid": _PROCESS, "tid": _FIRST_ROW + worker,
            "s": "t", "ts": times[3] / 1e3,
        }  # fmt: skip
