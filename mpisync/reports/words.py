"""Numbers and texts as people read them, as HTML."""

from __future__ import annotations

import datetime
import math
import unicodedata
from html import escape

from mpisync.reports.selection import NO_COST

__all__ = ["costs", "count", "date", "many", "safe", "seconds", "share", "size"]

_LONGEST_TEXT = 160
_SPACE = "\xa0"  # keeps a number and its unit on one line


def safe(text: object, most: int = _LONGEST_TEXT) -> str:
    r"""Return text of unknown origin as HTML that shows it, cut where it is endless.

    Example:
        >>> safe('<b>"node\u202e1"')
        '&lt;b&gt;&quot;node�1&quot;'
    """
    shown = str(text)
    if len(shown) > most:
        shown = f"{shown[:most]}…"
    # Control characters, changes of direction and halves of pairs hide what is there.
    shown = "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in shown)
    return escape(shown)


def count(value: float) -> str:
    """Return a number with its thousands set apart.

    Example:
        >>> count(12345.6), count(0.125), count(9.04), count(float("nan"))
        ('12,346', '0.125', '9.04', '–')
    """
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 1e15:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def seconds(value: float) -> str:
    r"""Return a duration in the unit that suits it.

    Example:
        >>> [seconds(t).replace("\xa0", " ") for t in (0.0, 2.5e-5, 0.0123, 7.25, 754, 90000)]
        ['0 s', '25 µs', '12.3 ms', '7.25 s', '12 min 34 s', '25 h 0 min']
    """
    if not math.isfinite(value):
        return "–"
    for limit, factor, unit in ((0.9995e-3, 1e6, "µs"), (0.9995, 1e3, "ms"), (99.95, 1, "s")):
        if 0 < value < limit:
            return f"{value * factor:.3g}{_SPACE}{unit}"
    minutes, rest = divmod(round(max(value, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours:,} h", f"{minutes} min"] if hours else [f"{minutes} min"] * (minutes > 0) + [f"{rest} s"]
    return _SPACE.join(part.replace(" ", _SPACE) for part in parts)


def size(value: float) -> str:
    r"""Return a number of bytes in the unit that suits it.

    Example:
        >>> [size(n).replace("\xa0", " ") for n in (153216, 0, 4.2e13)]
        ['153 kB', '0 B', '42 TB']
    """
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        del units[0]
    return f"{count(float(f'{value:.3g}'))}{_SPACE}{units[0]}"


def share(part: float, whole: float = 1.0) -> str:
    r"""Return a share in per cent; a small one is not rounded to nothing, nor a large one to all.

    Example:
        >>> pairs = (1, 3), (0, 9), (1, 10**6), (99999, 10**5), (1, 0)
        >>> [share(*pair).replace("\xa0", " ") for pair in pairs]
        ['33 %', '0 %', '&lt;0.1 %', '&gt;99.9 %', '–']
    """
    if not whole or not math.isfinite(part / whole):
        return "–"
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return f"&lt;0.1{_SPACE}%"
    if 99.9 < percent < 100:
        return f"&gt;99.9{_SPACE}%"
    digits = 0 if 10 <= percent <= 90 or percent in (0, 100) else 1
    return f"{percent:.{digits}f}{_SPACE}%"


def date(unix_s: float) -> str:
    """Return a moment in universal time.

    Example:
        >>> date(1.5e9), date(1e300)
        ('2017-07-14 02:40 UTC', 'unknown')
    """
    try:
        return f"{datetime.datetime.fromtimestamp(unix_s, datetime.timezone.utc):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError, OSError):
        return "unknown"


def many(number: int, what: str) -> str:
    """Return how many there are of what.

    Example:
        >>> many(1, "step"), many(2000, "step")
        ('1 step', '2,000 steps')
    """
    return safe(f"{number:,} {what}{'' if number == 1 else 's'}")


def costs(first: int, last: int) -> str:
    r"""Return which costs classes are of: from the one number up to, but not including, the other.

    Example:
        >>> [costs(*ends).replace("\xa0", " ") for ends in ((6, 8), (-3, -3), (NO_COST, NO_COST), (NO_COST, 4))]
        ['64 to 512', '0.125 to 0.25', '0 or less', 'less than 32']
    """
    if last == NO_COST:
        return "0 or less".replace(" ", _SPACE)
    begin, end = (f"{2.0**order:,.0f}" if 0 <= order < 40 else f"{2.0**order:.3g}" for order in (first, last + 1))
    return (f"less than {end}" if first == NO_COST else f"{begin} to {end}").replace(" ", _SPACE)
