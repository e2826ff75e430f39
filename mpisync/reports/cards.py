"""The parts of a report, each as HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mpisync.reports.charts import Line, bars, lines
from mpisync.reports.columns import ACCEPTED, LATE, REJECTED, VERDICTS
from mpisync.reports.figures import SPLIT, Curve, Figures
from mpisync.reports.raster import response_map, verdict_map
from mpisync.reports.sentences import ending, policy_of
from mpisync.reports.words import count, safe, seconds, share, size

__all__ = [
    "key_figures",
    "loss_chart",
    "metric_chart",
    "response_card",
    "split_chart",
    "verdict_card",
    "workers_card",
    "workers_table",
    "workers_time_card",
]

_SPLIT_NAMES = (
    "waiting for data",
    "computing what counted",
    "computing what did not",
    "transfer (estimated)",
    "waiting for others",
    "root: reduce",
    "root: update",
    "root: publish",
    "start and end",
)
_UNITS = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
_MOST_BARS = 240
_MOST_ROWS = 200  # of a table


# -- all runs together -----------------------------------------------------------------------------


def key_figures(runs: Sequence[Figures], names: Sequence[str]) -> str:
    """Return what runs are compared by, but for what no record tells: a table with a column each; of one, tiles."""
    rows: list[tuple[str, Callable[[Figures], str]]] = [
        ("Policy", lambda f: policy_of(f.run)),
        ("Workers", lambda f: f"{f.run.header.workers:,}"),
        ("Steps", lambda f: f"{len(f.run):,}"),
        ("Took", lambda f: seconds(f.run.took_s)),
        ("Steps per second", lambda f: count(len(f.run) / f.run.took_s) if f.run.took_s else "–"),
        ("Samples per second", lambda f: count(f.rate)),
        ("Samples per rank-second", lambda f: count(f.rate_per_rank)),
        ("Samples per core-second", lambda f: count(f.rate_per_core)),
        ("Step, median", lambda f: seconds(f.step_s[0])),
        ("Step, 95th percentile", lambda f: seconds(f.step_s[1])),
        ("Gradients accepted", lambda f: _part(f, ACCEPTED)),
        ("Gradients too late", lambda f: _part(f, LATE)),
        ("Gradients rejected", lambda f: _part(f, REJECTED)),
        ("Steps without update", lambda f: f"{int((f.run.steps['updated'] == 0).sum()):,}"),
        ("Loss, last", lambda f: count(float(f.curve.values[-1])) if len(f.curve) else "–"),
        ("Metric, last", lambda f: count(float(f.metric.values[-1])) if len(f.metric) else "–"),
        ("One gradient", lambda f: size(float(f.run.gradients["bytes"].max(initial=0)))),
        ("Gradients moved", lambda f: size(sum(f.travelled_bytes))),
        ("… of that in vain", lambda f: share(f.travelled_bytes[1], sum(f.travelled_bytes))),
        ("Memory of the root", lambda f: _memory(f.run.peak_rss_bytes[-1:])),
        ("Memory of a worker, most", lambda f: _memory(f.run.peak_rss_bytes[:-1])),
        ("Ended", lambda f: ending(f.run)),
    ]
    cells = [(title, [text(run) for run in runs]) for title, text in rows]
    cells = [(title, texts) for title, texts in cells if any(text != "–" for text in texts)]
    if len(runs) == 1:
        tiles = "".join(f"<div><dt>{title}</dt><dd>{texts[0]}</dd></div>" for title, texts in cells)
        return f'<dl class="tiles">{tiles}</dl>'
    head = f"<thead><tr><th></th>{''.join(f'<th>{name}</th>' for name in names)}</tr></thead>"
    body = "".join(
        f"<tr><td>{title}</td>{''.join(f'<td{style}>{text}</td>' for text in texts)}</tr>"
        for title, texts in cells
        for style in (' class="text"' if title in ("Policy", "Ended") else "",)
    )
    return f"<table>{head}<tbody>{body}</tbody></table>"


def _memory(peaks_bytes: Sequence[int]) -> str:
    """Return the greatest; 0 stands for one that is not known."""
    return size(float(most)) if (most := max(peaks_bytes, default=0)) else "–"


def _part(figures: Figures, verdict: int) -> str:
    totals = figures.verdicts.sum(axis=1)
    return f"{totals[verdict]:,} ({share(totals[verdict], totals.sum())})" if totals[verdict] else "0"


def loss_chart(
    curves: Sequence[Curve], names: Sequence[str], *, by_samples: bool = False
) -> str:
    """Return the loss of all runs, over time or over samples."""
    caption = "Mean of each step's accepted gradients; the band spans the steps of a point."
    return _course(curves, names, "Training loss", "loss", caption, by_samples=by_samples)


def metric_chart(curves: Sequence[Curve], names: Sequence[str], *, by_samples: bool = False) -> str:
    """Return the metric of all runs, over time or over samples."""
    caption = "What session.evaluate found, at the time when the version that it evaluated was published."
    return _course(curves, names, "Metric", "metric", caption, by_samples=by_samples)


def _course(
    curves: Sequence[Curve], names: Sequence[str], subject: str, y_name: str, caption: str, *, by_samples: bool
) -> str:
    end_s = max(float(curve.time_s[-1]) for curve in curves if len(curve))
    unit, unit_s = next(unit for unit in _UNITS if end_s >= 2 * unit[1] or unit is _UNITS[-1])
    title, x_name = ("By samples that counted", "samples") if by_samples else ("By time", unit)
    drawn = [
        Line(c.samples if by_samples else c.time_s / unit_s, c.values, c.low, c.high) for c in curves
    ]
    chart = lines(drawn, f"{subject}: {title}", x_name, y_name)
    key = _key((name, "") for name, curve in zip(names, curves, strict=True) if name and len(curve))
    return f"<figure><h3>{title}</h3><figcaption>{caption}</figcaption>{chart}{key}</figure>"


def split_chart(runs: Sequence[Figures], names: Sequence[str]) -> str:
    """Return where workers' time went, a bar a run."""
    shares = np.stack([run.shares for run in runs], axis=1)
    chart = bars(shares, SPLIT, "Where workers' time went")
    labels = [((row + 0.5) / len(runs), name) for row, name in enumerate(names) if name]
    entries = [
        (f"{title} <b>{' · '.join(share(float(part)) for part in shares[row])}</b>", SPLIT[row])
        for row, title in enumerate(_SPLIT_NAMES)
        if shares[row].any()
    ]
    return f"<figure>{_plot(chart, labels, 40 * len(runs), ('0 %', '100 %'))}{_key(entries)}</figure>"


# -- one run ---------------------------------------------------------------------------------------


def response_card(figures: Figures, title: str) -> str:
    """Return the heat map of response times."""
    heat = response_map(figures)
    key = f'{seconds(heat.low)} <span class="ramp"></span> {seconds(heat.high)} and more'
    return _heat(
        figures,
        title,
        "From a version's publication until its gradient arrived. Blank: none was computed.",
        heat.uri,
        f'<div class="key"><span>{key}</span></div>',
    )


def verdict_card(figures: Figures, title: str) -> str:
    """Return the heat map of verdicts."""
    used = figures.verdicts.sum(axis=1)
    entries = [("accepted", "accepted"), ("late", "late"), ("rejected", "rejected")]
    key = _key((name, style) for (name, style), n in zip(entries, used, strict=True) if n)
    caption = "Verdicts, by the step that a gradient was for. Blank: none was computed."
    return _heat(figures, title, caption, verdict_map(figures).uri, key)


def _heat(figures: Figures, title: str, caption: str, uri: str, key: str) -> str:
    run = figures.run
    image = f'<img src="{uri}" alt="{caption}">'
    last = run.first + len(run) - 1
    under = [f"step {run.first:,}", f"{(run.first + last) // 2:,}", f"{last:,}"][: len(run)]
    plot = _plot(image, _worker_labels(figures), _rows_high(run.header.workers), under)
    return f"<figure><h3>{title}</h3><figcaption>{caption}</figcaption>{plot}{key}</figure>"


def workers_card(figures: Figures, title: str) -> str:
    """Return each worker's verdicts as bars."""
    chart = bars(_binned(figures.verdicts), VERDICTS, "Verdicts by worker")
    most = int(figures.verdicts.sum(axis=0).max(initial=0))
    plot = _plot(chart, _worker_labels(figures), _rows_high(figures.run.header.workers), ("0", f"{most:,} gradients"))
    totals = figures.verdicts.sum(axis=1)
    key = _key((f"{name} {n:,}", name) for name, n in zip(VERDICTS, totals, strict=True) if n)
    return f"<figure><h3>{title}</h3><figcaption>Gradients of each worker.</figcaption>{plot}{key}</figure>"


def workers_time_card(figures: Figures, title: str) -> str:
    """Return where each worker's time went, as bars."""
    chart = bars(_binned(figures.split_s), SPLIT, "Time by worker")
    under = ("0", seconds(float(figures.split_s.sum(axis=0).max(initial=0.0))))
    plot = _plot(chart, _worker_labels(figures), _rows_high(figures.run.header.workers), under)
    present = figures.split_s.any(axis=1)
    key = _key((_SPLIT_NAMES[row], SPLIT[row]) for row in np.flatnonzero(present))
    return f"<figure><h3>{title}</h3><figcaption>Of the whole run.</figcaption>{plot}{key}</figure>"


def workers_table(figures: Figures, name: str) -> str:
    """Return the numbers of each worker; of very many, those of the slowest."""
    workers = figures.run.header.workers
    order = np.arange(workers)
    said = f"All {workers:,} workers" if workers > 1 else "The worker"
    if workers > _MOST_ROWS:
        slowness = np.nan_to_num(figures.typical_s, nan=np.inf)
        order = np.sort(np.argsort(-slowness, kind="stable")[:_MOST_ROWS])
        said = f"The {_MOST_ROWS} slowest of {workers:,} workers"
    heads = (
        "worker", "host", *VERDICTS, "counted", "last of a step", "data + compute, median", "waiting", "peak memory",
    )  # fmt: skip
    head = "".join(f"<th{' class=left' if text == 'host' else ''}>{text}</th>" for text in heads)
    rows = "".join(_worker_row(figures, int(worker)) for worker in order)
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    opened = " open" if workers <= 16 else ""
    return f"<details{opened}><summary>{name} {said}</summary>{table}</details>"


def _worker_row(figures: Figures, worker: int) -> str:
    accepted, late, rejected = (int(n) for n in figures.verdicts[:, worker])
    split_s = figures.split_s[:, worker]
    waiting_s = float(split_s[SPLIT.index("wait") : SPLIT.index("none")].sum())
    cells = (
        f"{accepted:,}", f"{late:,}", f"{rejected:,}", share(accepted, accepted + late + rejected),
        f"{int(figures.lasts[worker]):,}",
        seconds(float(figures.typical_s[worker])), share(waiting_s, float(split_s.sum())),
        _memory(figures.run.peak_rss_bytes[worker : worker + 1]),
    )  # fmt: skip
    host = safe(figures.run.header.hosts[worker], 40)
    return f'<tr><td>{worker}</td><td class="left text">{host}</td>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


# -- what plots have in common ---------------------------------------------------------------------


def _plot(body: str, labels: Sequence[tuple[float, str]], height: int, under: Sequence[str]) -> str:
    """Return a picture with labels to its left, at shares of its height, and beneath it."""
    left = "".join(f'<span style="top:{100 * place:.2f}%">{text}</span>' for place, text in labels)
    below = "".join(f"<span>{text}</span>" for text in under)
    return (
        f'<div class="plot"><div class="rows">{left}</div><div class="area" style="height:{height}px">'
        f'{body}</div><div class="under">{below}</div></div>'
    )


def _key(entries: Iterable[tuple[str, str]]) -> str:
    texts = [
        f'<span>{f"""<i class="{style}"></i>""" if style else ""}{text}</span>' for text, style in entries
    ]
    return f'<div class="key">{"".join(texts)}</div>' if texts else ""


def _worker_labels(figures: Figures) -> list[tuple[float, str]]:
    workers = figures.run.header.workers
    step = next(step for k in range(9) for step in (10**k, 2 * 10**k, 5 * 10**k) if workers / step <= 16)
    return [((worker + 0.5) / workers, str(worker)) for worker in range(0, workers, step)]


def _rows_high(workers: int) -> int:
    return 20 * workers if workers <= 16 else 320


def _binned(parts: np.ndarray) -> np.ndarray:
    """Return the means of neighbouring workers where there are more than a chart has rows."""
    workers = parts.shape[1]
    rows = min(workers, _MOST_BARS)
    starts = np.arange(rows) * workers // rows
    return np.add.reduceat(parts.astype(float), starts, axis=1) / np.diff(np.append(starts, workers))
