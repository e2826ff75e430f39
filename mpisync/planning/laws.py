"""How long a worker takes for a gradient: laws of independent times, and their order statistics.

Every law here is written as a function of the cumulative hazard h = -log P(T > t), which for any
continuous law is exponential with mean 1. So one quadrature serves all, exact far into the tail.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from functools import cache
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mpisync.planning.special import special_functions

__all__ = ["DelayLaw", "Exponential", "Independent", "Lognormal", "Pareto", "ShiftedExponential", "Weibull"]

Seconds: TypeAlias = NDArray[np.float64]

_NODES = 400  # of the quadrature: more change no digit that a double holds


class DelayLaw(Protocol):
    """What the simulation, the theory and the plan ask of a law.

    Example:
        >>> class Constant:
        ...     def sample(self, rng, steps, workers):
        ...         return np.full((steps, workers), 0.5)
        >>> from mpisync.planning.theory import k_sync
        >>> k_sync(Constant(), 3, workers=4).mean_s
        0.5
    """

    def sample(self, rng: np.random.Generator, steps: int, workers: int) -> Seconds:
        """Draw the seconds that each worker takes for a gradient in each step: (steps, workers)."""
        ...


class Independent(ABC):
    """A law whose times are independent and alike over steps and workers.

    Example:
        >>> law = Lognormal(median_s=1.0, sigma=0.1)
        >>> law.sample(np.random.default_rng(0), steps=2, workers=3).shape
        (2, 3)
        >>> str(law)
        'lognormal:median=1,sigma=0.1'
    """

    NAME = ""

    def __post_init__(self) -> None:
        """Refuse parameters that make no law."""
        for field in fields(self):  # type: ignore[arg-type]
            value = float(getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            least = 0.0 if field.name in ("shift_s", "sigma") else math.ulp(0.0)
            if not (least <= value < math.inf):
                what = "finite and not negative" if least == 0 else "finite and greater than 0"
                raise ValueError(f"{field.name} of the law {self.NAME} must be {what}, not {value!r}")

    @abstractmethod
    def at_hazard(self, hazard: Seconds) -> Seconds:
        """Return the time that is exceeded with probability exp(-hazard), in seconds."""

    @abstractmethod
    def hazard(self, times_s: Seconds) -> Seconds:
        """Return -log P(T > t), the inverse of `at_hazard`; 0 below the law's least time."""

    @abstractmethod
    def log_density(self, times_s: Seconds) -> Seconds:
        """Return the logarithm of the density, per second, at times not below the law's least."""

    def expected_s(self) -> float:
        """Return the mean, in seconds; infinite where the tail is too heavy."""
        return float(self.order_statistics_s(1)[0])

    def sample(self, rng: np.random.Generator, steps: int, workers: int) -> Seconds:
        """Draw the seconds that each worker takes for a gradient in each step: (steps, workers)."""
        return self.at_hazard(rng.standard_exponential((steps, workers)))

    def order_statistics_s(self, workers: int) -> Seconds:
        """Return E[X_(K:P)] for K = 1..P: the mean time to the K-th of P gradients, in seconds."""
        ranks = np.arange(1, workers + 1, dtype=np.float64)
        chunks = np.array_split(ranks, max(1, workers // 1000))
        return np.concatenate([self._integrate(chunk, workers) for chunk in chunks])

    def _integrate(self, k: Seconds, workers: int) -> Seconds:
        """Integrate over the hazard of the k-th of P.

        Its density is P!/((k-1)! (P-k)!) · (1 - e^-h)^(k-1) · e^(-h (P-k+1)). The quadrature is
        that of Gauss and Legendre in log h, in which laws that vanish fast at 0 are smooth too.
        """
        log_gamma = special_functions().gammaln
        beyond = workers - k + 1
        mean = harmonic(workers) - harmonic(workers - k)
        spread = np.sqrt(_harmonic_squares(workers) - _harmonic_squares(workers - k))
        low = np.log(np.maximum(mean - 12 * spread, 1e-12 * mean))
        high = np.log(mean + 12 * spread + 60 / beyond)
        nodes, weights = _quadrature()
        half = ((high - low) / 2)[:, None]
        log_h = low[:, None] + half * (nodes + 1)
        h = np.exp(log_h)
        log_density = (
            (log_gamma(workers + 1) - log_gamma(k) - log_gamma(beyond))[:, None]
            + (k - 1)[:, None] * np.log(-np.expm1(-h))
            - beyond[:, None] * h
            + log_h
        )
        mass = np.exp(log_density) * weights * half
        # The density's constants are differences of large logarithms: its sum is 1 by definition.
        result: Seconds = (mass * self.at_hazard(h)).sum(axis=1) / mass.sum(axis=1)
        return result

    def __str__(self) -> str:
        """Return the command-line form."""
        values = ",".join(
            f"{field.name.removesuffix('_s')}={getattr(self, field.name):.6g}"
            for field in fields(self)  # type: ignore[arg-type]
        )
        return f"{self.NAME}:{values}"


@cache
def _quadrature() -> tuple[Seconds, Seconds]:
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    return nodes, weights


def harmonic(n: Seconds | float) -> Seconds:
    """Return H_n = 1 + 1/2 + ... + 1/n for whole n ≥ 0.

    Example:
        >>> harmonic(4.0).round(6).item()
        2.083333
    """
    special = special_functions()
    values: Seconds = special.digamma(np.asarray(n) + 1.0) + np.euler_gamma
    return values


def _harmonic_squares(n: Seconds | float) -> Seconds:
    """Return 1 + 1/4 + ... + 1/n², for whole n ≥ 0."""
    values: Seconds = math.pi**2 / 6 - special_functions().polygamma(1, np.asarray(n) + 1.0)
    return values


@dataclass(frozen=True)
class Exponential(Independent):
    """Exponential times: P(T > t) = exp(-t / mean).

    E[X_(K:P)] = mean · (H_P - H_{P-K}).

    Attributes:
        mean_s: The mean, 1/μ, in seconds.

    Example:
        >>> Exponential(1.0).order_statistics_s(4).round(3)
        array([0.25 , 0.583, 1.083, 2.083])
    """

    mean_s: float
    NAME = "exponential"

    def at_hazard(self, hazard: Seconds) -> Seconds:
        """Return the time that is exceeded with probability exp(-hazard), in seconds."""
        return self.mean_s * hazard

    def hazard(self, times_s: Seconds) -> Seconds:
        """Return -log P(T > t), the inverse of `at_hazard`; 0 below the law's least time."""
        return times_s / self.mean_s

    def log_density(self, times_s: Seconds) -> Seconds:
        """Return the logarithm of the density, per second, at times not below the law's least."""
        return -self.hazard(times_s) - math.log(self.mean_s)

    def order_statistics_s(self, workers: int) -> Seconds:
        """Return E[X_(K:P)] for K = 1..P in seconds: the K spacings have means mean / (P-i+1)."""
        spacings: Seconds = np.cumsum(self.mean_s / np.arange(workers, 0, -1.0))
        return spacings


@dataclass(frozen=True)
class ShiftedExponential(Independent):
    """A fixed time and an exponential one on top: T = shift + excess·E.

    E[X_(K:P)] = shift + excess · (H_P - H_{P-K}).

    Attributes:
        shift_s: The least that a gradient takes, in seconds.
        excess_s: The mean of what comes on top, in seconds.

    Example:
        >>> ShiftedExponential(1.0, 0.5).order_statistics_s(2)
        array([1.25, 1.75])
    """

    shift_s: float
    excess_s: float
    NAME = "shifted"

    def at_hazard(self, hazard: Seconds) -> Seconds:
        """Return the time that is exceeded with probability exp(-hazard), in seconds."""
        return self.shift_s + self.excess_s * hazard

    def hazard(self, times_s: Seconds) -> Seconds:
        """Return -log P(T > t), the inverse of `at_hazard`; 0 below the law's least time."""
        return np.maximum(times_s - self.shift_s, 0.0) / self.excess_s

    def log_density(self, times_s: Seconds) -> Seconds:
        """Return the logarithm of the density, per second, at times not below the law's least."""
        return -self.hazard(times_s) - math.log(self.excess_s)

    def order_statistics_s(self, workers: int) -> Seconds:
        """Return E[X_(K:P)] for K = 1..P, in seconds."""
        return self.shift_s + Exponential(self.excess_s).order_statistics_s(workers)


@dataclass(frozen=True)
class Pareto(Independent):
    """A heavy tail: P(T > t) = (scale / t)^alpha for t ≥ scale.

    E[X_(K:P)] = scale · Γ(P+1) Γ(P-K+1-1/α) / (Γ(P-K+1) Γ(P+1-1/α)), infinite unless
    P-K+1 > 1/α.

    Attributes:
        scale_s: The least that a gradient takes, in seconds.
        alpha: How fast the tail falls: the mean is infinite up to 1, the variance up to 2.

    Example:
        >>> Pareto(1.0, alpha=2.0).order_statistics_s(2).round(12)
        array([1.33333333, 2.66666667])
    """

    scale_s: float
    alpha: float
    NAME = "pareto"

    def at_hazard(self, hazard: Seconds) -> Seconds:
        """Return the time that is exceeded with probability exp(-hazard), in seconds."""
        return self.scale_s * np.exp(hazard / self.alpha)

    def hazard(self, times_s: Seconds) -> Seconds:
        """Return -log P(T > t), the inverse of `at_hazard`; 0 below the law's least time."""
        return self.alpha * np.log(np.maximum(times_s / self.scale_s, 1.0))

    def log_density(self, times_s: Seconds) -> Seconds:
        """Return the logarithm of the density, per second, at times not below the law's least."""
        return -self.hazard(times_s) + math.log(self.alpha) - np.log(times_s)

    def order_statistics_s(self, workers: int) -> Seconds:
        """Return E[X_(K:P)] for K = 1..P, in seconds."""
        beyond = np.arange(workers, 0, -1.0)  # P - K + 1
        log_gamma, inverse = special_functions().gammaln, 1 / self.alpha
        finite = beyond > inverse
        left = np.where(finite, beyond - inverse, 1.0)
        logs = log_gamma(workers + 1) - log_gamma(workers + 1 - inverse) + log_gamma(left) - log_gamma(beyond)
        means: Seconds = np.where(finite, self.scale_s * np.exp(logs), math.inf)
        return means


@dataclass(frozen=True)
class Lognormal(Independent):
    """A light to moderate tail: log T is normal. Its order statistics are integrated.

    Attributes:
        median_s: The median, in seconds.
        sigma: The standard deviation of log T; 0 makes all times equal.

    Example:
        >>> Lognormal(1.0, sigma=0.5).order_statistics_s(2).round(4)
        array([0.82  , 1.4463])
    """

    median_s: float
    sigma: float
    NAME = "lognormal"

    def at_hazard(self, hazard: Seconds) -> Seconds:
        """Return the time that is exceeded with probability exp(-hazard), in seconds."""
        special = special_functions()
        # Each form keeps its digits on its own side of the median.
        z = np.where(
            hazard > math.log(2), -special.ndtri_exp(-hazard), special.ndtri(-np.expm1(-hazard))
        )
        times: Seconds = self.median_s * np.exp(self.sigma * z)
        return times

    def hazard(self, times_s: Seconds) -> Seconds:
        """Return -log P(T > t), the inverse of `at_hazard`; 0 below the law's least time."""
        hazard: Seconds = -special_functions().log_ndtr(-np.log(times_s / self.median_s) / self.sigma)
        return hazard

    def log_density(self, times_s: Seconds) -> Seconds:
        """Return the logarithm of the density, per second, at times not below the law's least."""
        z = np.log(times_s / self.median_s) / self.sigma
        return -(z**2) / 2 - np.log(times_s * self.sigma * math.sqrt(2 * math.pi))

    def sample(self, rng: np.random.Generator, steps: int, workers: int) -> Seconds:
        """Draw the seconds that each worker takes for a gradient in each step: (steps, workers)."""
        return self.median_s * np.exp(self.sigma * rng.standard_normal((steps, workers)))


@dataclass(frozen=True)
class Weibull(Independent):
    """P(T > t) = exp(-(t/scale)^shape): heavier than exponential below shape 1, lighter above.

    Its order statistics are integrated: the closed form is an alternating sum, which loses every
    digit beyond some 30 workers.

    Attributes:
        scale_s: The time that 1 in e gradients exceeds, in seconds.
        shape: The exponent.

    Example:
        >>> Weibull(1.0, shape=1.0).order_statistics_s(3).round(6)
        array([0.333333, 0.833333, 1.833333])
    """

    scale_s: float
    shape: float
    NAME = "weibull"

    def at_hazard(self, hazard: Seconds) -> Seconds:
        """Return the time that is exceeded with probability exp(-hazard), in seconds."""
        return self.scale_s * hazard ** (1 / self.shape)

    def hazard(self, times_s: Seconds) -> Seconds:
        """Return -log P(T > t), the inverse of `at_hazard`; 0 below the law's least time."""
        return (times_s / self.scale_s) ** self.shape

    def log_density(self, times_s: Seconds) -> Seconds:
        """Return the logarithm of the density, per second, at times not below the law's least."""
        relative = times_s / self.scale_s
        return -self.hazard(times_s) + math.log(self.shape / self.scale_s) + (self.shape - 1) * np.log(relative)
