"""When workers changed their speed: for good, for a while or little by little; and which steps an advice is for.

Each worker's times are cut into segments by circular binary segmentation (A. Olshen, E. Venkatraman,
R. Lucito and M. Wigler, "Circular binary segmentation for the analysis of array-based DNA copy number
data", Biostatistics 5, 2004), which finds the stretch that differs most from the rest, at an end or
not. It is of ranks here: heavy tails do not upset them, and how much they differ by chance depends on
the number of steps alone. Times that resemble those before them wander
without a change: the threshold allows for that, by the autocorrelation of S. Chakar, E. Lebarbier,
C. Lévy-Leduc and S. Robin ("A robust approach for estimating change-points in the mean of an AR(1)
process", Bernoulli 23, 2017), which changes of level do not bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mpisync.planning.diagnosis import LEVEL, ranks
from mpisync.planning.laws import Seconds
from mpisync.planning.special import special_functions

__all__ = ["Change", "Regimes", "find_regimes"]

_LEAST_RATIO = math.log(1.1)  # of medians: a smaller change is not told
_SHORTEST = 5  # steps of a segment
_FINENESS = 1.15  # from one length of stretches to the next
_EPISODE = 0.2  # of all steps: what is longer and ends is two changes
_MOST_CUTS = 4  # of a worker; with more it switches
_TOGETHER = 0.005  # of all steps, over log ratio: changes of several workers so near are one
_MOST_AUTOCORRELATION = 0.9
_MOST_CHANGES = 4  # of a run: with more nothing holds for long
_TESTS = 1.5  # independent ones a step, as many as all stretches are worth: simulated for 20 to 3000 steps
_MOST_SLOPES = 500  # times between which slopes are taken


@dataclass(frozen=True)
class Change:
    """A change of workers' speed.

    Attributes:
        start: The first row of times after it.
        stop: The row from which the workers are as before; None if it lasts.
        columns: The workers.
        ratios: How many times as long each takes as before, or as before and after.
    """

    start: int
    stop: int | None
    columns: list[int]
    ratios: list[float]


@dataclass(frozen=True)
class Regimes:
    """What changed in a run.

    Attributes:
        changes: Those that last and those that ended, by their start.
        drift: How many times as long workers take at the end as at the start, if they change little
            by little: by column.
        switching: The workers that switch between speeds again and again, which is no change.
        start: The first row of the steps that an advice is for: those since the last change; all if
            there are more than four changes that last.
        stop: The row after the last of them; earlier than the end where too few are since the change.

    Example:
        >>> times_s = np.random.default_rng(0).lognormal(0.0, 0.1, (100, 4))
        >>> times_s[70:, 2] *= 3
        >>> found = find_regimes(times_s, fewest=20)
        >>> [(one.start, one.stop, one.columns) for one in found.changes], found.start, found.stop
        ([(70, None, [2])], 70, 100)
    """

    changes: list[Change] = field(default_factory=list)
    drift: dict[int, float] = field(default_factory=dict)
    switching: list[int] = field(default_factory=list)
    start: int = 0
    stop: int = 0


def find_regimes(times_s: Seconds, measured: NDArray[np.bool_] | None = None, *, fewest: int) -> Regimes:
    """Find what changed; in a run without changes that is nothing, but for a chance of `LEVEL`.

    Args:
        times_s: Seconds by step and worker, (steps, workers), all positive.
        measured: Which of them are no draws; all by default.
        fewest: How many steps an advice needs.
    """
    steps, workers = times_s.shape
    changes: list[Change] = []
    drift, switching = {}, []
    for column in range(workers):
        rows = np.arange(steps) if measured is None else np.flatnonzero(measured[:, column])
        logs = np.log(times_s[rows, column])
        if len(logs) < 4 * _SHORTEST or not np.ptp(logs):
            continue
        threshold = -float(special_functions().ndtri(LEVEL / workers / (2 * _TESTS * len(logs))))
        ends = _pruned(logs, _segments(logs, threshold), threshold)
        if risen := _drift(logs, ends, threshold):
            drift[column] = math.exp(risen)
        elif len(ends) - 2 > _MOST_CUTS:
            switching.append(column)
        else:  # few cuts may be of a worker that switches, most of whose switches were not found: it wanders
            changes += _changes(rows, logs, _pruned(logs, ends, threshold, wanders=True), column)
    changes = _joined(changes, _TOGETHER * steps)
    ends = [0, *sorted({one.start for one in changes if one.stop is None}), steps]
    parts = [(start, stop) for start, stop in pairwise(ends) if stop - start >= fewest]
    if not parts or len(ends) - 2 > _MOST_CHANGES:
        parts = [(0, steps)]
    return Regimes(changes, drift, switching, *parts[-1])


def _segments(logs: Seconds, threshold: float) -> list[int]:
    """Return where segments begin and end, from 0 to the number of times."""
    by_chance = threshold * _wander(_ranked(logs))
    ends, pending = {0, len(logs)}, [(0, len(logs))]
    while pending:
        start, stop = pending.pop()
        if found := _stretch(_ranked(logs[start:stop]), by_chance):
            inner = sorted({start, start + found[0], start + found[1], stop})
            ends.update(inner)
            pending += pairwise(inner)
    return sorted(ends)


def _ranked(values: Seconds) -> Seconds:
    ranked: Seconds = ranks(values[:, None], axis=0)[:, 0]
    return ranked


def _lengths(steps: int) -> list[int]:
    """Return the lengths of the stretches that are tried."""
    count = int(math.log(max(steps / _SHORTEST, 1)) / math.log(_FINENESS)) + 1
    return sorted({one for i in range(count) if (one := round(_SHORTEST * _FINENESS**i)) <= steps - _SHORTEST})


def _wander(ranked: Seconds) -> float:
    """Return how many times as much sums of times vary as those of independent ones: √((1 + ρ)/(1 − ρ)).

    1 + ρ is the ratio of the variances of differences over two steps and over one, less what it is by chance.
    """
    two, one = np.mean((ranked[2:] - ranked[:-2]) ** 2), np.mean(np.diff(ranked) ** 2)
    rho = min(max(float(two / one) - 1 - 1 / math.sqrt(len(ranked)), 0.0), _MOST_AUTOCORRELATION)
    return math.sqrt((1 + rho) / (1 - rho))


def _largest(ranked: Seconds) -> tuple[float, int, int]:
    """Return the largest score of a stretch, its start and its stop; a score is |z| of the rank sum test."""
    steps = len(ranked)
    sums = np.concatenate([[0.0], np.cumsum(ranked - (steps + 1) / 2)])
    best = 0.0, 0, 0
    for length in _lengths(steps):
        scores = np.abs(sums[length:] - sums[:-length]) / math.sqrt(length * (steps - length) * (steps + 1) / 12)
        start = int(scores.argmax())
        best = max(best, (float(scores[start]), start, start + length))
    return best


def _stretch(ranked: Seconds, threshold: float) -> tuple[int, int] | None:
    """Return the stretch whose ranks differ most from the others'; None if none does so significantly."""
    steps = len(ranked)
    score, start, stop = _largest(ranked) if steps >= 2 * _SHORTEST else (0.0, 0, 0)
    if score <= threshold:
        return None
    start, stop = (0 if start < _SHORTEST else start), (steps if steps - stop < _SHORTEST else stop)
    return None if (start, stop) == (0, steps) else (start, stop)


def _pruned(logs: Seconds, ends: list[int], threshold: float, *, wanders: bool = False) -> list[int]:
    """Move ends of segments to their best place; drop those between segments that differ little, or by chance."""
    while len(ends) > 2:
        least = threshold * (_lasting(_within(logs, ends)) if wanders else 1.0)
        sides = [(logs[a:b], logs[b:c]) for a, b, c in zip(ends, ends[1:], ends[2:], strict=False)]
        strengths = [min(_separation(*one) / least, abs(_rise(*one)) / _LEAST_RATIO) for one in sides]
        weakest = int(np.argmin(strengths))
        if strengths[weakest] < 1:
            ends = ends[: weakest + 1] + ends[weakest + 2 :]
            continue
        moved = _moved(logs, ends)
        if moved == ends:
            break
        ends = moved
    return ends


def _moved(logs: Seconds, ends: list[int]) -> list[int]:
    """Move each cut to where deviations from the medians on both sides are least."""
    moved = [0]
    for (a, b), c in zip(pairwise(ends), ends[2:], strict=False):
        before = np.cumsum(np.abs(logs[a:c] - np.median(logs[a:b])))
        after = np.cumsum(np.abs(logs[a:c] - np.median(logs[b:c]))[::-1])[::-1]
        costs = before[_SHORTEST - 1 : -_SHORTEST] + after[_SHORTEST : len(after) - _SHORTEST + 1]
        best = int(costs.argmin()) + _SHORTEST + a
        moved.append(best if costs.min() < costs[b - a - _SHORTEST] and best - moved[-1] >= _SHORTEST else b)
    return [*moved, len(logs)]


def _rise(before: Seconds, after: Seconds) -> float:
    return float(np.median(after) - np.median(before))


def _within(logs: Seconds, ends: list[int]) -> Seconds:
    return np.concatenate([logs[a:b] - np.median(logs[a:b]) for a, b in pairwise(ends)])


def _lasting(residuals: Seconds) -> float:
    """Return what `_wander` does, of times without their changes and at more lags, by Bartlett's weights.

    A worker that switches between two speeds, and stays at each for some steps, is not mistaken so.
    """
    ranked = _ranked(residuals)
    ranked -= ranked.mean()
    most = round(2 * len(ranked) ** (1 / 3))
    correlations = np.array([ranked[lag:] @ ranked[:-lag] for lag in range(1, most + 1)]) / (ranked @ ranked)
    return math.sqrt(max(1.0, 1 + 2 * float(correlations @ (1 - np.arange(1, most + 1) / (most + 1)))))


def _separation(before: Seconds, after: Seconds) -> float:
    """Return |z| of the rank sum test of two samples."""
    m, n = len(before), len(after)
    ranked = _ranked(np.concatenate([before, after]))
    return abs(float(ranked[:m].sum()) - m * (m + n + 1) / 2) / math.sqrt(m * n * (m + n + 1) / 12)


def _drift(logs: Seconds, ends: list[int], threshold: float) -> float:
    """Return how much log times rise along a line, if that fits better than segments do; else 0.

    The line is Theil and Sen's (P. Sen, "Estimates of the regression coefficient based on Kendall's
    tau", JASA 63, 1968); they are compared by the BIC of Laplace's law, under which medians fit best.
    """
    steps = len(logs)
    if len(ends) == 2:
        return 0.0
    at = np.unique(np.linspace(0, steps - 1, _MOST_SLOPES).astype(int))
    first, second = np.triu_indices(len(at), 1)
    slope = float(np.median((logs[at[second]] - logs[at[first]]) / (at[second] - at[first])))
    line = logs - slope * np.arange(steps)

    def bic(residuals: Seconds, parameters: int) -> float:
        return 2 * steps * math.log(max(float(np.abs(residuals).mean()), 1e-12)) + parameters * math.log(steps)

    is_line = bic(line - np.median(line), 2) < bic(_within(logs, ends), 2 * len(ends) - 3)
    correlation = float(np.corrcoef(_ranked(logs), np.arange(steps))[0, 1])  # Spearman's
    by_chance = threshold * _lasting(line) / math.sqrt(steps - 1)
    risen = slope * (steps - 1)
    return risen if is_line and abs(risen) >= _LEAST_RATIO and abs(correlation) > by_chance else 0.0


def _changes(rows: NDArray[np.intp], logs: Seconds, ends: list[int], column: int) -> list[Change]:
    """Tell a worker's changes that last from those that end."""
    found: list[Change] = []
    starts = ends[:-1]
    pieces = [logs[a:b] for a, b in pairwise(ends)]
    i = 1
    while i < len(pieces):
        before, own = float(np.median(pieces[i - 1])), float(np.median(pieces[i]))
        after = float(np.median(pieces[i + 1])) if i + 1 < len(pieces) else own
        if len(pieces[i]) <= _EPISODE * len(logs) and abs(after - before) < abs(own - (before + after) / 2) / 2:
            around = np.concatenate([pieces[i - 1], pieces[i + 1]])
            ratio = math.exp(own - float(np.median(around)))
            found.append(Change(int(rows[starts[i]]), int(rows[starts[i + 1]]), [column], [ratio]))
            del pieces[i], starts[i]
            if abs(after - before) < _LEAST_RATIO:
                pieces[i - 1] = around
                del pieces[i], starts[i]
        else:
            found.append(Change(int(rows[starts[i]]), None, [column], [math.exp(own - before)]))
            i += 1
    return found


def _joined(changes: list[Change], together: float) -> list[Change]:
    """Join the changes of several workers at about the same steps, which is less certain of small ones."""

    def kind(one: Change) -> tuple[bool, bool]:
        return one.stop is None, one.ratios[0] > 1

    groups: list[list[Change]] = []
    for one in sorted(changes, key=lambda one: (kind(one), one.start)):
        last = groups[-1][-1] if groups else one
        apart = max(abs(one.start - last.start), abs((one.stop or 0) - (last.stop or 0)))
        near = 3 + together / min(abs(math.log(each.ratios[0])) for each in (one, last))
        if groups and kind(one) == kind(last) and apart <= near:
            groups[-1].append(one)
        else:
            groups.append([one])
    joined = []
    for group in groups:
        group.sort(key=lambda one: one.columns)
        columns = [one.columns[0] for one in group]
        stop = None if group[0].stop is None else int(np.median([one.stop for one in group if one.stop]))
        start = int(np.median([one.start for one in group]))
        joined.append(Change(start, stop, columns, [one.ratios[0] for one in group]))
    return sorted(joined, key=lambda one: one.start)
