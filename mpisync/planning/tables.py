"""Tables of times: a line a step and a column a worker, or a line a gradient.

What each column is taken for is guessed from its name and its numbers, and said. A table that cannot
be workers' times is refused, since a column of something else would be a worker that straggles.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpisync.planning.cells import UNITS
from mpisync.planning.columns import Columns, family, has_role, is_other, is_phase, is_summary, read_columns, words
from mpisync.planning.laws import Seconds

__all__ = ["Table", "read_table"]

_INDEX = {"", "unnamed", "index", "idx", "row", "n"}  # names of a first column that numbers the lines
_NUMBERED = {"worker", "rank", "w", "r", "p", "proc", "process", "gpu", "device", "dp", "replica"}
_LONGEST_S = 86_400.0  # a median time of a worker that is longer is in another unit, or no time
_APART, _APART_IF_NAMED = 20.0, 300.0  # times as long as the others, or as short, beyond which a column is no worker
_FEWEST_TIMES = 3  # of a worker
_FEWEST_ROWS = 10  # from which a column that only grows, or never changes, is taken for something else
_OPTIONS = "name the columns of a line a gradient by --step, --worker and --seconds"


@dataclass(frozen=True)
class Table:
    """What a table holds.

    Attributes:
        times_s: Seconds, (steps, workers), NaN where there is none.
        workers: The workers' numbers, of their names where these have one each.
        names: The workers' names; empty where they say no more than the numbers.
        steps: The number of each step.
        notes: What was taken for what, and what was left out: a sentence each.
    """

    times_s: Seconds
    workers: list[int]
    names: list[str]
    steps: NDArray[np.int64]
    notes: list[str]


def read_table(path: str, *, step: str | None = None, worker: str | None = None, seconds: str | None = None) -> Table:
    """Read a table in any form in which it can be told what is what.

    Args:
        path: The file; it may be gzipped. `#` begins a comment, an empty field is a gap.
        step: The name of the steps' column, or its number from 1; guessed by default.
        worker: The workers' column in a table with a line a gradient, likewise.
        seconds: Its column of times, likewise.

    Raises:
        ValueError: It holds no workers' times, or it cannot be told where; it says what to do.
        OSError: It cannot be read.
    """
    columns = read_columns(path)
    is_long = columns.of_role("worker") and len(columns.names) > 1 and not family(columns.names)
    if worker is not None or seconds is not None or is_long:
        return _read_long(columns, step, worker, seconds)
    return _read_wide(columns, step)


# -- a line a step, a column a worker --------------------------------------------------------------


def _read_wide(columns: Columns, step: str | None) -> Table:
    at = columns.find(step, "--step") if step is not None else _index(columns)
    chosen = [c for c in range(len(columns.names)) if c != at]
    left: list[int] = []
    if columns.has_header:
        chosen, left = _workers_by_name(columns, chosen)
    if not chosen:
        raise columns.error("it holds no worker's times beside the steps' numbers")
    is_family = 1 < len(chosen) == len(family([columns.names[c] for c in chosen]))
    _refuse_split_decimals(columns, chosen)
    times_s = columns.seconds(chosen)
    summary = None if is_family else _summary(times_s)
    if summary is not None:
        columns.notes.append(f"{columns.call(chosen.pop(summary))} sums up the others in each line and was left out")
        times_s = np.delete(times_s, summary, axis=1)
    if len(times_s) > 3 and np.allclose(times_s[-1], np.nansum(times_s[:-1], axis=0), rtol=2e-3, atol=0):
        raise columns.error("it is the sum of the lines above it: leave it out", columns.lines[-1])
    _refuse_other_things(columns, [columns.call(c) for c in chosen], chosen, times_s, is_family=is_family)
    steps, order = _steps(columns, at, len(times_s))
    names = [columns.names[c] for c in chosen]
    who = f"{len(chosen)} workers in columns {chosen[0] + 1} to {chosen[-1] + 1}"
    if len(chosen) == 1:
        who = f"one worker in {columns.call(*chosen)}"
    elif names[0]:
        who += f" ({names[0]} to {names[-1]})"
    where = "no column of step numbers" if at is None else f"step in {columns.call(at)}"
    reading = f"read as a line a step, a column a worker: {where}, {who}, {_seconds(columns)}"
    return _table(columns, times_s[order], _numbered(names), steps, reading, left)


def _index(columns: Columns) -> int | None:
    """Return the column of the steps' numbers: by its name, or the first one if it counts up."""
    named = columns.of_role("step")
    if len(named) > 1:
        raise columns.error(f"{columns.call(*named)} may all be the step: say which by --step NAME")
    if named or len(columns.names) == 1:
        return named[0] if named else None
    values, name = columns.whole_numbers(0), columns.names[0]
    counts = values is not None and len(values) > 1 and values[1] > values[0] and len(set(np.diff(values))) == 1
    if name:
        return 0 if words(name) and not words(name) - _INDEX else None
    return 0 if counts and (len(columns.lines) > 3 or columns.has_header) else None


def _workers_by_name(columns: Columns, chosen: list[int]) -> tuple[list[int], list[int]]:
    """Return the workers' columns, and those to be left out; refuse if a name is of neither."""
    names = columns.names
    summaries = [c for c in chosen if is_summary(names[c])]
    rest = [c for c in chosen if c not in summaries]
    alike = [rest[c] for c in family([names[c] for c in rest])]
    roles = ("step", "seconds") if alike else ("step", "worker", "seconds")  # `rank` beside `rank1` is a slip
    known = [
        c for c in rest if c not in alike and (is_other(names[c]) or has_role(names[c], *roles) or is_phase(names[c]))
    ]
    what = ""
    if alike:
        odd = [c for c in rest if c not in alike and c not in known] or [c for c in alike if is_other(names[c])]
        if odd:
            what = "not named as workers' times are (rank0, rank1, ...): keep a column a worker, named alike"
    else:
        odd = [c for c in known if len(rest) > 1 or is_other(names[c])]
        if odd:
            what = f"not a worker's times: keep the step's column and one column a worker, or {_OPTIONS}"
    if what:
        raise columns.error(f"{columns.call(*odd)} {'is' if len(odd) == 1 else 'are'} {what}")
    return (alike, sorted(summaries + known)) if alike else (rest, summaries)


def _steps(columns: Columns, at: int | None, rows: int) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    """Return the steps' numbers in order, and the order of the rows."""
    if at is None:
        return np.arange(rows), np.arange(rows)
    numbers = _step_numbers(columns, at)
    order = np.argsort(numbers, kind="stable")
    steps = numbers[order]
    if (twice := np.flatnonzero(np.diff(steps) == 0)).size:
        raise columns.error(f"step {steps[twice[0]]} stands in two lines: give one line a step, and one run a file")
    if (order != np.arange(rows)).any():
        columns.notes.append(f"lines were put in the order of {columns.call(at)}")
    return steps, order


def _step_numbers(columns: Columns, at: int) -> NDArray[np.int64]:
    values = columns.numbers(at)
    if (wrong := np.flatnonzero(~(values == np.round(values)) | ~np.isfinite(values))).size:
        what = f"{columns.call(at)} must be the step's whole number, not {columns.fields[at][wrong[0]]!r}"
        raise columns.error(what, columns.lines[wrong[0]])
    return values.astype(np.int64)


# -- a line a gradient -----------------------------------------------------------------------------


def _read_long(columns: Columns, step: str | None, worker: str | None, seconds: str | None) -> Table:
    given = {"step": step, "worker": worker, "seconds": seconds}
    at = {role: columns.find(name, f"--{role}") for role, name in given.items() if name is not None}
    for role in [role for role in given if role not in at]:
        found = [c for c in columns.of_role(role) if c not in at.values()]
        if len(found) != 1:
            why = f"{columns.call(*found)} may all be the {role}" if found else f"no column's name tells the {role}"
            raise columns.error(f"{why}: say which by --{role}, with its name or number")
        at[role] = found[0]
    if len(set(at.values())) < 3:
        raise columns.error("--step, --worker and --seconds must be three different columns")
    who = columns.fields[at["worker"]]
    if "" in who:
        raise columns.error(f"{columns.call(at['worker'])} names no worker", columns.lines[who.index("")])
    steps, row = np.unique(_step_numbers(columns, at["step"]), return_inverse=True)
    known = Counter(who)
    labels = sorted(known, key=_natural)
    if few := [one for one in labels if known[one] < _FEWEST_TIMES] if len(steps) >= _FEWEST_ROWS else []:
        raise columns.error(
            f"worker {few[0]!r} has a time in {known[few[0]]} of {len(steps)} steps only: mend its name if it is "
            "misspelt, leave it out if it hardly took part", columns.lines[who.index(few[0])],
        )  # fmt: skip
    place = {label: c for c, label in enumerate(labels)}
    column = np.array([place[one] for one in who])
    times = columns.seconds([at["seconds"]])[:, 0]
    if len(labels) > 1 and np.median(np.bincount(row)) < 2:
        raise columns.error(
            f"most steps have one worker's time only, so {columns.call(at['step'])} is not the step: say which column "
            "is, by --step"
        )
    pairs = Counter(zip(row.tolist(), column.tolist(), strict=True))
    if twice := next((pair for pair, count in pairs.items() if count > 1), None):
        lines = [line for line, *pair in zip(columns.lines, row, column, strict=True) if tuple(pair) == twice]
        raise columns.error(
            f"step {steps[twice[0]]} of worker {labels[twice[1]]} stands in lines {lines[0]} and {lines[1]}: give "
            "one line for both, with what they took together; name workers of several hosts apart; and one run a file"
        )
    if len(times) >= _FEWEST_ROWS and (np.diff(times) > 0).all():
        what = columns.call(at["seconds"])
        raise columns.error(f"{what} only grows: these are times of day, or sums; give what each took")
    times_s = np.full((len(steps), len(labels)), np.nan)
    times_s[row, column] = times
    each = [f"worker {label} in {columns.call(at['seconds'])}" for label in labels]
    _refuse_other_things(columns, each, [at["seconds"]] * len(labels), times_s, is_family=True)
    reading = (
        f"read as a line a gradient: step in {columns.call(at['step'])}, {len(labels)} workers in "
        f"{columns.call(at['worker'])}, "
        f"{_seconds(columns)} in {columns.call(at['seconds'])}"
    )
    left = [c for c in range(len(columns.names)) if c not in at.values()]
    return _table(columns, times_s, _numbered(labels), steps, reading, left)


def _natural(label: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", label)]


def _numbered(names: list[str]) -> tuple[list[int], list[str]]:
    """Return workers' numbers, and their names unless these say no more."""
    digits = [re.findall(r"\d+", name) for name in names]
    own = {int(one[0]) for one in digits if len(one) == 1 and len(one[0]) < 10}
    if len(own) < len(names) or (len(names) > 1 and len(family(names)) < len(names)):
        return list(range(len(names))), names if len(names) > 1 and any(names) else []
    says_more = any(words(name) - _NUMBERED - UNITS.keys() for name in names)
    return [int(one[0]) for one in digits], names if says_more else []


# -- what is no worker's time ----------------------------------------------------------------------


def _refuse_split_decimals(columns: Columns, chosen: list[int]) -> None:
    """Refuse decimal commas between commas: `0,25,0,31` would be four whole numbers."""
    values = [columns.whole_numbers(c) for c in chosen]
    if columns.cells.delimiter != "commas" or len(chosen) % 2 or any(one is None or not len(one) for one in values):
        return
    parts = [one for c in chosen[1::2] for one in columns.fields[c]]
    medians = np.array([np.median(one) for one in values if one is not None])
    zeros = all("0" in columns.fields[c] for c in chosen[::2]) or any(re.fullmatch(r"0\d+", one) for one in parts)
    if zeros or (len(columns.lines) > 3 and (medians[1::2] > 5 * np.maximum(medians[::2], 1)).all()):
        raise columns.error(
            "commas seem to separate decimals as well as fields: write decimals with a point, or separate fields by "
            "semicolons or tabs"
        )


def _summary(times_s: Seconds) -> int | None:
    """Return a column that is the sum, mean, longest or shortest of the others in each line."""
    rows, width = times_s.shape
    if rows < 3 or width < 3 or np.isnan(times_s).any():
        return None
    for c in (width - 1, 0):
        own, others = times_s[:, c], np.delete(times_s, c, axis=1)
        for summary in (others.sum(axis=1), others.mean(axis=1), others.max(axis=1), others.min(axis=1)):
            if np.ptp(own) and np.allclose(own, summary, rtol=2e-3, atol=0):
                return c
    return None


def _refuse_other_things(
    columns: Columns, each: list[str], chosen: list[int], times_s: Seconds, *, is_family: bool
) -> None:
    """Refuse columns whose numbers cannot be what a worker took for its gradients."""
    has_decimals = [any(re.search(r"[.,:e]", one.lower()) for one in columns.fields[c]) for c in chosen]
    known = [one[np.isfinite(one) & (one > 0)] for one in times_s.T]
    medians = np.array([np.median(one) if len(one) else np.nan for one in known])
    for who, values, median, has in zip(each, known, medians, has_decimals, strict=True):
        what = ""
        if median > _LONGEST_S:
            raise columns.error(
                f"{who} has a median of {median:,.6g} s, more than a day: no gradient takes that. If these are times "
                "of day, give differences; if they are in ms, us or ns, say so in the column's name (rank0_ms)"
            )
        if len(values) >= _FEWEST_ROWS:
            if not np.ptp(values):
                what = f"is {values[0]:g} in every step"
            elif (np.diff(values) >= 0).all():
                what = "only grows"
            elif any(has_decimals) and not has:
                what = "has whole numbers, while others have decimals"
        if what:
            raise columns.error(
                f"{who} {what}, as times of gradients do not: if it is a number, a time of day or a setting leave it "
                f"out, or {_OPTIONS}"
            )
    for c, (who, median) in enumerate(zip(each, medians, strict=True)):
        others = np.delete(medians, c)
        usual = float(np.median(others[np.isfinite(others)])) if np.isfinite(others).any() else np.nan
        if max(median / usual, usual / median) > (_APART_IF_NAMED if is_family else _APART):
            named = "" if is_family else "; if all are workers name them rank0, rank1, ..."
            raise columns.error(
                f"{who} has a median of {median:.3g}, the others of {usual:.3g}: if it is no worker leave it out; if "
                f"it has another unit convert it{named}"
            )


# -- words -----------------------------------------------------------------------------------------


def _seconds(columns: Columns) -> str:
    return f"seconds (from {', '.join(sorted(columns.units))})" if columns.units - {"s"} else "seconds"


def _table(
    columns: Columns, times_s: Seconds, who: tuple[list[int], list[str]], steps: NDArray[np.int64], reading: str,
    left: list[int],
) -> Table:
    mark = "point" if columns.mark == "." else "comma"
    reading += f"; {columns.cells.delimiter or 'nothing'} between fields, decimal {mark}"
    if left:
        reading += f"; left out {columns.call(*left)}"
    return Table(times_s, *who, steps, [reading, *columns.notes])
