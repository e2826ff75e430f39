"""Delay laws fitted to measured times, and how good they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mpisync.planning.composite import Composite
from mpisync.planning.diagnosis import LEVEL, diagnose, slow_events
from mpisync.planning.laws import (
    Exponential,
    Independent,
    Lognormal,
    Pareto,
    Seconds,
    ShiftedExponential,
    Weibull,
)

__all__ = ["Fit", "fit_composite", "fit_laws"]

_MOST_TIMES = 2000  # used by the test of fit: with more, every law is refused for what does not matter
_BOOTSTRAPS = 99
_FEWEST_EVENTS = 10  # from which a tail can be fitted
_NO_CLUSTERS = 1e6  # event_a + event_b where events are independent


@dataclass(frozen=True)
class Fit:
    """A law of independent times, fitted by maximum likelihood.

    Attributes:
        law: The law.
        aic: Akaike's information criterion, 2 parameters - 2 log likelihood: the least is best.
        distance: Kolmogorov and Smirnov's: the largest difference of the distribution functions.
        p: Of that distance if the law is right, its parameters being fitted (by bootstrap); it
            presumes independent times.
        slowest_ratio: E[max of a step] under the law, relative to what was measured. What the law
            gets wrong where it matters: below 1 it promises too little waiting.

    Example:
        >>> times_s = np.random.default_rng(0).lognormal(0.0, 0.3, (50, 4))
        >>> best = fit_laws(times_s)[0]
        >>> best.law.NAME, best.p > 0.05
        ('lognormal', True)
    """

    law: Independent
    aic: float
    distance: float
    p: float
    slowest_ratio: float


def fit_laws(times_s: Seconds, *, seed: int = 0) -> list[Fit]:
    """Fit every law of independent times, the best by AIC first.

    Args:
        times_s: Seconds by step and worker, (steps, workers), all positive.
        seed: Of the test of fit.

    Returns:
        Nothing where all times are equal, which no law is fitted to.
    """
    if not np.ptp(times_s):
        return []
    rng = np.random.default_rng(seed)
    times = times_s.ravel()
    some = times if len(times) <= _MOST_TIMES else rng.choice(times, _MOST_TIMES, replace=False)
    slowest_s = float(times_s.max(axis=1).mean())
    fits = []
    for fit, parameters in _FITS:
        law = fit(times)
        aic = 2 * parameters - 2 * float(law.log_density(times).sum())
        distance = _distance(law, times)
        drawn = [_refitted_distance(fit, law, rng, len(some)) for _ in range(_BOOTSTRAPS)]
        p = (1 + sum(one >= _distance(fit(some), some) for one in drawn)) / (1 + _BOOTSTRAPS)
        expected_s = float(law.order_statistics_s(times_s.shape[1])[-1])
        fits.append(Fit(law, aic, distance, p, expected_s / slowest_s))
    return sorted(fits, key=lambda one: one.aic)


def _refitted_distance(
    fit: Callable[[Seconds], Independent], law: Independent, rng: np.random.Generator, size: int
) -> float:
    drawn = law.sample(rng, size, 1)[:, 0]
    return _distance(fit(drawn), drawn)


def _distance(law: Independent, times: Seconds) -> float:
    below = -np.expm1(-law.hazard(np.sort(times)))
    places = np.arange(len(times) + 1) / len(times)
    return float(max((places[1:] - below).max(), (below - places[:-1]).max()))


def _exponential(times: Seconds) -> Independent:
    return Exponential(float(times.mean()))


def _shifted(times: Seconds) -> Independent:
    least = float(times.min())
    return ShiftedExponential(least, float(times.mean()) - least)


def _pareto(times: Seconds) -> Independent:
    least = float(times.min())
    return Pareto(least, len(times) / float(np.log(times / least).sum()))


def _lognormal(times: Seconds) -> Independent:
    logs = np.log(times)
    return Lognormal(math.exp(logs.mean()), float(logs.std()))


def _weibull(times: Seconds) -> Independent:
    """Solve Σ t^k log t / Σ t^k - 1/k = mean log t for k, by Newton's method in log k."""
    logs = np.log(times) - math.log(times.max())
    shape = 1.2 / max(float(logs.std()), 1e-9)  # as for the moments of log t
    for _ in range(50):
        weights = np.exp(shape * logs)
        total, first, second = (float((weights * logs**i).sum()) for i in range(3))
        error = first / total - 1 / shape - float(logs.mean())
        slope = second / total - (first / total) ** 2 + shape**-2
        step = error / (slope * shape)
        shape *= math.exp(-max(-1.0, min(1.0, step)))
        if abs(step) < 1e-10:
            break
    scale = times.max() * float(np.exp(shape * logs).mean()) ** (1 / shape)
    return Weibull(float(scale), shape)


_FITS: tuple[tuple[Callable[[Seconds], Independent], int], ...] = (
    (_exponential, 1), (_shifted, 2), (_pareto, 2), (_lognormal, 2), (_weibull, 2),
)  # fmt: skip


def fit_composite(times_s: Seconds, *, seed: int = 0) -> Composite:
    """Fit the law of dependent times: what a larger number of such workers would do.

    Factors of steps and of machines are fitted where the tests of `diagnose` find them; times that
    stand out are events, whose number in a step is beta-binomial (by moments) and whose length is
    Pareto's (by Hill's estimator), where there are 10 or more of them.

    Args:
        times_s: Seconds by step and worker, (steps, workers), all positive.
        seed: Of the tests.

    Example:
        >>> truth = Composite(median_s=0.1, sigma=0.05, slow_workers=1, slow_factor=2.0)
        >>> law = fit_composite(truth.sample(np.random.default_rng(0), 300, 8))
        >>> law.slow_workers, round(law.slow_factor, 1), round(law.sigma, 2)
        (1, 2.0, 0.05)
    """
    found = diagnose(times_s, seed=seed)
    logs = np.log(times_s)
    centre = float(np.median(logs))
    ranks = np.median(logs, axis=0) - centre
    slow = [one.column for one in found.slow]
    usual = [c for c in range(times_s.shape[1]) if c not in slow]
    has_ranks = found.rank_p < LEVEL
    if not has_ranks:
        ranks[usual] = 0.0
    logs = logs - ranks
    rows = np.median(logs, axis=1) - centre if found.together_p < LEVEL else np.zeros(len(logs))
    logs = logs - rows[:, None]
    events = slow_events(np.exp(logs))
    body = logs[~events]
    # What is left of medians of so few times is noise of the body.
    noise = math.pi / 2 * float(body.var())
    steps, workers = times_s.shape
    values = {
        "median_s": math.exp(centre),
        "sigma": float(body.std()),
        "step_sigma": _beyond(rows, noise / workers),
        "rank_sigma": _beyond(ranks[usual], noise / steps) if has_ranks else 0.0,
    }
    if slow:
        values |= {"slow_workers": len(slow), "slow_factor": math.exp(float(ranks[slow].mean()))}
    if events.sum() >= _FEWEST_EVENTS:
        values |= _events(np.exp(logs), events)
    elif events.any():
        values["sigma"] = float(logs.std())
    return Composite(**values)  # type: ignore[arg-type]


def _beyond(values: Seconds, noise: float) -> float:
    return math.sqrt(max(float(values.var()) - noise, 0.0))


def _events(times: Seconds, events: np.ndarray[tuple[int, int], np.dtype[np.bool_]]) -> dict[str, float]:
    steps, workers = times.shape
    counts = events.sum(axis=1)
    p = float(counts.mean()) / workers
    # Var of a beta-binomial: P p (1-p) (1 + (P-1) ρ), ρ = 1/(a+b+1).
    excess = float(counts.var(ddof=1)) / (workers * p * (1 - p)) - 1 if steps > 1 and p < 1 else 0.0
    rho = excess / (workers - 1) if workers > 1 else 0.0
    weight = min(_NO_CLUSTERS, 1 / rho - 1) if rho > 1 / (_NO_CLUSTERS + 1) else _NO_CLUSTERS
    weight = max(weight, 1e-3)
    long = times[events]
    least = float(long.min())
    alpha = len(long) / max(float(np.log(long / least).sum()), 1e-9)
    return {
        "cap_s": least, "event_a": p * weight, "event_b": (1 - p) * weight,
        "event_scale_s": least, "event_alpha": alpha,
    }  # fmt: skip
