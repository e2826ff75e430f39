"""The columns of a table: their names, their numbers, and what a name says of what is in one."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mpisync.planning.cells import UNITS, Cells, decimal_mark, is_number, number, read_cells
from mpisync.planning.laws import Seconds

__all__ = ["Columns", "family", "has_role", "is_other", "is_phase", "is_summary", "read_columns", "words"]

# What names are made of: the words that tell a role, the first of which are preferred; and what may stand beside them.
_ROLES = {
    "step": ({"step", "iteration", "iter"}, {"batch", "minibatch"}),
    "worker": (
        {"worker", "rank"}, {"replica", "process", "gpu", "device"}, {"node", "host", "hostname", "machine"}
    ),
    "seconds": ({"second", "duration", "compute", "computation", "elapsed"}, {"time", "latency", "took", "runtime"}),
}  # fmt: skip
_BESIDE = {
    "step": set("id index idx number num no global training train".split()),
    "worker": set("id index idx number num no name global mpi dp data parallel world".split()),
    "seconds": set(
        "step iteration iter batch gradient grad forward backward wall in s sec gpu cpu train training worker rank "
        "total".split()
    ),
}
_SUMMARIES = set(
    "mean avg average total totals sum max min median std stddev slowest fastest maximum minimum count".split()
)
_OTHERS = set(
    "loss acc accuracy epoch lr timestamp date datetime id memory mem bytes start end begin tokens samples throughput "
    "norm flops job stage type status seed version comm wait temperature power utilization util".split()
)
_PHASES = set(
    "forward backward optimizer compute computation communication comm allreduce reduce sync update load loading "
    "dataloader wait idle io fwd bwd opt".split()
)


@dataclass
class Columns:
    """The columns of a table.

    Attributes:
        path: The table's file.
        names: Their names; "" where there is none.
        fields: Their fields.
        lines: The number of the line of each row.
        has_header: Whether a line of names was there.
        cells: What the table was before.
        notes: What was left out, a sentence each.
        mark: What separates decimals.
        units: The units that numbers were converted from.
    """

    path: str
    names: list[str]
    fields: list[list[str]]
    lines: list[int]
    has_header: bool
    cells: Cells
    notes: list[str]
    mark: str = "."
    units: set[str] = field(default_factory=set)

    def error(self, what: str, line: int | None = None) -> ValueError:
        """Return an error that says where."""
        return ValueError(f"{self.path}{'' if line is None else f', line {line}'}: {what}")

    def call(self, *chosen: int) -> str:
        """Return columns' names and places for a sentence."""
        shown = [f"column {c + 1}" + (f" ({self.names[c]!r})" if self.names[c] else "") for c in chosen[:4]]
        return ", ".join(shown) + (f" and {len(chosen) - 4} more" if len(chosen) > 4 else "")

    def find(self, name: str, option: str) -> int:
        """Return the column of a name, or of a number from 1.

        Raises:
            ValueError: There is none, or several.
        """
        alike = [c for c, one in enumerate(self.names) if one == name]
        alike = alike or [c for c, one in enumerate(self.names) if one and one.lower() == name.lower()]
        if len(alike) == 1:
            return alike[0]
        if not alike and name.isdigit() and 0 < int(name) <= len(self.names):
            return int(name) - 1
        known = ", ".join(filter(None, self.names)) or f"the numbers 1 to {len(self.names)}"
        raise self.error(f"{option} {name} names {'several columns' if alike else 'no column'}: there are {known}")

    def of_role(self, role: str) -> list[int]:
        """Return the columns whose names fit a role best: step, worker or seconds."""
        tiers = {c: tier for c, name in enumerate(self.names) if (tier := _tier(name, role)) is not None}
        return [c for c, tier in tiers.items() if tier == min(tiers.values())]

    def whole_numbers(self, column: int) -> NDArray[np.int64] | None:
        """Return the numbers of a column of whole ones, but for empty fields; None if it is none."""
        fields = [one for one in self.fields[column] if one]
        return np.array(fields, np.int64) if all(re.fullmatch(r"[+-]?\d{1,18}", one) for one in fields) else None

    def numbers(self, column: int) -> Seconds:
        """Return a column's numbers, NaN for a gap; in seconds where a unit stands behind them.

        Raises:
            ValueError: One is no number, or negative, or some have units and others none.
        """
        values, with_unit = [], set()
        for line, text in zip(self.lines, self.fields[column], strict=True):
            found = number(text, self.mark)
            if found is None:
                hint = "; a table with a line a gradient needs --step, --worker and --seconds"
                raise self.error(
                    f"a time must be a number of seconds, or empty, not {text!r} in {self.call(column)}"
                    + ("" if self.has_header else hint), line,
                )  # fmt: skip
            if found[0] < 0:
                raise self.error(
                    f"{self.call(column)} must not be negative, but is {text}: leave what is not known empty", line
                )
            if not math.isnan(found[0]):
                with_unit.add(found[1])
            values.append(found[0] * UNITS.get(found[1], 1.0))
        if "" in with_unit and len(with_unit) > 1:
            raise self.error(f"{self.call(column)} has units behind some numbers and none behind others")
        self.units |= with_unit - {""}
        return np.array(values)

    def seconds(self, chosen: list[int]) -> Seconds:
        """Return times of columns in seconds, (rows, columns): by the unit in their names, or in a comment.

        Raises:
            ValueError: They have different units, or there is something else that is no number.
        """
        values = np.stack([self.numbers(c) for c in chosen], axis=1)
        units = {_unit(self.names[c]) for c in chosen}
        if len({UNITS.get(unit) for unit in units}) > 1:
            raise self.error(f"{self.call(*chosen)} have different units: give all workers' times in one unit")
        unit = units.pop()
        if not unit and not self.units:
            told = [re.search(r"(?:\bin |[(\[])([a-zµμ]+)\b", one.lower()) for one in self.cells.comments]
            unit = next((one[1] for one in told if one and one[1] in UNITS), "")
        if self.units or UNITS.get(unit, 1.0) == 1.0:
            return values
        self.units.add(unit)
        return values * UNITS[unit]


def read_columns(path: str) -> Columns:
    """Read the columns of a table, without its torn last line, lines that sum up others, and empty columns.

    Raises:
        ValueError: Its lines are no rows of one table; it says which.
        OSError: It cannot be read.
    """
    cells = read_cells(path)
    rows = list(zip(cells.lines, cells.rows, strict=True))
    found = Columns(path, [], [], [], _has_header(cells.rows), cells, [])
    header = rows.pop(0)[1] if found.has_header else None
    width = Counter(len(fields) for _, fields in rows).most_common(1)[0][0] if rows else 0
    if len(rows) > 1 and not cells.ends and _is_torn(rows[-1][1], [fields for _, fields in rows[:-1]], width):
        found.notes.append(f"line {rows.pop()[0]} is torn and was left out")
    kept = []
    for line, fields in rows:
        if any(fields[width:]) or len(fields) < width:
            raise found.error(f"every line must have {width} fields, as most do, but this has {len(fields)}", line)
        if {one.lower().rstrip(":") for one in fields} & _SUMMARIES:
            found.notes.append(f"line {line} ({fields[0] or '...'}) sums up others and was left out")
        else:
            found.lines.append(line)
            kept.append(fields[:width])
    if not kept:
        raise ValueError(f"{path} holds no step: it must have a line a step, with each worker's seconds")
    found.fields = [list(column) for column in zip(*kept, strict=True)]
    found.names = _names(found, header)
    if width > 1 and not any(found.fields[-1]) and not found.names[-1]:  # a delimiter behind every line
        found.fields.pop()
        found.names.pop()
    try:
        found.mark = decimal_mark(one for column in found.fields for one in column)
    except ValueError as error:
        raise found.error(str(error)) from None
    return found


def _has_header(rows: list[list[str]]) -> bool:
    """Whether the first line is names: no numbers where others have some, or numbers that count columns."""
    if not rows:
        return False
    first, others = rows[0], rows[1:]
    texts = [c for c, one in enumerate(first) if not is_number(one)]
    if texts:
        below = [[one for row in others for one in row[c : c + 1]] for c in texts]
        has_numbers = any(2 * sum(map(is_number, fields)) > len(others) for fields in below)
        return not others or has_numbers or len(texts) == len(first)
    counted = first[1:] if not first[0] else first
    start = next((s for s in (0, 1) if counted == [str(s + c) for c in range(len(counted))]), None)
    if start is None or len(counted) < 2:
        return False
    return start == 0 or not first[0] or all("." in "".join(row) for row in others)


def _is_torn(last: list[str], others: list[list[str]], width: int) -> bool:
    """Whether the last line is shorter than others, or has no number where they have."""
    return len(last) != width or any(
        not is_number(one) and all(is_number(field) for row in others[-20:] for field in row[c : c + 1])
        for c, one in enumerate(last)
    )


def _names(columns: Columns, header: list[str] | None) -> list[str]:
    width = len(columns.fields)
    if header is None:
        return [""] * width
    while len(header) > width and not header[-1]:
        header = header[:-1]
    if len(header) == width - 1:  # a delimiter behind every line; or as R writes: the rows' names have no name
        header = ["", *header] if any(columns.fields[-1]) else [*header, ""]
    if len(header) != width:
        raise columns.error(
            f"the line of names has {len(header)} fields, but those below have {width}: every column needs a name, and "
            "a comma within a number needs quotes, or another delimiter between fields"
        )
    return header


# -- what a name says ------------------------------------------------------------------------------


def words(name: str) -> set[str]:
    """Return the words of a name, without the plural.

    Example:
        >>> sorted(words("stepTime_ms")), sorted(words("Worker ID"))
        (['ms', 'step', 'time'], ['id', 'worker'])
    """
    found = re.findall(r"[a-zµμ]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return {word[:-1] if len(word) > 3 and word.endswith("s") and word not in ("loss", "bytes", "hours") else word
            for word in found}  # fmt: skip


def _unit(name: str) -> str:
    """Return the unit that a name ends with, as in `rank0_ms` or `time (us)`; "" if none."""
    found = re.search(r"(?:^|[\s_.:/(\[-])([a-zµμ]+)[)\]]?$", name.lower())
    return found[1] if found and found[1] in UNITS else ""


def _tier(name: str, role: str) -> int | None:
    """Return how well a name fits a role, 0 being best; None if it does not."""
    named = words(name)
    if role == "seconds" and (unit := _unit(name)):
        named = named - words(unit) or {"second"}
    if re.search(r"\d", name) or not named or (role == "step" and has_role(name, "seconds")):
        return None
    known = set.union(*_ROLES[role])
    if not named & known or named - known - _BESIDE[role]:
        return None
    return next(tier for tier, one in enumerate(_ROLES[role]) if named & one)


def has_role(name: str, *roles: str) -> bool:
    """Whether a name is that of steps, workers or seconds, as tables with a line a gradient have them."""
    return any(_tier(name, role) is not None for role in roles or _ROLES)


def is_summary(name: str) -> bool:
    """Whether a name is of a column that sums up others."""
    return bool(words(name) & _SUMMARIES) and not re.search(r"\d", name)


def is_other(name: str) -> bool:
    """Whether a name is of something that is no time."""
    return bool(words(name) & _OTHERS)


def is_phase(name: str) -> bool:
    """Whether a name is of a part of a step, not of a worker."""
    return bool(words(name) & _PHASES)


def family(names: list[str]) -> list[int]:
    """Return the places of names that are alike but for numbers and units: the most.

    Example:
        >>> family(["step", "rank0_ms", "rank1_ms", "loss"])
        [1, 2]
    """
    stems = [name[: len(name.rstrip(")]")) - len(_unit(name))].rstrip(" _.:/([-") for name in names]
    patterns = [re.sub(r"\d+", "#", stem.lower()) for stem in stems]
    known = Counter(one for one in patterns if "#" in one)
    most, count = known.most_common(1)[0] if known else ("", 0)
    return [c for c, one in enumerate(patterns) if one == most] if count > 1 else []
