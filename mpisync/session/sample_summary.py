"""The summary of all samples at the end of a run: by worker, and by what they cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from mpisync.aggregation.account import Account

_MOST_WORKERS = 8  # with a line of their own
_SURE = 4.0  # standard errors between two shares, before one calls them different
_COLUMNS = ("handed", "used", "discarded", "requeued", "lost", "in_flight")


def summary(accounts: Sequence[Account], by_cost: Mapping[int, Account]) -> str:
    """Return the lines that tell what became of all samples.

    Args:
        accounts: Of each worker.
        by_cost: Of each class k of costs, from 2^k to 2^(k+1).

    Example:
        >>> print(summary([Account(handed=96, used=64, discarded=32)], {}))
        samples: handed = used + discarded + requeued + lost + in flight
        worker 0     96 =   64 +        32 +        0 +    0 +         0
    """
    table = [[getattr(account, name) for name in _COLUMNS] for account in accounts]
    rows = [(f"worker {worker}", values) for worker, values in enumerate(table)]
    total = [sum(values) for values in zip(*(values for _, values in rows), strict=True)]
    if len(rows) > _MOST_WORKERS:
        rows.sort(key=lambda row: row[1][1] / max(row[1][0], 1))
        others = [sum(v) for v in zip(*(values for _, values in rows[_MOST_WORKERS:]), strict=True)]
        rows = [*rows[:_MOST_WORKERS], (f"{len(rows) - _MOST_WORKERS} others", others)]
    if len(rows) > 1:
        rows.append(("all", total))
    head = ["handed", "used", "discarded", "requeued", "lost", "in flight"]
    names = max(len(name) for name, _ in [("samples:", []), *rows])
    widths = [max(len(title), *(len(f"{values[i]:,}") for _, values in rows)) for i, title in enumerate(head)]
    lines = [_line("samples:".ljust(names), head, widths)]
    lines += [_line(name.ljust(names), [f"{value:,}" for value in values], widths) for name, values in rows]
    return "\n".join([*lines, *_costs(by_cost)])


def _line(name: str, cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
    return f"{name} {first} = {' + '.join(rest)}"


def _costs(by_cost: Mapping[int, Account]) -> list[str]:
    """Say, for each class of costs, how many gradients did not count, and whether dear ones count less often."""
    classes = sorted(by_cost.items())
    lines = [
        f"cost {2.0**k:g} to {2.0 ** (k + 1):g}: {a.late + a.rejected:,} of {_gradients([a]):,} gradients did not "
        f"count, {_share([a]):.1%}"
        for k, a in classes
    ]
    if len(classes) < 2:
        return lines
    half = _gradients(by_cost.values()) / 2
    split = min(range(1, len(classes)), key=lambda i: abs(_gradients(a for _, a in classes[:i]) - half))
    cheap, dear = ([account for _, account in part] for part in (classes[:split], classes[split:]))
    if _is_higher(dear, cheap):
        lines.append(
            f"so dear batches count less often: {_share(dear):.1%} of those that cost {2.0 ** classes[split][0]:g} or "
            f"more did not, {_share(cheap):.1%} of the others"
        )
    return lines


def _gradients(accounts: Iterable[Account]) -> int:
    return sum(account.accepted + account.late + account.rejected for account in accounts)


def _share(accounts: Sequence[Account]) -> float:
    """Return the share of the gradients that did not count."""
    return sum(account.late + account.rejected for account in accounts) / max(_gradients(accounts), 1)


def _is_higher(dear: Sequence[Account], cheap: Sequence[Account]) -> bool:
    """Say whether a greater part of the dear ones did not count, beyond what chance makes of equal shares."""
    n, m = _gradients(dear), _gradients(cheap)
    share = _share([*dear, *cheap])
    deviation = math.sqrt(share * (1 - share) * (1 / n + 1 / m)) if n and m else math.inf
    return _share(dear) - _share(cheap) > _SURE * deviation
