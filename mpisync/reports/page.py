"""The report: one HTML file that needs nothing else, runs no script and fetches nothing."""

from __future__ import annotations

from collections.abc import Sequence

from mpisync.reports.accounts import accounts_card, selection_card
from mpisync.reports.cards import (
    key_figures,
    loss_chart,
    metric_chart,
    response_card,
    split_chart,
    verdict_card,
    workers_card,
    workers_table,
    workers_time_card,
)
from mpisync.reports.columns import Run
from mpisync.reports.facts import facts_card
from mpisync.reports.figures import Figures, figures
from mpisync.reports.sentences import comparison, policy_of, summary
from mpisync.reports.style import STYLE
from mpisync.reports.words import safe

__all__ = ["page"]

# Forbids what escaping already prevents: scripts, and anything from elsewhere.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_SUBJECTS = (
    ("How long gradients took", response_card),
    ("What became of them", verdict_card),
    ("Verdicts by worker", workers_card),
    ("Time by worker", workers_time_card),
)
_NOTES = """
<p>Times are by the root's clock. When gradients arrived, how long they were computed and what the root
did is recorded. When a worker began is estimated: as soon as it had its last verdict and the version it
computed at. Transfer is what is left between that and the arrival, once data and computing are taken off:
messages both ways, and the worker's waking up.</p>
<p>A rank-second is a second of one worker or of the root; a core-second is one of a core that the ranks' processes
may use, where all are on one host. Memory is the largest resident set that a process ever had, shared pages
included.</p>
<p>A worker's account: samples handed to its loop = used + discarded + requeued + lost + in flight; what has no column
is 0. A cost is what the loop says that a batch costs, as its longest sequence; classes of it reach from a power of two
up to the next. The test takes what becomes of a gradient not to depend on what becomes of others.</p>
"""


def page(runs: Sequence[Run], problems: Sequence[str] = ()) -> str:
    """Return runs as an HTML page.

    Args:
        runs: What to show, side by side; the first is what others are measured by.
        problems: What is to be said about runs that could not be read.

    Example:
        >>> text = page([], problems=["record run.jsonl is <empty>"])
        >>> "record run.jsonl is &lt;empty&gt;" in text
        True
    """
    worked_out = [figures(run) for run in runs]
    names = [_tag(place) for place in range(len(runs))] if len(runs) > 1 else [""] * len(runs)
    notices = [safe(text, 1000) for text in problems]
    for run, name in zip(runs, names, strict=True):
        notices += [f"{name} {safe(notice, 1000)}" for notice in run.notices]
    title = ", ".join(safe(run.header.policy, 40) for run in runs[:3]) or "no run"
    parts = [
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>mpisync: {title}</title>',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style>\n</head>\n<body>",
        f"<h1>{f'{len(runs)} runs' if len(runs) > 1 else 'What the run came to'}</h1>",
        *(f'<p class="notice">{notice}</p>' for notice in notices),
        *_summaries(worked_out, names),
    ]
    if worked_out:
        parts += _body(worked_out, names)
    return "\n".join(parts) + "\n</body>\n</html>\n"


def _tag(place: int) -> str:
    """Return a run's name: a letter in its colour, which says the same without colours."""
    letter = chr(ord("A") + place) if place < 26 else str(place + 1)
    return f'<span class="tag r{place % 6}">{letter}</span>'


def _summaries(runs: list[Figures], names: list[str]) -> list[str]:
    parts = []
    called = _called(runs, names)
    if len(runs) > 1 and (lines := comparison(runs, called)):
        parts.append(_card("".join(f"<p>{line}</p>" for line in lines)))
    cards = []
    for run, name in zip(runs, names, strict=True):
        first, *others = summary(run)
        cards.append("".join(f"<p>{line}</p>" for line in [f"{name} {first}", *others]))
    return [*parts, _grid(cards)] if cards else []


def _called(runs: list[Figures], names: list[str]) -> list[str]:
    """Return the runs' names with their policies."""
    return [f"{name} {policy_of(run.run)}" for run, name in zip(runs, names, strict=True)]


def _body(runs: list[Figures], names: list[str]) -> list[str]:
    """Everything behind the summaries, by subject; runs without steps have no charts."""
    return [
        "<h2>Key figures</h2>",
        _card(key_figures(runs, names), "wide"),
        *(_charts(runs, names) if any(len(run.run) for run in runs) else []),
        "<h2>What ran</h2>",
        _grid([facts_card(run, name) for run, name in zip(runs, names, strict=True)]),
        f'<h2>How to read this</h2><div class="soft">{_NOTES}</div>',
    ]


def _charts(runs: list[Figures], names: list[str]) -> list[str]:
    parts = ["<h2>Training loss</h2>"]
    called = _called(runs, names) if any(names) else names
    if any(len(run.curve) for run in runs):
        curves = [run.curve for run in runs]
        parts.append(_grid([loss_chart(curves, called), loss_chart(curves, called, by_samples=True)], "pairs"))
    else:
        parts.append(_card("<p>Not recorded: <code>session.step(loss)</code> sends it.</p>"))
    if any(len(run.metric) for run in runs):
        metrics = [run.metric for run in runs]
        charts = [metric_chart(metrics, called), metric_chart(metrics, called, by_samples=True)]
        parts += ["<h2>Metric</h2>", _grid(charts, "pairs")]
    parts += ["<h2>Where workers' time went</h2>", _card(split_chart(runs, names))]
    shown = [(run, name) for run, name in zip(runs, names, strict=True) if len(run.run)]
    if len(runs) == 1:
        cards = [draw(runs[0], title) for title, draw in _SUBJECTS]
        parts += ["<h2>Steps and workers</h2>", _grid(cards, "pairs")]
    else:
        for title, draw in _SUBJECTS:
            cards = [draw(run, name) for run, name in shown]
            parts += [f"<h2>{title}</h2>", _grid(cards, "" if len(cards) % 3 == 0 else "pairs")]
    parts += ["<h2>Workers</h2>", *(_card(workers_table(run, name)) for run, name in shown)]
    parts += ["<h2>Samples</h2>", *(_card(accounts_card(run, name)) for run, name in shown)]
    if any(run.selection is not None for run, _ in shown):
        cards = [selection_card(run, name) for run, name in shown]
        parts += ["<h2>Samples by cost</h2>", _grid(cards, "pairs")]
    return parts


def _card(content: str, kind: str = "") -> str:
    return f'<div class="card {kind}">{content}</div>'


def _grid(cards: list[str], kind: str = "") -> str:
    return f'<div class="grid {kind}">' + "\n".join(_card(card) for card in cards) + "</div>"
