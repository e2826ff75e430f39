"""A table's text taken apart: its lines, fields and numbers, in the forms that programs and people write."""

from __future__ import annotations

import csv
import gzip
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["UNITS", "Cells", "decimal_mark", "is_number", "number", "read_cells"]

UNITS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1.0),
    **dict.fromkeys(("ms", "msec", "msecs", "millis", "millisecond", "milliseconds"), 1e-3),
    **dict.fromkeys(("us", "µs", "μs", "usec", "usecs", "micros", "microsecond", "microseconds"), 1e-6),
    **dict.fromkeys(("ns", "nsec", "nsecs", "nanos", "nanosecond", "nanoseconds"), 1e-9),
    **dict.fromkeys(("min", "mins", "minute", "minutes"), 60.0),
}
_DELIMITERS = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas", " ": "blanks"}  # by precedence
_USUAL = re.compile(r"\d+(?:\.\d+)?")
_MISSING = {"", "na", "n/a", "nan", "null", "none", "nil", "-", "--", "?"}
_BLANKS = " '’_\u00a0\u202f"  # that separate thousands
_PLAIN = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|[+-]?inf(?:inity)?)\s*([a-zµμ]*)", re.IGNORECASE)
_CLOCK = re.compile(r"(?:(\d+) days? )?(\d+):([0-5]?\d):([0-5]?\d(?:[.,]\d*)?)")  # hours, minutes, seconds
_NUMERAL = re.compile(rf"[+-]?\d[\d.,{_BLANKS}]*(?:e[+-]?\d+)?\s*[a-zµμ]*", re.IGNORECASE)
_DECIMAL_COMMA = re.compile(r"(?:\d+|[1-9]\d{0,2}(?:\.\d{3})+),\d+")
_GROUPING_COMMA = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d*)?")
_GROUPING_POINT = re.compile(r"[1-9]\d{0,2}(?:\.\d{3})+")


@dataclass(frozen=True)
class Cells:
    """The fields of a table.

    Attributes:
        lines: The number of the line of each row.
        rows: Its fields; blanks around them are gone.
        comments: What stands behind `#`.
        delimiter: What separates fields, in words; "" where there is one column.
        ends: Whether the last line is ended, as a torn one is not.
    """

    lines: list[int]
    rows: list[list[str]]
    comments: list[str]
    delimiter: str
    ends: bool


def read_cells(path: str) -> Cells:
    """Read a text, gzipped or not, and split its lines into fields.

    Raises:
        ValueError: It is no text.
        OSError: It cannot be read.
    """
    text = _text(path)
    lines, comments, delimiter = [], [], ""
    for at, line in enumerate(text.splitlines(), 1):
        if at == 1 and re.fullmatch(r"sep=.", line):  # as Excel writes
            delimiter = line[-1]
            continue
        # A # in a quoted field begins no comment.
        body, mark, comment = (line, "", "") if '"' in line and not line.startswith("#") else line.partition("#")
        if mark:
            comments.append(comment.strip())
        if body.strip():
            lines.append((at, body.strip(" ")))
    delimiter = delimiter or _delimiter([line for _, line in lines])
    rows = [_split(line, delimiter) for _, line in lines]
    return Cells([at for at, _ in lines], rows, comments, _DELIMITERS.get(delimiter, delimiter), text.endswith("\n"))


def _text(path: str) -> str:
    with open(path, "rb") as file:
        data = file.read()
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} cannot be decompressed ({error}): write it again") from None
    if data.lstrip().startswith(b"{"):
        raise ValueError(f"{path} is a compressed record: decompress it first (gunzip)")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace")
    if b"\0" in data:
        raise ValueError(f"{path} is no text: save the table as CSV, or give a run's record")
    return data.decode("utf-8-sig", errors="replace")


def _delimiter(lines: list[str]) -> str:
    """Return the delimiter that gives most of the lines the same number of fields, most of them numbers."""
    best, most = "", 0.0
    for delimiter in _DELIMITERS:
        rows = [_split(line, delimiter) for line in lines[:1000]]
        width, count = Counter(map(len, rows)).most_common(1)[0] if rows else (1, 0)
        if width == 1 or 2 * count < len(rows):
            continue
        fields = [field for row in rows for field in row]
        share = 1e-6 + sum(is_number(field) for field in fields) / len(fields)
        if share > most:
            best, most = delimiter, share
    return best


def _split(line: str, delimiter: str) -> list[str]:
    if delimiter == " ":
        line = re.sub(r"\s+", " ", line.strip())
    fields = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True)) if delimiter else [line]
    return [field.strip().strip('"') for field in fields]


def is_number(field: str) -> bool:
    """Whether a field is a number, or a gap, with whichever decimal mark."""
    return any(number(field, mark) is not None for mark in ".,")


def decimal_mark(fields: Iterable[str]) -> str:
    """Return what separates decimals in numbers: a point or a comma.

    Raises:
        ValueError: It cannot be told: `1,234` may be more than a thousand, or less than two; or both are used.

    Example:
        >>> decimal_mark(["0,25", "1.234,5"]), decimal_mark(["1,234.5", "999"])
        (',', '.')
    """
    fields = list(fields)
    if not any("," in one or one.count(".") > 1 for one in fields):
        return "."
    numerals = [re.sub(r"[^\d.,].*", "", one.lstrip("+-")) for one in fields if _NUMERAL.fullmatch(one)]
    commas = [one for one in numerals if "," in one]
    points = [one for one in numerals if "." in one and "," not in one]
    if not commas:
        return "," if any(one.count(".") > 1 for one in points) and all(map(_GROUPING_POINT.fullmatch, points)) else "."
    if not all(map(_GROUPING_COMMA.fullmatch, commas)):
        if not any(map(_DECIMAL_COMMA.fullmatch, commas)):
            return "."
        if points:
            raise ValueError(f"decimals have a comma in {commas[0]!r} and a point in {points[0]!r}: write points alone")
        return ","
    if points or any("." in one or one.count(",") > 1 for one in commas):
        return "."
    raise ValueError(
        f"{commas[0]!r} may be {commas[0].replace(',', '')} or {commas[0].replace(',', '.')}: write decimals with a "
        "point, and thousands without a comma"
    )


def number(field: str, mark: str = ".") -> tuple[float, str] | None:
    """Return a number and the unit behind it; NaN for a gap, None where it is no number.

    Hours, minutes and seconds are a number of seconds.

    Example:
        >>> number("1.234,5", ","), number("250 ms"), number("0:01:02.5"), number("fast")
        ((1234.5, ''), (250.0, 'ms'), (62.5, 'h:mm:ss'), None)
    """
    field = field.strip()
    if mark == "." and _USUAL.fullmatch(field):  # for speed
        return float(field), ""
    if field.lower() in _MISSING:
        return math.nan, ""
    if clock := _CLOCK.fullmatch(field):
        days, hours, minutes, seconds = (float((part or "0").replace(",", ".")) for part in clock.groups())
        return ((24 * days + hours) * 60 + minutes) * 60 + seconds, "h:mm:ss"
    groups = "," if mark == "." else "."
    # Thousands are groups of three digits: what is not is no number.
    field = re.sub(rf"(?<=\d)[{_BLANKS}](?=\d{{3}}(?!\d))", "", field)
    if groups in field:
        whole = re.match(rf"[+-]?[1-9]\d{{0,2}}(?:{re.escape(groups)}\d{{3}})+(?!\d)", field)
        if whole is None or "e" in field.lower():
            return None
        field = whole[0].replace(groups, "") + field[whole.end() :]
    found = _PLAIN.fullmatch(field.replace(",", "."))
    if found is None or (found[2] and found[2].lower() not in UNITS):
        return None
    return float(found[1]), found[2].lower()
