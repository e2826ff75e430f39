"""How many updates a target takes, as a function of how many gradients each update averages.

J(N) = J_∞ (1 + N_c/N): below N_c gradients a step, twice the gradients nearly halve the steps; above
it they gain little. N_c is the noise scale in gradients, tr Σ / ‖∇F‖², of S. McCandlish, J. Kaplan,
D. Amodei, "An Empirical Model of Large-Batch Training" (arXiv:1812.06162, eq. 2.7 and 2.8). With the
time of a step the measure of every choice is the time to target, (1 + N_c/N) · E[T_(N)].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mpisync.planning.empirical import block_steps
from mpisync.planning.laws import Seconds
from mpisync.policies.adaptive import moments
from mpisync.records import StepRecord

__all__ = ["Efficiency", "fit_iterations", "iterations_to_loss", "noise_from_steps"]


@dataclass(frozen=True)
class Efficiency:
    """J(N) = floor · (1 + noise/N).

    Attributes:
        noise: N_c in gradients; infinite where only samples count, so that J(N) is as 1/N; 0 where
            only steps count.
        floor: J_∞, the updates that gradients without noise would take; None where it is not known,
            which no choice depends on.
        low: N_c may be as low as this (95 %).
        high: And as high as this.
        source: Where it is from, for people.

    Example:
        >>> efficiency = fit_iterations([(50, 137.5e3), (100, 76.2e3)])
        >>> round(efficiency.noise), round(efficiency.floor, -2), efficiency.iterations([100]).round(-2)
        (411, 14900.0, array([76200.]))
    """

    noise: float
    floor: float | None = None
    low: float | None = None
    high: float | None = None
    source: str = "given"

    def __post_init__(self) -> None:
        """Refuse what is no noise."""
        if not self.noise >= 0:
            raise ValueError(f"the noise scale must not be negative, but it is {self.noise!r}")

    def relative(self, accepted: ArrayLike) -> Seconds:
        """Return a number proportional to J(N): 1 + N_c/N, or 1/N where N_c is infinite."""
        n = np.asarray(accepted, np.float64)
        return 1 / n if math.isinf(self.noise) else 1 + self.noise / n

    def iterations(self, accepted: ArrayLike) -> Seconds:
        """Return J(N).

        Raises:
            ValueError: J_∞ is not known.
        """
        if self.floor is None:
            raise ValueError("J(N) needs J_∞, which the noise alone does not tell: give iterations at two N")
        return self.floor * self.relative(accepted)


def fit_iterations(pairs: Iterable[tuple[float, float]]) -> Efficiency:
    """Fit J(N) = J_∞ (1 + N_c/N) to the updates that runs at several N took to a target.

    Least squares of relative errors, with J_∞ and N_c not negative.

    Args:
        pairs: (N, J) of two runs at least, at different N.

    Raises:
        ValueError: They are too few, alike, or grow with N.
    """
    points = [(float(n), float(j)) for n, j in pairs]
    if len({n for n, _ in points}) < 2:
        raise ValueError(f"J(N) takes the iterations at two different N at least, not {points}")
    if not all(n > 0 and 0 < j < math.inf for n, j in points):
        raise ValueError(f"N and J(N) must be greater than 0, not {points}")
    n, j = np.array(points).T
    ones = np.ones_like(j)
    solution = np.linalg.lstsq(np.stack([1 / j, 1 / (n * j)], axis=1), ones, rcond=None)[0]
    flat, slope = (float(x) for x in solution)
    if slope <= 0:
        raise ValueError(f"more gradients a step should take fewer steps, but these take more: {points}")
    if flat <= 0:  # J falls faster than 1/N: all noise, as far as these runs tell
        return Efficiency(math.inf, source="iterations given, which fall as 1/N or faster")
    return Efficiency(slope / flat, flat, source=f"iterations given at {len(points)} N")


def noise_from_steps(steps: Sequence[StepRecord], *, seed: int = 0) -> Efficiency | None:
    """Measure N_c from the gradients' norms, which the root takes.

    Each step estimates the variance of one gradient and the squared norm of the true one, as
    `Adaptive` does too. N_c is the ratio of their means over the steps, since a mean of ratios would
    be biased; its range is by a bootstrap in blocks.

    Args:
        steps: Of a record.
        seed: Of the bootstrap.

    Returns:
        None where no step has norms of 2 gradients or more.

    Example:
        >>> steps = [StepRecord(i, i, i, i, 2, 2, [(0, i, i), (1, i, i)], [], norms=(6.0, 2.0)) for i in range(9)]
        >>> noise_from_steps(steps).noise
        2.0
    """
    rows = [estimates for step in steps if (estimates := moments(step)) is not None]
    if not rows:
        return None
    variance, signal = np.array(rows, np.float64).T
    rng, length = np.random.default_rng(seed), block_steps(len(rows))
    starts = rng.integers(len(rows), size=(400, math.ceil(len(rows) / length)))
    drawn = (starts[..., None] + np.arange(length)).reshape(400, -1) % len(rows)
    ratios = _ratio(variance[drawn].mean(axis=1), signal[drawn].mean(axis=1))
    low, high = np.quantile(ratios, [0.025, 0.975], method="nearest")
    noise = float(_ratio(variance.mean(), signal.mean()))
    return Efficiency(noise, None, float(low), float(high), f"gradient norms of {len(rows)} steps")


def _ratio(variance: ArrayLike, signal: ArrayLike) -> Seconds:
    """Divide; noise that drowns the gradient is infinite."""
    top, bottom = np.maximum(variance, 0.0), np.asarray(signal)
    result: Seconds = np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), math.inf)
    return result


def iterations_to_loss(steps: Sequence[StepRecord], target: float, *, smooth: int = 20) -> int | None:
    """Return after how many updates the training loss first was at the target; None if never.

    The loss of a step is the mean over its accepted gradients; it is averaged over the last `smooth`
    steps, so that one lucky batch does not count. With runs at several N this gives the pairs that
    `fit_iterations` takes.

    Example:
        >>> from mpisync.records import ArrivalRecord
        >>> def step(i, loss):
        ...     arrival = ArrivalRecord(0, i, i, "accepted", 0.1, loss=loss)
        ...     return StepRecord(i, i, i, i, 1, 1, [(0, i, i)], [arrival])
        >>> iterations_to_loss([step(i, 1.0 / (i + 1)) for i in range(50)], 0.1, smooth=1)
        10
    """
    recent: list[float] = []
    for step in steps:
        losses = [a.loss for a in step.arrivals if a.verdict == "accepted" and a.loss is not None]
        if losses:
            recent.append(sum(losses) / len(losses))
        if len(recent) >= smooth and sum(recent[-smooth:]) / smooth <= target:
            return step.step + 1
    return None
