"""What a run comes to: totals, each worker's share, where time went, and the loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpisync.reports.columns import ACCEPTED, VERDICTS, Run
from mpisync.reports.selection import Selection, select
from mpisync.reports.spans import Spans, lay_out

__all__ = ["SPLIT", "Curve", "Figures", "figures", "seconds_to_loss"]

# Where workers' time goes, in the order of one gradient; "none" is before the first and after the last.
SPLIT = ("data", "compute", "discarded", "send", "wait", "reduce", "update", "publish", "none")
_STEPS_PER_POINT, _FEWEST_POINTS, _MOST_POINTS = 4, 20, 120  # a chart is some 300 pixels wide


@dataclass(frozen=True)
class Curve:
    """A quantity in the course of a run: the loss, each point a mean over a few steps, or the script's metric.

    Attributes:
        time_s: Since the first step's opening.
        samples: That went into updates by then.
        values: Its values; of the loss the mean over the point's steps.
        low: The least of them.
        high: The greatest.
    """

    time_s: np.ndarray
    samples: np.ndarray
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def __len__(self) -> int:
        """How many points it has."""
        return len(self.values)


@dataclass(frozen=True)
class Figures:
    """What a report says about a run.

    Attributes:
        run: The run.
        spans: Its gradients in time.
        samples: How many went into updates.
        verdicts: Gradients by verdict and worker.
        split_s: Seconds of workers' time by SPLIT and worker.
        lasts: For how many steps each worker's gradient was the last one.
        typical_s: Each worker's median of the seconds from beginning a gradient's batch to having
            computed it; nan where there is none.
        step_s: The median and 95th percentile of the time from a step's opening to its publication.
        travelled_bytes: Bytes of gradients that travelled, of those that counted and of the others.
        curve: The loss; empty where no worker sent it.
        metric: The script's metric; empty where it has none.
        selection: What became of samples by their cost; None where no cost is known.
    """

    run: Run
    spans: Spans
    samples: float
    verdicts: np.ndarray
    split_s: np.ndarray
    lasts: np.ndarray
    typical_s: np.ndarray
    step_s: tuple[float, float]
    travelled_bytes: tuple[float, float]
    curve: Curve
    metric: Curve
    selection: Selection | None

    @property
    def rate(self) -> float:
        """Samples that went into updates, per second."""
        return self.samples / self.run.took_s if self.run.took_s else 0.0

    @property
    def rate_per_rank(self) -> float:
        """The same per second of each rank, the root included."""
        return self.rate / self.run.ranks

    @property
    def rate_per_core(self) -> float:
        """The same per second of each core that the ranks may use; nan where their number is not known."""
        cores = self.run.header.cores
        return self.rate / cores if cores and cores > 0 else float("nan")

    @property
    def shares(self) -> np.ndarray:
        """Each part's share of all workers' time, by SPLIT."""
        parts = self.split_s.sum(axis=1)
        return np.asarray(parts / (parts.sum() or 1.0))


def figures(run: Run) -> Figures:
    """Work a run out."""
    spans, workers = lay_out(run), run.header.workers
    gradients, steps = run.gradients, run.steps
    verdicts = np.stack(
        [
            np.bincount(gradients["worker"][gradients["verdict"] == code], minlength=workers)
            for code in range(len(VERDICTS))
        ]
    )
    lasted_s = steps["published_s"] - steps["opened_s"]
    travelled = gradients["bytes"].astype(float)
    counted = gradients["counted"]
    return Figures(
        run=run,
        spans=spans,
        samples=float(steps["samples_used"].astype(float).sum()),
        verdicts=verdicts,
        split_s=_split_s(run, spans),
        lasts=np.bincount(run.last_workers() + 1, minlength=workers + 1)[1:],
        typical_s=_typical_s(run, spans),
        step_s=(_quantile(lasted_s, 0.5), _quantile(lasted_s, 0.95)),
        travelled_bytes=(float(travelled[counted].sum()), float(travelled[~counted].sum())),
        curve=_curve(run),
        metric=_metric(run),
        selection=select(run),
    )


def _quantile(values: np.ndarray, q: float) -> float:
    return float(np.quantile(values, q)) if len(values) else float("nan")


def _split_s(run: Run, spans: Spans) -> np.ndarray:
    """Share workers' time out; what the root does while a worker waits goes by what it does."""
    workers, worker = run.header.workers, run.gradients["worker"][spans.order]
    counted = run.gradients["counted"][spans.order]
    waits = _root_seconds(run, spans.arrived_s, spans.until_s)
    parts = {
        "data": spans.data_s,
        "compute": np.where(counted, spans.compute_s, 0.0),
        "discarded": np.where(counted, 0.0, spans.compute_s),
        "send": spans.send_s,
        "wait": np.maximum(spans.wait_s - sum(waits.values()), 0.0),
        **waits,
    }
    split_s = np.zeros((len(SPLIT), workers))
    for row, name in enumerate(SPLIT[:-1]):
        split_s[row] = np.bincount(worker, parts[name], workers)
    split_s[-1] = np.maximum(run.took_s - split_s.sum(axis=0), 0.0)
    return split_s


def _root_seconds(run: Run, from_s: np.ndarray, to_s: np.ndarray) -> dict[str, np.ndarray]:
    """Return for how long the root reduced, updated and published between these times."""
    if not len(run):
        return {name: np.zeros(0) for name in ("reduce", "update", "publish")}
    steps = run.steps
    reduced_s = steps["closed_s"] + steps["reduce_s"].clip(0.0)
    updated_s = reduced_s + steps["update_s"].clip(0.0)
    times_s = np.stack([steps["closed_s"], reduced_s, updated_s, steps["published_s"]], axis=1)
    times_s = np.minimum(times_s, steps["published_s"][:, None])
    times_s = np.maximum.accumulate(times_s.ravel())
    spent_s = np.diff(times_s, append=times_s[-1])
    found = {}
    for phase, name in enumerate(("reduce", "update", "publish")):
        own_s = np.zeros_like(spent_s)
        own_s[phase::4] = spent_s[phase::4]
        so_far_s = np.cumsum(own_s) - own_s
        found[name] = np.interp(to_s, times_s, so_far_s) - np.interp(from_s, times_s, so_far_s)
    return found


def _typical_s(run: Run, spans: Spans) -> np.ndarray:
    workers, worker = run.header.workers, run.gradients["worker"][spans.order]
    busy_s = spans.data_s + spans.compute_s
    ends = np.searchsorted(worker, np.arange(workers + 1))
    return np.array(
        [
            np.median(busy_s[begin:end]) if end > begin else np.nan
            for begin, end in zip(ends[:-1], ends[1:], strict=True)
        ]
    )


def _curve(run: Run) -> Curve:
    steps, gradients = run.steps, run.gradients
    loss = gradients["loss"].astype(float)
    useful = (gradients["verdict"] == ACCEPTED) & np.isfinite(loss)
    step = gradients["step"][useful]
    counts = np.bincount(step, minlength=len(run))
    known = np.flatnonzero(counts)
    means = np.bincount(step, loss[useful], len(run))[known] / counts[known]
    bins = min(len(known), max(_FEWEST_POINTS, min(len(known) // _STEPS_PER_POINT, _MOST_POINTS)))
    starts = np.arange(bins) * len(known) // max(bins, 1)
    lasts = known[np.append(starts[1:], len(known)).astype(int)[:bins] - 1]
    sizes = np.diff(np.append(starts, len(known)))
    return Curve(
        time_s=steps["published_s"][lasts] - steps["opened_s"][:1],
        samples=np.cumsum(steps["samples_used"].astype(float))[lasts],
        values=np.add.reduceat(means, starts) / sizes if bins else means,
        low=np.minimum.reduceat(means, starts) if bins else means,
        high=np.maximum.reduceat(means, starts) if bins else means,
    )


def _metric(run: Run) -> Curve:
    """Return the metric, by when the evaluated version could be had."""
    values = run.metrics["value"]
    # version v is what step v-1 has made; the first one was there from the beginning
    made = np.clip(run.metrics["version"] - run.first, 0, len(run))
    ready_s = np.concatenate([run.steps["opened_s"][:1], run.steps["published_s"]])
    samples = np.concatenate([np.zeros(1), np.cumsum(run.steps["samples_used"].astype(float))])
    if not len(run):
        values, made = values[:0], made[:0]
    return Curve(ready_s[made] - run.steps["opened_s"][:1], samples[made], values, values, values)


def seconds_to_loss(curves: list[Curve]) -> tuple[float, list[float]] | None:
    """Return the lowest loss that every run reached, and when each did; None where one has no loss.

    A point's loss is the mean over its neighbours too, so that no lucky step decides.

    Example:
        >>> t, zero = np.array([1.0, 2.0, 3.0]), np.zeros(3)
        >>> fast = Curve(t, t, np.array([3.0, 1.0, 1.0]), zero, zero)
        >>> slow = Curve(2 * t, t, np.array([3.0, 3.0, 1.5]), zero, zero)
        >>> seconds_to_loss([fast, slow])
        (2.25, [1.0, 6.0])
    """
    if not curves or not all(len(curve) for curve in curves):
        return None
    smooth = [_smooth(curve.values) for curve in curves]
    loss = max(float(values.min()) for values in smooth)
    firsts = [int(np.argmax(values <= loss)) for values in smooth]
    return loss, [float(c.time_s[first]) for c, first in zip(curves, firsts, strict=True)]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the means of a window of a twentieth, or as much of it as there is at the ends."""
    reach = max(1, len(values) // 40)
    window = np.ones(2 * reach + 1)
    found = np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
    return np.asarray(found[: len(values)])
