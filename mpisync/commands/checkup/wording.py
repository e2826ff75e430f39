"""Ranks, sizes and cores in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import TypeVar

from mpisync.commands.checkup.probes import Case, Probe

T = TypeVar("T")


def ranks_named(ranks: Iterable[int]) -> str:
    """Name ranks, runs of them shortened.

    >>> ranks_named([0, 1, 2, 5]), ranks_named([3])
    ('ranks 0-2, 5', 'rank 3')
    """
    ordered = sorted(ranks)
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ordered), lambda pair: pair[1] - pair[0])]
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"rank{'s' if len(ordered) > 1 else ''} {', '.join(texts)}"


def by_value(case: Case, key: Callable[[Probe], T]) -> dict[T, list[int]]:
    """Return the ranks that have each value, the most frequent first."""
    found: dict[T, list[int]] = {}
    for rank, probe in enumerate(case.ranks):
        found.setdefault(key(probe), []).append(rank)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def who(case: Case, ranks: Sequence[int]) -> str:
    """Say which ranks something holds for: nothing where it holds for all."""
    return "" if len(ranks) == len(case.ranks) else f" ({ranks_named(ranks)})"


def several(count: int, thing: str) -> str:
    """Count things.

    >>> several(1, "core"), several(4, "core")
    ('1 core', '4 cores')
    """
    return f"{count} {thing}{'' if count == 1 else 's'}"


def size(size_bytes: float) -> str:
    """Write a number of bytes with two digits or so.

    >>> size(52.4e6), size(24.3e9), size(9.96e6), size(4096)
    ('52 MB', '24 GB', '10 MB', '4.1 kB')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size_bytes >= unit:
            value = size_bytes / unit
            return f"{value:.0f} {name}" if value >= 10 else f"{value:.2g} {name}"
    return f"{size_bytes / 1e3:.2g} kB"
