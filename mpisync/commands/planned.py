"""How `mpisync plan` prints its answer: the answer first, then what it rests on."""

from __future__ import annotations

import math
import shutil
import sys
import textwrap
from collections.abc import Sequence

from mpisync.planning.advice import Advice
from mpisync.planning.choices import Choice, Choices
from mpisync.planning.fitting import Fit
from mpisync.planning.laws import DelayLaw
from mpisync.planning.words import many, seconds

_WIDTH = 100
_ROWS_OF_CHOICES, _ROWS_OF_WORKERS = 12, 8


def show(advice: Advice, fits: list[Fit], law: DelayLaw | None) -> None:
    """Print the answer."""
    columns = min(_WIDTH, shutil.get_terminal_size((_WIDTH, 24)).columns)
    print(textwrap.fill(advice.headline, columns))
    print()
    steps, workers = advice.whole.times_s.shape
    source = f"{many(steps, 'step')} of {many(workers, 'worker')}" + (f" drawn from {law}" if law is not None else "")
    for line in [f"From {source}.", *advice.observed.notes, *advice.reasons]:
        print(textwrap.fill(f"* {_sentence(line)}", columns, subsequent_indent="  "))
    if advice.choices is None:
        return
    _table("What each number of backups costs and gains, against b = 0", *_choices(advice.choices, advice.backup))
    print(_legend(advice.choices, advice.backup, columns))
    if law is None:
        _table(_workers_title(advice), *_workers(advice))
    if fits:
        _table("Laws of independent times, best first", *_fits(fits))


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text[0].upper()}{text[1:]}."


def _choices(made: Choices, advised: int | None) -> tuple[list[str], list[list[str]]]:
    head = ["b", "N", "step", "if stopped", "steps/s", "per machine", "gain", "95 %", "discarded", ""]
    rows = []
    for one in _shown(made, advised):
        mark = "advised" if one.backup == advised else "best" if one is made.best else ""
        rows.append([
            str(one.backup), str(one.accepted), seconds(one.step_s), seconds(one.stopped_s), f"×{one.per_step:.3f}",
            f"×{one.per_sample:.3f}", f"×{one.gain:.3f}",
            f"{one.low:.3f}–{one.high:.3f}" if one.backup else "",
            f"{one.discarded:.1%}", mark,
        ])  # fmt: skip
    return head, rows


def _shown(made: Choices, advised: int | None) -> list[Choice]:
    """Choose rows: none, few, and those around the best."""
    options = made.options
    if len(options) <= _ROWS_OF_CHOICES:
        return options
    best = options.index(made.best)
    start = max(0, min(best - _ROWS_OF_CHOICES // 2, len(options) - _ROWS_OF_CHOICES + 2))
    kept = {0, 1, *range(start, min(len(options), start + _ROWS_OF_CHOICES - 2))}
    kept |= {i for i, one in enumerate(options) if one.backup == advised}
    return [options[i] for i in sorted(kept)]


def _legend(made: Choices, advised: int | None, columns: int) -> str:
    noise = "accepted samples alone" if math.isinf(made.efficiency.noise) else f"1 + {made.efficiency.noise:.3g}/N"
    text = (
        "step: late workers finish their gradients; if stopped: they stop at once. per machine: accepted gradients a "
        f"second. gain: of time to the target, counted by {noise}. discarded: of the computing."
    )
    if advised == made.best.backup > 0:
        text += " advised: the fewest within 0.5 % of the best."
    if made.overhead_s:
        text += f" A step includes {seconds(made.overhead_s)} beyond computing."
    return textwrap.fill(text, columns)


def _workers_title(advice: Advice) -> str:
    workers = len(advice.observed.workers)
    return "Workers" if workers <= _ROWS_OF_WORKERS else f"The {_ROWS_OF_WORKERS} slowest of {workers} workers"


def _workers(advice: Advice) -> tuple[list[str], list[list[str]]]:
    import numpy as np

    observed = advice.observed
    median, p95 = np.median(observed.times_s, axis=0), np.quantile(observed.times_s, 0.95, axis=0)
    slowest = np.argsort(-median, kind="stable")
    last = np.bincount(observed.times_s.argmax(axis=1), minlength=len(median)) / len(observed.times_s)
    head = ["worker", "median", "p95", "longest", "slowest of all", f"discarded at b={advice.backup}", "host"]
    rows = [
        [
            str(observed.workers[c]), seconds(median[c]), seconds(p95[c]), seconds(observed.times_s[:, c].max()),
            f"{last[c]:.0%} of steps", f"{advice.dropped[c]:.0%}", observed.hosts[c] if observed.hosts else "",
        ]
        for c in slowest[:_ROWS_OF_WORKERS]
    ]  # fmt: skip
    return (head, rows) if observed.hosts else (head[:-1], [row[:-1] for row in rows])


def _fits(fits: list[Fit]) -> tuple[list[str], list[list[str]]]:
    head = ["law", "AIC", "KS distance", "p", "E[slowest] / measured"]
    least = fits[0].aic
    return head, [
        [str(one.law), f"{one.aic - least:+.1f}", f"{one.distance:.3f}", f"{one.p:.2f}", f"{one.slowest_ratio:.2f}"]
        for one in fits
    ]


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print()
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.markup import escape
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False)
            for name in head:
                table.add_column(escape(name), justify="left" if name in ("law", "host", "") else "right", no_wrap=True)
            for row in rows:
                table.add_row(*map(escape, row), style="bold" if "advised" in row else None)
            Console().print(table)
            return
    print(title)
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = [
            cell.ljust(width) if name in ("law", "host", "") else cell.rjust(width)
            for cell, width, name in zip(row, widths, head, strict=True)
        ]
        print("  ".join(cells).rstrip())
