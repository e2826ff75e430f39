"""What became of samples, as HTML: each worker's account, and the drops by cost."""

from __future__ import annotations

import numpy as np

from mpisync.records import RunEnd
from mpisync.reports.columns import VERDICTS
from mpisync.reports.figures import Figures
from mpisync.reports.selection import Selection
from mpisync.reports.sentences import bias
from mpisync.reports.words import costs, many, safe, share

__all__ = ["accounts_card", "selection_card"]

_FATES = ("used", "discarded", "requeued", "lost", "in flight")
_VERBS = ("were used", "discarded", "requeued", "lost with workers that left or died", "in flight at the end")
_MOST_ROWS = 200  # of a table


def accounts_card(figures: Figures, name: str) -> str:
    """Return each worker's account, as the record's last line has it; of very many, those that lost most."""
    end = figures.run.end
    if end is None:
        return f"{name}<p>Every worker's account is in a record's last line, which this one does not have.</p>"
    accounts = _accounts(end)
    total = accounts.sum(axis=1)
    present = [0, *(row for row in range(1, len(accounts)) if total[row])]
    heads = ["handed", *_FATES]
    head = "".join(f"<th>{heads[row]}</th>" for row in present)
    workers = accounts.shape[1]
    order = np.arange(workers)
    if workers > _MOST_ROWS:
        kept = accounts[1] / np.maximum(accounts[0], 1)
        order = np.sort(np.argsort(kept, kind="stable")[:_MOST_ROWS])
    hosts = figures.run.header.hosts
    rows = [_account_row(accounts[present, worker], str(worker), safe(hosts[worker], 40)) for worker in order]
    said = f"All {workers:,} workers" if workers <= _MOST_ROWS else f"The {_MOST_ROWS} that used the least share"
    table = (
        f'<div class="wide"><table><thead><tr><th>worker</th><th class="left">host</th>{head}</tr></thead>'
        f"<tbody>{_account_row(total[present], 'all', '')}{''.join(rows)}</tbody></table></div>"
    )
    opened = " open" if workers <= 16 else ""
    return f"{name}{_in_words(end, total)}<details{opened}><summary>{said}</summary>{table}</details>"


def _accounts(end: RunEnd) -> np.ndarray:
    """Return samples by what became of them and by worker; the first row holds all."""
    requeued = end.requeued or [0] * len(end.handed)
    told = np.array([end.handed, end.used, end.discarded, requeued, end.lost], np.int64)
    return np.vstack([told, told[0] - told[1:].sum(axis=0)])


def _account_row(account: np.ndarray, worker: str, host: str) -> str:
    handed, *parts = (int(n) for n in account)
    cells = [f"{handed:,}", *(f"{n:,} <span>{share(n, handed)}</span>" if n else "0" for n in parts)]
    return (
        f'<tr><td>{worker}</td><td class="left text">{host}</td>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
    )


def _in_words(end: RunEnd, total: np.ndarray) -> str:
    handed = int(total[0])
    fates = [f"<b>{share(int(n), handed)}</b> {fate}" for fate, n in zip(_VERBS, total[1:], strict=True) if n]
    lines = [f"Of {many(handed, 'sample')} handed to the loops {', '.join(fates)}."] if handed else []
    given = [(sum(one.verdict == verdict for one in end.arrivals), verdict) for verdict in VERDICTS]
    after = ", ".join(f"{n:,} {verdict}" for n, verdict in given if n)
    if after:
        lines.append(f"Gradients that got their verdict after the last step ({after}) are in these accounts only.")
    return "".join(f"<p>{line}</p>" for line in lines)


# -- by cost ---------------------------------------------------------------------------------------


def selection_card(figures: Figures, name: str) -> str:
    """Return samples used and dropped by the cost of their batch."""
    selection = figures.selection
    if selection is None:
        return f"{name}<p>Not known: no gradient says what its batch costs.</p>"
    again = ["computed again"] if selection.again.any() else []
    heads = "".join(f"<th>{text}</th>" for text in ("cost of a batch", "used", "dropped", *again))
    head = f'{heads}<th class="left">share dropped</th>'
    rows = "".join(_cost_row(selection, row, with_again=bool(again)) for row in range(len(selection.classes)))
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    has_pale = selection.dropped[selection.is_small].any()
    pale = '<div class="soft">Pale: too few gradients to say.</div>' if has_pale else ""
    return f"{name}<p>{bias(selection)}</p>{table}{pale}"


def _cost_row(selection: Selection, row: int, *, with_again: bool) -> str:
    order = int(selection.classes[row])
    used, dropped, again = (int(part[row]) for part in (selection.used, selection.dropped, selection.again))
    cells = [f"{used:,}", f"{dropped:,}", *([f"{again:,}"] if with_again else [])]
    style = "discarded few" if selection.is_small[row] else "discarded"
    bar = f'<i class="{style}" style="width:{100 * dropped / max(used + dropped, 1):.1f}%"></i>'
    return (
        f"<tr><td>{costs(order, order)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}"
        f'<td class="part">{share(dropped, used + dropped)}{bar}</td></tr>'
    )
