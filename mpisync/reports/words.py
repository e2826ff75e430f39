"""Numbers as people read them, and a run in a few sentences."""

from __future__ import annotations

import datetime
import math
import unicodedata
from collections import Counter
from html import escape

import numpy as np

from mpisync.reports.columns import ACCEPTED, LATE, REJECTED
from mpisync.reports.figures import SPLIT, Figures, seconds_to_loss

__all__ = ["comparison", "count", "date", "safe", "seconds", "share", "size", "summary"]

_LONGEST_TEXT = 160
_SPACE = "\xa0"  # keeps a number and its unit on one line
_NOTEWORTHY = 1.5  # times the typical worker's, from which a worker is called slow


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


def summary(figures: Figures) -> list[str]:
    """Return a run in sentences, as HTML."""
    run = figures.run
    hosts = Counter(run.header.hosts)
    where = safe(run.header.hosts[0]) if len(hosts) == 1 else f"{len(hosts):,} hosts"
    begin = f"<b>{safe(run.header.policy)}</b> with {_many(run.header.workers, 'worker')} on {where}"
    if not len(run):
        return [f"{begin}: no step has closed."]
    lines = [
        f"{begin}: {_many(len(run), 'step')} in {seconds(run.took_s)}, "
        f"<b>{count(figures.rate)} samples/s</b>; a step takes {seconds(figures.step_s[0])} "
        f"(median), 95 % take less than {seconds(figures.step_s[1])}."
    ]
    lines += [tell(figures) for tell in (_fates, _slowest, _waited_for, _time, _losses, _dead)]
    return [line for line in lines if line]


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio >= 99.5 else f"{ratio:.2g} times" if ratio >= 2 else f"{ratio:.2f} times"


def _fates(figures: Figures) -> str:
    totals = figures.verdicts.sum(axis=1)
    given = int(totals.sum())
    if not given:
        return ""
    if totals[ACCEPTED] == given:
        return f"All {_many(given, 'gradient')} counted."
    lines = [f"<b>{share(totals[ACCEPTED], given)}</b> of {_many(given, 'gradient')} counted"]
    if totals[LATE]:
        late = figures.verdicts[LATE]
        worst = int(late.argmax())
        lines.append(
            f"{totals[LATE]:,} came too late and {'was' if totals[LATE] == 1 else 'were'} discarded, "
            f"{late[worst]:,} of them worker {worst}'s"
        )
    if totals[REJECTED]:
        reasons = "; ".join(f"{safe(reason)} ×{n:,}" for reason, n in figures.run.reasons.most_common(3))
        lines.append(f"{totals[REJECTED]:,} rejected ({reasons})")
    return "; ".join(lines) + "."


def _slowest(figures: Figures) -> str:
    known = np.flatnonzero(np.isfinite(figures.typical_s))
    if len(known) < 2:
        return ""
    usual_s = float(np.median(figures.typical_s[known]))
    worst = int(known[figures.typical_s[known].argmax()])
    own_s = float(figures.typical_s[worst])
    if own_s < _NOTEWORTHY * usual_s:
        return f"Workers are about equally fast: the slowest, {worst}, takes {seconds(own_s)} a gradient."
    slow = int((figures.typical_s[known] >= _NOTEWORTHY * usual_s).sum())
    others = f" {slow:,} workers take at least {_NOTEWORTHY:g} times the median." if slow > 1 else ""
    times = f", {_times(own_s / usual_s)} the median of {seconds(usual_s)}" if usual_s else ""
    return (
        f"<b>Worker {worst}</b> on {safe(figures.run.header.hosts[worst])} is the slowest: "
        f"{seconds(own_s)} a gradient{times}.{others}"
    )


def _waited_for(figures: Figures) -> str:
    """Name the worker that most steps waited for, if they are many and it is not by chance."""
    steps, workers = int(figures.lasts.sum()), figures.run.header.workers
    most = int(figures.lasts.max(initial=0))
    if not steps or workers < 2 or most < max(2 * steps / workers + 3, steps / 5):
        return ""
    return f"{share(most, steps)} of the steps had worker {int(figures.lasts.argmax())}'s gradient as their last."


def _time(figures: Figures) -> str:
    shares = dict(zip(SPLIT, figures.shares, strict=True))
    root = shares["reduce"] + shares["update"] + shares["publish"]
    discarded = f", {share(shares['discarded'])} on gradients that did not count" if shares["discarded"] else ""
    data = f"{share(shares['data'])} for data, " if shares["data"] >= 0.02 else ""
    return (
        f"Workers spent {share(shares['compute'])} of the time computing what counted{discarded}; they "
        f"waited {data}{share(shares['wait'])} for each other and {share(root)} for the root."
    )


def _losses(figures: Figures) -> str:
    loss = figures.curve.loss
    if not len(loss):
        return ""
    return f"The training loss went from {count(float(loss[0]))} to {count(float(loss[-1]))}."


def _dead(figures: Figures) -> str:
    alive = int(figures.run.steps["alive"][-1])
    if alive >= figures.run.header.workers:
        return ""
    return f"<b>{_many(figures.run.header.workers - alive, 'worker')}</b> had left or died by the last step."


def comparison(runs: list[Figures], names: list[str]) -> list[str]:
    """Return how runs compare, in sentences, as HTML; the first is the measure."""
    lines = []
    first = runs[0]
    for figures, name in zip(runs[1:], names[1:], strict=True):
        if first.rate and figures.rate:
            times = figures.rate / first.rate
            pace = f"<b>{_times(times)}</b> as many" if times >= 1 else f"only {share(times)} as many"
            lines.append(f"{name} used {pace} samples per second as {names[0]}.")
    reached = seconds_to_loss([figures.curve for figures in runs])
    if reached is not None and len(runs) > 1:
        loss, times_s = reached
        each = ", ".join(
            f"{name} after {seconds(time_s)}" for name, time_s in zip(names, times_s, strict=True)
        )
        lines.append(f"A training loss of {count(loss)}, the lowest that all reached, came: {each}.")
    return lines
