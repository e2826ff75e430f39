"""A record as columns: one number a step or a gradient and subject, however long the run was."""

from __future__ import annotations

import math
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import numpy as np

from mpisync.records import RecordReader, RunEnd, RunHeader, StepRecord

__all__ = ["ACCEPTED", "LATE", "REJECTED", "VERDICTS", "Run", "check_target", "read_run"]

VERDICTS = ("accepted", "late", "rejected")
ACCEPTED, LATE, REJECTED = range(3)

_STEPS = {
    "opened_s": "d",
    "closed_s": "d",
    "published_s": "d",
    "reduce_s": "d",
    "update_s": "d",
    "publish_s": "d",
    "target": "q",
    "alive": "q",
    "samples_used": "q",
    "updated": "b",
}
_GRADIENTS = {"worker": "q", "sequence": "q", "version": "q", "offset_s": "d", "samples": "q", "bytes": "q"}
_OPTIONAL = {"compute_s": "f", "data_s": "f", "loss": "f", "cost": "f"}  # None becomes nan
_CODES = {verdict: code for code, verdict in enumerate(VERDICTS)}
_LONGEST_S = 1e9  # three decades: no clock of a run shows more
_MOST = 2**53  # what a sum of floats still counts exactly


@dataclass(frozen=True)
class Run:
    """A record as far as it can be used.

    Attributes:
        path: Its file.
        header: What was run.
        first: The number of its first step; those of all others follow it.
        steps: Of each step its record's times (``opened_s``, ``closed_s``, ``published_s``,
            ``reduce_s``, ``update_s``, ``publish_s``), ``target``, ``alive``, ``samples_used``,
            ``updated``, and ``accepted``: how many gradients were.
        gradients: Of each gradient with a verdict, in the record's order: ``step`` (the position of
            the step that gave the verdict), ``verdict`` (a position in VERDICTS), ``arrived_s`` (by
            the root's clock), ``worker``, ``sequence``, ``version``, ``samples``, ``bytes``, and
            ``compute_s``, ``data_s``, ``loss``, ``cost``, which are nan where they are not known. Beside
            them ``own_samples``, without those of late gradients that were added in, and ``counted``:
            whether it was accepted, or added to one that was.
        metrics: Of each evaluation that the script told of, in the record's order: its ``version`` and ``value``.
        reasons: How many gradients were rejected for which reason.
        notices: What is missing of it, and why.
        end: How it ended; None where that is not recorded.
        is_damaged: Whether the record could not be read to its last line.
    """

    path: str
    header: RunHeader
    first: int
    steps: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    metrics: dict[str, np.ndarray]
    reasons: Counter[str] = field(default_factory=Counter)
    notices: list[str] = field(default_factory=list)
    end: RunEnd | None = None
    is_damaged: bool = False

    def __len__(self) -> int:
        """How many steps it has."""
        return len(self.steps["opened_s"])

    @property
    def planned(self) -> int | None:
        """How many steps were planned, as the header says of the first loop; None where more were made."""
        steps = self.header.steps
        return steps if steps is not None and len(self) <= steps else None

    @property
    def took_s(self) -> float:
        """From the first step's opening to the last one's publication."""
        return float(self.steps["published_s"][-1] - self.steps["opened_s"][0]) if len(self) else 0.0

    @property
    def ranks(self) -> int:
        """How many processes there were: the workers and the root, or one that trained alone."""
        is_alone = self.header.workers == 1 and self.header.root_cores > 0 and not self.header.transports
        return self.header.workers + (not is_alone)

    @property
    def peak_rss_bytes(self) -> list[int]:
        """The largest memory of each worker's process, then of the root's; 0 where that is not known."""
        known = self.end.peak_rss_bytes if self.end is not None else []
        ranks = self.header.workers + 1
        return known if len(known) == ranks else [0] * ranks

    def last_workers(self) -> np.ndarray:
        """Return whose gradient was the last that each step accepted; -1 where that is not recorded."""
        last = np.full(len(self), -1)
        accepted = self.gradients["verdict"] == ACCEPTED
        last[self.gradients["step"][accepted]] = self.gradients["worker"][accepted]  # the last one stays
        return last


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read a record as far as it can be used; `notices` says what could not.

    Args:
        path: The record, or a directory that holds it as ``record.jsonl``.

    Raises:
        ValueError: Not even its first line can be used.
        OSError: The file cannot be read.

    Example:
        >>> import os, tempfile
        >>> from mpisync.records import RecordWriter, RunHeader, StepRecord
        >>> path = os.path.join(tempfile.mkdtemp(), "record.jsonl")
        >>> with RecordWriter(path) as writer:
        ...     writer.header(RunHeader("backup:1", 2, 0, 0.0, "1", ["a", "a"]))
        ...     writer.step(StepRecord(0, 0.0, 0.5, 0.75, 1, 2, [(1, 0, 0)], []))
        >>> run = read_run(path)
        >>> len(run), run.took_s, run.notices
        (1, 0.75, [])
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        path = os.path.join(path, "record.jsonl")
    reader = RecordReader(path)
    columns, notices = _Columns(), []
    end: RunEnd | None = None
    is_damaged = True
    try:
        for step in reader:
            columns.add(step)
        end, is_damaged = _sound_end(reader.end), False
        if end is not None:
            columns.end(end)
    except (ValueError, OverflowError, RecursionError) as error:
        notices.append(f"{error}. Shown are the {columns.taken:,} steps before it.")
    if reader.torn is not None:
        notices.append(
            f"record {path}, line {reader.torn}: the line is torn, so the run goes on or was "
            f"killed. Shown are the {columns.taken:,} steps before it."
        )
    run = replace(columns.run(path, reader.header), end=end, is_damaged=is_damaged)
    run.notices[:0] = notices
    if not len(run):
        run.notices.append(f"record {path} holds no step that could be shown.")
    return run


def check_target(path: str, runs: Sequence[Run]) -> None:
    """Refuse to write over a record.

    Raises:
        ValueError: The path is one of the runs' records.
    """
    for run in runs:
        if os.path.exists(path) and os.path.samefile(path, run.path):
            raise ValueError(f"{path} is the record of a run and would be lost: give --out another path")


def _sound_end(end: RunEnd | None) -> RunEnd | None:
    """Return the end.

    Raises:
        ValueError: It has an absurd number.
    """
    if end is not None:
        numbers = [end.version, *end.handed, *end.requeued, *end.peak_rss_bytes]
        if max(numbers) >= _MOST or min(numbers) < 0:
            raise ValueError("the numbers of the run's end cannot be true")
    return end


class _Columns:
    """Collects steps."""

    def __init__(self) -> None:
        self.taken = 0
        self._first = 0
        self._steps = {name: array(code) for name, code in _STEPS.items()}
        self._gradients: dict[str, array[Any]] = {
            name: array(code) for name, code in {**_GRADIENTS, **_OPTIONAL}.items()
        }
        self._accepted, self._arrived, self._verdicts = array("q"), array("q"), array("b")
        self._reasons: Counter[str] = Counter()
        self._metrics: list[tuple[int, float]] = []
        self._carrying: list[tuple[int, list[int]]] = []  # gradients' positions, and the sequences added in

    def add(self, step: StepRecord) -> None:
        """Take the next step.

        Raises:
            OverflowError: A number has no place in its column; the step is not taken.
        """
        arrivals, place = step.arrivals, len(self._verdicts)
        for name, column in self._steps.items():
            column.append(getattr(step, name))
        for name, column in self._gradients.items():
            values: Iterable[Any] = map(attrgetter(name), arrivals)
            if name in _OPTIONAL:
                values = [math.nan if value is None else value for value in values]
            column.extend(values)
        self._verdicts.extend([_CODES[arrival.verdict] for arrival in arrivals])
        self._metrics.extend(step.metrics or ())
        self._accepted.append(len(step.accepted))
        self._arrived.append(len(arrivals))
        if not self.taken:
            self._first = step.step
        self.taken += 1
        for number, arrival in enumerate(arrivals):
            if arrival.verdict == "rejected":
                self._reasons[arrival.reason or "no reason given"] += 1
            if arrival.carried:
                self._carrying.append((place + number, arrival.carried))

    def run(self, path: str, header: RunHeader) -> Run:
        """Return what was collected, up to the first step that cannot have been."""
        steps = {name: _numbers(column)[: self.taken] for name, column in self._steps.items()}
        steps["accepted"] = _numbers(self._accepted)
        step = np.repeat(np.arange(self.taken, dtype=np.int32), _numbers(self._arrived))
        gradients = {name: _numbers(column)[: len(step)] for name, column in self._gradients.items()}
        sound = _sound_steps(steps, gradients, step)
        notices = []
        if sound < self.taken:
            notices.append(
                f"record {path}: the times or counts of step {self._first + sound} cannot be true. "
                f"Shown are the {sound:,} steps before it."
            )
        steps = {name: column[:sound] for name, column in steps.items()}
        shown = int(np.searchsorted(step, sound))
        gradients = {name: column[:shown] for name, column in gradients.items()}
        gradients["step"] = step[:shown]
        gradients["verdict"] = _numbers(self._verdicts)[:shown]
        gradients["arrived_s"] = steps["opened_s"][step[:shown]] + gradients.pop("offset_s")
        _tell_carried(gradients, [(place, added) for place, added in self._carrying if place < shown])
        return Run(path, header, self._first, steps, gradients, self._told(sound), self._reasons, notices)

    def end(self, end: RunEnd) -> None:
        """Take what was told after the last step."""
        self._metrics.extend(end.metrics)

    def _told(self, sound: int) -> dict[str, np.ndarray]:
        """Return the metrics that are numbers, of the first so many steps and the version they make."""
        last = self._first + sound
        told = [(version, value) for version, value in self._metrics if version <= last and math.isfinite(value)]
        return {
            "version": np.array([version for version, _ in told], dtype=np.int64),
            "value": np.array([value for _, value in told], dtype=float),
        }


def _tell_carried(gradients: dict[str, np.ndarray], carrying: list[tuple[int, list[int]]]) -> None:
    """Say of each gradient what is its own, and whether it counted."""
    own, counted = gradients["samples"].copy(), gradients["verdict"] == ACCEPTED
    worker, sequence = gradients["worker"], gradients["sequence"]
    late = np.flatnonzero(gradients["verdict"] == LATE).tolist() if carrying else []
    places = {(int(worker[place]), int(sequence[place])): place for place in late}
    for place, added in carrying:  # in the record's order: what is added in has its verdict by then
        found = [places[key] for one in added if (key := (int(worker[place]), one)) in places]
        own[place] = max(own[place] - own[found].sum(), 0)
        counted[found] |= counted[place]
    gradients["own_samples"], gradients["counted"] = own, counted


def _numbers(column: array[Any]) -> np.ndarray:
    """Return a column without copying it."""
    return np.frombuffer(column, column.typecode)


def _sound_steps(
    steps: dict[str, np.ndarray], gradients: dict[str, np.ndarray], step: np.ndarray
) -> int:
    """Return how many steps from the first have times in order and no absurd number."""
    opened_s, closed_s, published_s = (steps[f"{name}_s"] for name in ("opened", "closed", "published"))
    with np.errstate(invalid="ignore"):
        sound = (opened_s <= closed_s) & (closed_s <= published_s)
        sound[1:] &= opened_s[:-1] <= opened_s[1:]
        for name, code in _STEPS.items():
            sound &= np.abs(steps[name]) < (_LONGEST_S if code == "d" else _MOST)
        for name in _GRADIENTS:
            most = _LONGEST_S if name == "offset_s" else _MOST
            sound[step[~(np.abs(gradients[name]) < most)]] = False
        for name in ("samples", "bytes"):
            sound[step[gradients[name] < 0]] = False
        for name in ("samples_used", "target", "alive"):
            sound &= steps[name] >= 0
    return len(sound) if sound.all() else int(sound.argmin())
