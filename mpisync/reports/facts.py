"""What ran: what a reader needs to know a run, and to repeat it."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby

from mpisync.records import RunHeader
from mpisync.reports.figures import Figures
from mpisync.reports.words import date, many, safe, size

__all__ = ["facts_card"]

_MOST_NAMED = 12  # hosts, dtypes, groups of workers
_MOST_SETTINGS = 40
_LONGEST_COMMAND = 2000


def facts_card(figures: Figures, name: str) -> str:
    """Return what was run; what a record does not say has no row."""
    header = figures.run.header
    rows = [
        ("command", safe(shlex.join(header.command), _LONGEST_COMMAND)),
        ("record", safe(figures.run.path)),
        ("policy", safe(header.policy)),
        ("started", date(header.started_unix_s)),
        ("planned", many(planned, "step") if (planned := figures.run.planned) is not None else ""),
        ("seed", safe(header.seed, 40)),
        ("optimizer", ", ".join(safe(text, 400) for text in (header.optimizer, header.scheduler) if text)),
        ("parameters", _parameters(header)),
        ("workers", f"{header.workers:,}"),
        ("hosts", _hosts(header.hosts)),
        ("root", _root(header)),
        ("cores of all ranks", safe(f"{header.cores:,}", 40) if header.cores is not None else ""),
        ("transport", _transports(header.transports)),
        ("versions", _versions(header)),
        *_settings(header),
    ]
    body = "".join(f"<tr><td>{key}</td><td>{value}</td></tr>" for key, value in rows if value)
    return f'{name}<table class="facts"><tbody>{body}</tbody></table>'


def _parameters(header: RunHeader) -> str:
    if not header.parameters:
        return ""
    counts = [f"{safe(f'{n:,}', 40)} {safe(dtype, 40)}" for dtype, n in header.parameters.items()][:_MOST_NAMED]
    return f"{' and '.join(counts)} ({size(float(min(header.parameters_bytes, 2**63)))})"


def _hosts(hosts: Iterable[str]) -> str:
    found = list(Counter(hosts).items())
    more = len(found) - _MOST_NAMED
    named = found[:_MOST_NAMED] if more > 1 else found
    texts = [f"{safe(host, 60)} ×{n}" if n > 1 else safe(host, 60) for host, n in named]
    return ", ".join([*texts, *([f"{more:,} more hosts"] if more > 1 else [])])


def _root(header: RunHeader) -> str:
    parts = [
        safe(header.root_host, 60),
        many(header.root_cores, "core") if header.root_cores else "",
        many(header.root_threads, "thread") if header.root_threads else "",
    ]
    return ", ".join(part for part in parts if part)


def _transports(transports: Sequence[str]) -> str:
    """Return how gradients travel: in a word if all do so alike, else with the workers that each goes for."""
    runs: list[tuple[str, str]] = []  # how, and who
    first = 0
    for how, members in groupby(transports):
        last = first + sum(1 for _ in members) - 1
        runs.append((how, f"{first}–{last}" if last > first else f"{first}"))
        first = last + 1
    if len(runs) < 2:
        return "".join(safe(how, 60) for how, _ in runs)
    hows = list(dict.fromkeys(how for how, _ in runs))[:_MOST_NAMED]
    texts = []
    for how in hows:
        who = [workers for other, workers in runs if other == how]
        texts.append(f"{safe(how, 60)}: {', '.join(who[:_MOST_NAMED])}{' …' if len(who) > _MOST_NAMED else ''}")
    return "; ".join(texts)


def _versions(header: RunHeader) -> str:
    named = {"mpisync": header.version, **header.versions}
    # The MPI library's says its name itself.
    texts = [value if name == "MPI" else f"{name} {value}" for name, value in named.items()]
    return ", ".join(safe(text, 80) for text in texts[:_MOST_NAMED])


def _settings(header: RunHeader) -> list[tuple[str, str]]:
    settings = list(header.settings.items())
    rows = [(safe(key, 60), _setting(value)) for key, value in settings[:_MOST_SETTINGS]]
    if len(settings) > _MOST_SETTINGS:
        rows.append(("…", f"{len(settings) - _MOST_SETTINGS:,} more settings"))
    return rows


def _setting(value: object) -> str:
    if value is None:
        return "–"
    return safe(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
