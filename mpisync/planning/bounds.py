"""What is lost by not waiting: bounds on the error, and the bias of taking the fastest."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpisync.planning.laws import Seconds

__all__ = [
    "discarded_work",
    "drop_rates",
    "drop_rates_by_cost",
    "k_async_error",
    "k_sync_error",
    "selection_bias",
]


def k_sync_error(
    updates: float, k: int, *, rate: float, smoothness: float, convexity: float,
    variance: float, batch: int, gap: float,
) -> float:
    """Bound E[F(w_J)] - F* after J updates of K-sync SGD (backup workers) at a constant rate.

    ηLσ²/(2cKm) + (1 - ηc)^J (F(w_0) - F* - ηLσ²/(2cKm)): a floor that falls with K, and a decay to
    it that does not depend on K. Time is J·E[X_(K:P)]. Theorem 2 of Dutta et al.
    (arXiv:1803.01113), after L. Bottou, F. Curtis, J. Nocedal (arXiv:1606.04838, theorem 4.6), for
    noise of bounded variance: η ≤ 1/L.

    Args:
        updates: J.
        k: How many gradients an update averages.
        rate: η, the learning rate.
        smoothness: L, the Lipschitz constant of the gradient.
        convexity: c of strong convexity, c ≤ L.
        variance: σ², of the gradient of one sample.
        batch: m, the samples of one gradient.
        gap: F(w_0) - F*.

    Example:
        >>> k_sync_error(1000, 4, rate=0.1, smoothness=1, convexity=1, variance=4, batch=1, gap=10)
        0.05
    """
    if not 0 < rate * smoothness <= 1:
        raise ValueError(f"the bound holds for rates up to 1/L = {1 / smoothness:g}, not {rate:g}")
    return _bound(updates, rate, convexity, rate * smoothness * variance / (2 * convexity * k * batch), gap)


def k_async_error(
    updates: float, k: int, *, rate: float, smoothness: float, convexity: float,
    variance: float, batch: int, gap: float, gamma: float, fresh: float,
) -> float:
    """Bound E[F(w_J)] - F* after J updates of K-async SGD at a constant rate.

    That of K-sync with c replaced by cγ', γ' = 1 - γ + p₀/2: staleness slows the decay and raises
    the floor. Theorem 3 of Dutta et al. (arXiv:1803.01113), for noise of bounded variance:
    η ≤ 1/(2L).

    Args:
        updates: J.
        k: How many gradients an update averages.
        rate: η, the learning rate.
        smoothness: L, the Lipschitz constant of the gradient.
        convexity: c of strong convexity, c ≤ L.
        variance: σ², of the gradient of one sample.
        batch: m, the samples of one gradient.
        gap: F(w_0) - F*.
        gamma: γ: E‖∇F(w_j) - ∇F(w_τ)‖² ≤ γ E‖∇F(w_j)‖², over the stale parameters w_τ in use.
        fresh: p₀, the least probability that a gradient is not stale; 1/P if times are exponential.

    Example:
        >>> k_async_error(
        ...     1000, 4, rate=0.1, smoothness=1, convexity=1, variance=4, batch=1, gap=10, gamma=0.5, fresh=0.0
        ... )
        0.1
    """
    if not 0 <= gamma <= 1 or not 0 <= fresh <= 1:
        raise ValueError(f"gamma and fresh must be from 0 to 1, but they are {gamma} and {fresh}")
    slowed = convexity * (1 - gamma + fresh / 2)
    if slowed <= 0:
        return math.inf
    if not 0 < rate * smoothness <= 0.5:
        raise ValueError(f"the bound holds for rates up to 1/(2L) = {0.5 / smoothness:g}, not {rate:g}")
    return _bound(updates, rate, slowed, rate * smoothness * variance / (2 * slowed * k * batch), gap)


def _bound(updates: float, rate: float, convexity: float, floor: float, gap: float) -> float:
    return floor + math.pow(1 - rate * convexity, updates) * (gap - floor)


def selection_bias(backup: int, workers: int) -> float:
    """Bound the bias of the mean over the accepted, in standard deviations of one gradient.

    ‖E[g | accepted] - ∇F‖ = ‖Cov(g, accepted)‖/q ≤ σ_g √((1-q)/q), q = N/(N+b), by Cauchy and
    Schwarz in each direction. It is 0 if slowness is the machine's and all draw from the whole
    data; the bound is reached only if slowness and one direction of the gradient go together
    entirely. Always some if slowness is the sample's, as with long sequences.

    Example:
        >>> round(selection_bias(2, 32), 3)
        0.258
    """
    if not 0 <= backup < workers:
        raise ValueError(f"backup must be from 0 to one less than {workers} workers, not {backup}")
    return math.sqrt(backup / (workers - backup))


def discarded_work(times_s: ArrayLike, backup: int) -> float:
    """Return the share of all seconds computed that the slowest `backup` of each step spent.

    More than their share of the gradients, b/(N+b): the discarded are the expensive ones.

    Args:
        times_s: Seconds by step and worker, (steps, workers).
        backup: b.

    Example:
        >>> discarded_work([[1.0, 1.0, 2.0]], backup=1)
        0.5
    """
    ordered = np.sort(np.asarray(times_s, np.float64), axis=1)
    return float(ordered[:, ordered.shape[1] - backup :].sum() / ordered.sum())


def drop_rates(times_s: ArrayLike, backup: int) -> Seconds:
    """Return for each worker the share of its gradients that are among the slowest `backup`.

    Alike for all, b/(N+b), if slowness is nobody's own; 1 for a worker that is always slow.

    Args:
        times_s: Seconds by step and worker, (steps, workers).
        backup: b.

    Example:
        >>> drop_rates([[1.0, 1.1, 2.0], [1.1, 1.0, 2.0]], backup=1)
        array([0., 0., 1.])
    """
    return np.asarray(_dropped(np.asarray(times_s, np.float64), backup).mean(axis=0), np.float64)


def drop_rates_by_cost(times_s: ArrayLike, backup: int, *, buckets: int = 4) -> Seconds:
    """Return the share of gradients discarded among the cheapest, ..., the dearest by their time.

    Says who bears the bias where time is the sample's: which kinds of samples are missed.

    Args:
        times_s: Seconds by step and worker, (steps, workers).
        backup: b.
        buckets: Into how many groups of equal size the gradients are put.

    Example:
        >>> drop_rates_by_cost([[1.0, 1.1, 1.2, 2.0]], backup=1)
        array([0., 0., 0., 1.])
    """
    times = np.asarray(times_s, np.float64)
    order = np.argsort(times, axis=None, kind="stable")
    dropped = _dropped(times, backup).ravel()[order]
    return np.array([part.mean() for part in np.array_split(dropped, buckets)])


def _dropped(times_s: Seconds, backup: int) -> NDArray[np.bool_]:
    workers = times_s.shape[1]
    places = np.argsort(np.argsort(times_s, axis=1, kind="stable"), axis=1, kind="stable")
    mask: NDArray[np.bool_] = places >= workers - backup
    return mask
