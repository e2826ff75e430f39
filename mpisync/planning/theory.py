"""How long a step takes under each way of waiting, in theory.

The words are those of S. Dutta, G. Joshi, S. Ghosh, P. Dube, P. Nagpurkar, "Slow and Stale Gradients
Can Win the Race" (arXiv:1803.01113): P workers, an update takes K gradients, X is the time of one.

* K-sync: the first K of P at the newest parameters; the others start afresh. Backup workers.
* K-batch-sync: the first K gradients whoever gives them; a fast worker gives several at the same
  parameters. All start afresh at an update.
* K-async: the first K workers' gradients; the others go on computing at their old parameters.
* K-batch-async: any K gradients; everyone goes on at once. `Async(k)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mpisync.planning.laws import DelayLaw, Exponential, Independent, Seconds

__all__ = [
    "Estimate",
    "k_async",
    "k_batch_async",
    "k_batch_sync",
    "k_sync",
    "order_statistics",
    "speedup_per_machine",
]

_CHUNK = 2_000_000  # times drawn at once


@dataclass(frozen=True)
class Estimate:
    """A mean time and how well it is known.

    Attributes:
        mean_s: The mean, in seconds.
        error_s: Its standard error; 0 where it was computed and not sampled.

    Example:
        >>> Estimate(1.5, 0.0)
        Estimate(mean_s=1.5, error_s=0.0)
    """

    mean_s: float
    error_s: float


def order_statistics(
    law: DelayLaw, workers: int, *, steps: int = 20_000, seed: int = 0
) -> tuple[Seconds, Seconds]:
    """Return E[X_(K:P)] for K = 1..P and the standard errors, both in seconds.

    Laws of independent times are computed (errors 0): by closed form where there is one, by
    quadrature elsewhere. Others are sampled.

    Args:
        law: How long a gradient takes.
        workers: P.
        steps: How many steps are sampled where that is needed.
        seed: Of the sampling.

    Example:
        >>> means_s, errors_s = order_statistics(Exponential(1.0), workers=4)
        >>> means_s.round(3), errors_s.max().item()
        (array([0.25 , 0.583, 1.083, 2.083]), 0.0)
    """
    _check(1, workers)
    if isinstance(law, Independent):
        return law.order_statistics_s(workers), np.zeros(workers)
    rng = np.random.default_rng(seed)
    total, squares, done = np.zeros(workers), np.zeros(workers), 0
    while done < steps:
        times_s = np.sort(law.sample(rng, min(steps - done, max(1, _CHUNK // workers)), workers), axis=1)
        done += len(times_s)
        total += times_s.sum(axis=0)
        squares += (times_s**2).sum(axis=0)
    means = total / done
    return means, np.sqrt(np.maximum(squares / done - means**2, 0) / done)


def k_sync(law: DelayLaw, k: int, workers: int) -> Estimate:
    """Return E[T] of K-sync: E[X_(K:P)], in seconds.

    Exponential with rate μ: (H_P - H_{P-K})/μ. This is what a step of `BackupWorkers(P - K)` takes
    if late workers could start afresh; one that is late by more than a step misses the next too.

    Example:
        >>> round(k_sync(Exponential(1.0), 3, workers=4).mean_s, 3)
        1.083
    """
    _check(k, workers)
    means_s, errors_s = order_statistics(law, workers)
    return Estimate(float(means_s[k - 1]), float(errors_s[k - 1]))


def k_batch_sync(law: DelayLaw, k: int, workers: int, *, draws: int = 20_000, seed: int = 0) -> Estimate:
    """Return E[T] of K-batch-sync, in seconds; K may exceed P.

    Exponential with rate μ: K/(Pμ), since without memory some worker finishes every 1/(Pμ). Other
    laws: the K-th renewal of P renewal processes that start together, by `draws` samples.

    Example:
        >>> k_batch_sync(Exponential(1.0), 3, workers=4)
        Estimate(mean_s=0.75, error_s=0.0)
    """
    _check(k, workers, may_exceed=True)
    if isinstance(law, Exponential):
        return Estimate(k * law.mean_s / workers, 0.0)
    rng = np.random.default_rng(seed)
    closings = []
    for _ in range(0, draws, chunk := max(1, min(draws, _CHUNK // (workers * 4)))):
        ends = law.sample(rng, chunk, workers)
        finished = ends[..., None]
        # Draw further gradients until nobody could still finish one before the K-th of those seen.
        while True:
            seen = finished.reshape(chunk, -1)
            kth = np.partition(seen, k - 1, axis=1)[:, k - 1] if seen.shape[1] >= k else np.full(chunk, math.inf)
            if (finished[..., -1] >= kth[:, None]).all():
                break
            ends = ends + law.sample(rng, chunk, workers)
            finished = np.concatenate([finished, ends[..., None]], axis=2)
        closings.append(kth)
    times_s = np.concatenate(closings)
    return Estimate(float(times_s.mean()), float(times_s.std() / math.sqrt(len(times_s))))


def k_async(law: DelayLaw, k: int, workers: int, *, updates: int = 400, seed: int = 0) -> Estimate:
    """Return E[T] of K-async in the long run, in seconds.

    At most that of K-sync if times are new-longer-than-used (a gradient under way is expected sooner
    than a fresh one), and equal to it if they are exponential: then (H_P - H_{P-K})/μ. Other laws:
    by 200 independent runs, each of `updates` updates after as many that are not counted.

    Example:
        >>> k_async(Exponential(1.0), 3, workers=4) == k_sync(Exponential(1.0), 3, workers=4)
        True
    """
    _check(k, workers)
    if isinstance(law, Exponential):
        return k_sync(law, k, workers)
    rng, runs = np.random.default_rng(seed), 200
    left = law.sample(rng, runs, workers)
    waited = np.zeros(runs)
    for update in range(2 * updates):
        kth = np.partition(left, k - 1, axis=1)[:, k - 1 : k]
        fresh = law.sample(rng, runs, workers)
        left = np.where(left <= kth, fresh, left - kth)
        if update >= updates:
            waited += kth[:, 0]
    return Estimate(float(waited.mean() / updates), float(waited.std() / updates / math.sqrt(runs)))


def k_batch_async(law: DelayLaw, k: int, workers: int) -> Estimate:
    """Return E[T] of K-batch-async in the long run: K·E[X]/P, in seconds, for any law.

    Each worker gives one gradient every E[X] (the elementary renewal theorem), so P workers give
    P/E[X] a second, of which an update takes K.

    Example:
        >>> k_batch_async(Exponential(1.0), 3, workers=4)
        Estimate(mean_s=0.75, error_s=0.0)
    """
    _check(k, workers, may_exceed=True)
    means_s, errors_s = order_statistics(law, 1)
    return Estimate(float(k * means_s[0] / workers), float(k * errors_s[0] / workers))


def speedup_per_machine(step_s: ArrayLike) -> Seconds:
    """Return how much more each machine gets done than under full synchronous SGD, for N = 1..P.

    (T_P / T_N) · N/P: accepted gradients a second and machine, relative to N = P. The honest measure
    of the TensorFlow paper (OSDI 2016, section 6.3): 50 workers had the shortest steps with 4
    backups, and the best speed-up per machine with 3. It is also the least gain in time to target
    whatever the noise, since J(N)/J(P) ≤ P/N.

    Args:
        step_s: The mean time of a step for N = 1..P, in seconds.

    Example:
        >>> speedup_per_machine([1.0, 1.25, 2.0])
        array([0.66666667, 1.06666667, 1.        ])
    """
    times_s = np.asarray(step_s, np.float64)
    share = np.arange(1, len(times_s) + 1) / len(times_s)
    gains: Seconds = times_s[-1] / times_s * share
    return gains


def _check(k: int, workers: int, *, may_exceed: bool = False) -> None:
    if workers < 1 or k < 1 or (k > workers and not may_exceed):
        raise ValueError(f"k must be from 1 to the number of workers, but k is {k} with {workers}")
