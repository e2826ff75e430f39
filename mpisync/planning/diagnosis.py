"""How workers straggle: whose slowness it is, whether it lasts, and whether it comes in clusters.

Each test asks for one way in which "independent and alike" is wrong, which is what most delay laws
assume. They are of ranks or permutations, so that a heavy tail does not upset them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mpisync.planning.laws import Seconds
from mpisync.planning.special import special_functions

__all__ = ["LEVEL", "SlowWorker", "Straggling", "diagnose", "ranks", "slow_events"]

LEVEL = 0.01  # a test below it has found something
_PERMUTATIONS = 199
_MOST_TIMES, _MOST_WORKERS = 200_000, 1000  # used by the permutations
_SLOW_RATIO, _SLOW_SHARE = 1.15, 0.75  # of the others' median, and in so many of the steps: a slow worker
_EVENT_SPREADS = 4.0  # above the median, in robust standard deviations of log time: an event
_FEWEST_EVENTS = 0.002  # of all times; with fewer, the slowest 5 % of each worker's are looked at


@dataclass(frozen=True)
class SlowWorker:
    """A worker that is persistently slow.

    Attributes:
        column: Its column.
        ratio: How many times the median of the others it takes.
        share: In what share of the steps it is slower than theirs by 10 %.

    Example:
        >>> SlowWorker(3, 2.36, 1.0).ratio
        2.36
    """

    column: int
    ratio: float
    share: float


@dataclass(frozen=True)
class Straggling:
    """How workers straggle.

    Attributes:
        median_s: Of all times, in seconds.
        mean_s: Of all times, in seconds.
        slowest_over_mean: What waiting for all costs: E[max of a step] / mean.
        slow: The persistently slow workers, slowest first.
        rank_effect: Kendall's W, the agreement of the steps on who is slow: 0 none, 1 entire.
        rank_p: Of Friedman's test that no worker is slower than another.
        autocorrelation: Of a worker's time with its time one step before, by ranks.
        autocorrelation_p: Of its test against 0, two-sided, by the normal approximation.
        drift: Of the steps' medians with those one step before, by ranks.
        drift_p: Of its test against 0.
        together: Variance of the steps' mean log times, relative to that of independent workers.
        together_p: Of the permutation test that it is 1.
        clustering: Variance of the number of slow workers in a step, likewise.
        clustering_p: Of the permutation test that it is 1.
        event_rate: The share of times that are slow events: see `slow_events`.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> found = diagnose(rng.lognormal(0.0, 0.1, (100, 8)) * ([1.0] * 7 + [2.36]))
        >>> [(one.column, round(one.ratio, 2)) for one in found.slow], found.is_independent
        ([(7, 2.4)], False)
    """

    median_s: float
    mean_s: float
    slowest_over_mean: float
    slow: list[SlowWorker]
    rank_effect: float
    rank_p: float
    autocorrelation: float
    autocorrelation_p: float
    drift: float
    drift_p: float
    together: float
    together_p: float
    clustering: float
    clustering_p: float
    event_rate: float

    @property
    def is_clustered(self) -> bool:
        """Whether slow times come together in some steps."""
        return min(self.together_p, self.clustering_p) < LEVEL

    @property
    def is_independent(self) -> bool:
        """Whether no test found that the times are not independent and alike."""
        tests = (self.rank_p, self.autocorrelation_p, self.drift_p, self.together_p, self.clustering_p)
        return min(tests) >= LEVEL


def diagnose(times_s: Seconds, *, seed: int = 0) -> Straggling:
    """Say how workers straggle.

    Args:
        times_s: Seconds by step and worker, (steps, workers), all positive; 2 of each at least.
        seed: Of the permutations.
    """
    steps, workers = times_s.shape
    if steps < 2 or workers < 2:
        raise ValueError(f"a diagnosis takes 2 steps and 2 workers at least, not {steps} and {workers}")
    logs = np.log(times_s)
    rank_effect, rank_p = _friedman(times_s)
    own = logs - np.median(logs, axis=0)
    within = own - np.median(own, axis=1, keepdims=True)
    autocorrelation, autocorrelation_p = _lag_one(within)
    drift, drift_p = _lag_one(np.median(own, axis=1, keepdims=True))
    together, clustering = _permuted(times_s, np.random.default_rng(seed))
    return Straggling(
        float(np.median(times_s)), float(times_s.mean()), float(times_s.max(axis=1).mean() / times_s.mean()),
        _slow_workers(times_s), rank_effect, rank_p, autocorrelation, autocorrelation_p, drift, drift_p,
        *together, *clustering, float(slow_events(times_s).mean()),
    )  # fmt: skip


def slow_events(times_s: Seconds) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """Mark the times that stand out from their worker's own: a mask, (steps, workers).

    They lie more than 4 robust standard deviations (1.4826 MAD of log time) above the median.

    Example:
        >>> slow_events(np.array([[1.0, 2.0], [1.1, 2.1], [0.9, 1.9], [9.0, 2.0]]))[:, 0].tolist()
        [False, False, False, True]
    """
    logs = np.log(times_s)
    own = logs - np.median(logs, axis=0)
    spread = 1.4826 * np.median(np.abs(own))
    mask: np.ndarray[tuple[int, int], np.dtype[np.bool_]] = own > _EVENT_SPREADS * max(float(spread), 1e-3)
    return mask


def _friedman(times_s: Seconds) -> tuple[float, float]:
    """Return Kendall's W and the p of Friedman's test, steps being the blocks."""
    steps, workers = times_s.shape
    means = ranks(times_s, axis=1).mean(axis=0)
    effect = 12 * float(((means - (workers + 1) / 2) ** 2).sum()) / (workers * (workers**2 - 1))
    return effect, float(special_functions().chdtrc(workers - 1, steps * (workers - 1) * effect))


def ranks(values: Seconds, axis: int) -> Seconds:
    """Return ranks from 1 along an axis, of 2; those of equal values are in an order at random.

    Example:
        >>> ranks(np.array([[0.3, 0.1, 0.2]]), axis=1)
        array([[3., 1., 2.]])
    """
    jitter = np.random.default_rng(0).random(values.shape)
    order = np.lexsort((jitter, values), axis=axis)
    ranked = np.empty(values.shape)
    np.put_along_axis(ranked, order, np.expand_dims(np.arange(1.0, values.shape[axis] + 1), 1 - axis), axis)
    return ranked


def _lag_one(values: Seconds) -> tuple[float, float]:
    """Return the lag-1 autocorrelation of ranks within columns, pooled, and its p."""
    steps, workers = values.shape
    if steps < 4 or not np.ptp(values):
        return 0.0, 1.0
    ranked = ranks(values, axis=0) - (steps + 1) / 2
    # Independent ranks without replacement correlate by -1/n on average, with variance about 1/n.
    correlation = float((ranked[1:] * ranked[:-1]).sum() / (ranked**2).sum()) + 1 / steps
    z = correlation * math.sqrt(steps * workers)
    return correlation, math.erfc(abs(z) / math.sqrt(2))


def _permuted(times_s: Seconds, rng: np.random.Generator) -> tuple[tuple[float, float], tuple[float, float]]:
    """Hold the steps' sums against those of workers whose times are shuffled over the steps."""
    times_s = times_s[:, :_MOST_WORKERS]
    steps = min(len(times_s), max(200, _MOST_TIMES // times_s.shape[1]))
    times_s = times_s[:steps]
    events = slow_events(times_s)
    if events.mean() < _FEWEST_EVENTS:
        events = ranks(times_s, axis=0) > 0.95 * steps
    logs = np.log(times_s)
    own = logs - np.median(logs, axis=0)
    spread = max(1.4826 * float(np.median(np.abs(own))), 1e-3)
    # Events weigh no more than an ordinary deviation here: they have the other test.
    scores = np.stack([np.clip(own / spread, -2, 2), events])
    seen = scores.sum(axis=2).var(axis=1)
    drawn = np.empty((_PERMUTATIONS, 2))
    for draw in drawn:
        order = rng.permuted(np.broadcast_to(np.arange(steps)[:, None], times_s.shape), axis=0)
        draw[:] = np.take_along_axis(scores, order[None], axis=1).sum(axis=2).var(axis=1)
    expected = np.maximum(drawn.mean(axis=0), 1e-300)
    p = (1 + (drawn >= seen * (1 - 1e-12)).sum(axis=0)) / (1 + _PERMUTATIONS)
    index = np.where(seen > 0, seen / expected, 1.0)
    return (float(index[0]), float(p[0])), (float(index[1]), float(p[1]))


def _slow_workers(times_s: Seconds) -> list[SlowWorker]:
    """Find the persistently slow, against the median of those that are not: of the fast, be they few."""
    steps, workers = times_s.shape
    fast = _fast(times_s)
    for _ in range(3):  # the slow are no measure of the others
        ratios = times_s / np.median(times_s[:, fast], axis=1, keepdims=True)
        if len(fast) == workers == 2:
            ratios = times_s / times_s.min(axis=1, keepdims=True)
        middle, share = np.median(ratios, axis=0), (ratios > 1.1).mean(axis=0)
        is_slow = (middle >= _SLOW_RATIO) & (share >= _SLOW_SHARE)
        others = [c for c in range(workers) if not is_slow[c]]
        if others == fast or not others:
            break
        fast = others
    slow = [SlowWorker(c, float(middle[c]), float(share[c])) for c in range(workers) if is_slow[c]]
    return sorted(slow, key=lambda one: -one.ratio)


def _fast(times_s: Seconds) -> list[int]:
    """Return the fastest group, by gaps between the workers' medians; all if there are no gaps.

    A group holds a fifth of the workers at least: fewer are exceptions, and no measure.
    """
    medians = np.median(times_s, axis=0)
    order = np.argsort(medians, kind="stable")
    gaps = np.flatnonzero(np.diff(np.log(medians[order])) >= math.log(_SLOW_RATIO)) + 1
    groups = np.split(order, gaps)
    return sorted(next((one for one in groups if 5 * len(one) >= len(order)), order).tolist())
