"""Tables of times: a line a step, a column a worker, in seconds."""

from __future__ import annotations

import math
import re

import numpy as np

from mpisync.planning.laws import Seconds

__all__ = ["read_table"]


def read_table(path: str) -> tuple[Seconds, list[str]]:
    """Read a table; commas, semicolons or blanks separate, `#` begins a comment.

    An empty field is a gap. A line of names may come first; a column named `step` is left out. A
    last line that is torn, as a full disk or a killed writer leaves it, is left out.

    Returns:
        Seconds, (steps, workers), NaN where there is none; and what is to be said of the input.

    Raises:
        ValueError: It names the line that is no step.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    lines = [(number, line.partition("#")[0].strip()) for number, line in enumerate(text.splitlines(), 1)]
    rows = [(number, _split(line)) for number, line in lines if line]
    notes: list[str] = []
    drop = 0
    if rows and any(_number(field) is None for field in rows[0][1]):
        head = rows.pop(0)[1]
        drop = int(head[0].strip('"').lower() == "step")
    if not rows:
        raise ValueError(f"{path} holds no step: it must have a line a step, with each worker's seconds")
    width = len(rows[0][1])
    if len(rows) > 1 and not text.endswith("\n") and not _is_whole(rows[-1][1], width):
        notes.append(f"line {rows[-1][0]} is torn and was left out")
        rows.pop()
    values = []
    for number, fields in rows:
        if len(fields) != width:
            raise ValueError(f"{path}, line {number}: every step must have {width} workers, but this has {len(fields)}")
        values.append([_value(path, number, field) for field in fields[drop:]])
    if not values[0]:
        raise ValueError(f"{path} holds no worker's times beside the steps' numbers")
    return np.array(values, np.float64), notes


def _split(line: str) -> list[str]:
    for separator in ",;\t":
        if separator in line:
            return [field.strip() for field in line.split(separator)]
    return re.split(r"\s+", line)


def _is_whole(fields: list[str], width: int) -> bool:
    return len(fields) == width and all(_number(field) is not None for field in fields)


def _number(field: str) -> float | None:
    try:
        return float(field) if field else math.nan
    except ValueError:
        return None


def _value(path: str, line: int, field: str) -> float:
    value = _number(field)
    if value is None:
        raise ValueError(f"{path}, line {line}: a time must be a number of seconds, or empty, not {field!r}")
    return value
