"""A law of dependent times: steps, machines, data, and rare long events that come in clusters."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

from mpisync.planning.laws import Seconds

__all__ = ["Composite", "chen2016"]


@dataclass(frozen=True)
class Composite:
    """What makes real workers straggle, factor by factor.

    In step t, worker w takes  S_t · R_w · X  seconds, where X is, with probability p_t, an event's
    Pareto(event_scale, event_alpha), and otherwise the body  L · D:

    * L is lognormal(median, sigma), truncated at the cap;
    * D is the cost of the worker's data: Gamma with mean 1 and coefficient of variation data_cv, as
      a sum of random sequence lengths is;
    * p_t ~ Beta(event_a, event_b), one draw a step: events cluster in some steps. The fewer
      event_a + event_b, the stronger; the same mean with both large gives independent events;
    * S_t is lognormal(1, step_sigma), the same for all workers;
    * R_w is lognormal(1, rank_sigma), the same in all steps, whatever is drawn before or after; the
      first slow_workers have slow_factor on top.

    Attributes:
        median_s: The median of the body, in seconds.
        sigma: The standard deviation of the body's logarithm.
        cap_s: No body lasts longer, in seconds.
        data_cv: Standard deviation of the data's cost, of its mean.
        step_sigma: The standard deviation of log S_t.
        rank_sigma: The standard deviation of log R_w.
        rank_seed: Chooses the machines: the R_w follow from it alone.
        slow_workers: How many workers are persistently slow.
        slow_factor: How many times as long they take.
        event_a: First parameter of the Beta; 0 for no events.
        event_b: Its second parameter.
        event_scale_s: The least that an event lasts, in seconds.
        event_alpha: How fast the events' tail falls.

    Example:
        >>> law = Composite(median_s=0.1, slow_workers=1, slow_factor=2.36)
        >>> law.sample(np.random.default_rng(0), steps=2, workers=3)
        array([[0.236, 0.1  , 0.1  ],
               [0.236, 0.1  , 0.1  ]])
    """

    median_s: float
    sigma: float = 0.0
    cap_s: float = math.inf
    data_cv: float = 0.0
    step_sigma: float = 0.0
    rank_sigma: float = 0.0
    rank_seed: int = 0
    slow_workers: int = 0
    slow_factor: float = 1.0
    event_a: float = 0.0
    event_b: float = 0.0
    event_scale_s: float = 0.0
    event_alpha: float = math.inf

    def __post_init__(self) -> None:
        """Refuse parameters that make no law."""
        whole = ("rank_seed", "slow_workers")
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if name in whole and value != int(value):
                raise ValueError(f"{name} of the law composite must be a whole number, not {value!r}")
            object.__setattr__(self, name, int(value) if name in whole else float(value))
            if not value >= 0:
                raise ValueError(f"{name} of the law composite must not be negative, but it is {value!r}")
        if not 0 < self.median_s < math.inf or not self.slow_factor > 0:
            raise ValueError(
                "median_s and slow_factor of the law composite must be greater than 0, but they are "
                f"{self.median_s!r} and {self.slow_factor!r}"
            )
        if self.cap_s < self.median_s:
            raise ValueError(f"cap_s must not be below the median of {self.median_s:g} s, but it is {self.cap_s:g}")
        if self.event_a and not (self.event_b and self.event_scale_s and self.event_alpha):
            raise ValueError("with event_a the law composite needs event_b, event_scale_s and event_alpha too")

    def rank_factors(self, workers: int) -> Seconds:
        """Return R_w of the first workers."""
        factors = np.exp(self.rank_sigma * np.random.default_rng(self.rank_seed).standard_normal(workers))
        factors[: self.slow_workers] *= self.slow_factor
        return factors

    def sample(self, rng: np.random.Generator, steps: int, workers: int) -> Seconds:
        """Draw the seconds that each worker takes for a gradient in each step: (steps, workers)."""
        times_s = self._body(rng, (steps, workers))
        if self.event_a:
            chance = rng.beta(self.event_a, self.event_b, (steps, 1))
            hit = rng.random((steps, workers)) < chance
            hazard = rng.standard_exponential(np.count_nonzero(hit))
            times_s[hit] = self.event_scale_s * np.exp(hazard / self.event_alpha)
        if self.step_sigma:
            times_s *= np.exp(self.step_sigma * rng.standard_normal((steps, 1)))
        if self.rank_sigma or self.slow_workers:
            times_s *= self.rank_factors(workers)
        return times_s

    def _body(self, rng: np.random.Generator, shape: tuple[int, int]) -> Seconds:
        if self.sigma:
            times_s = self.median_s * np.exp(self.sigma * rng.standard_normal(shape))
            while (over := times_s > self.cap_s).any():  # redrawn, which is truncation
                again = rng.standard_normal(np.count_nonzero(over))
                times_s[over] = self.median_s * np.exp(self.sigma * again)
        else:
            times_s = np.full(shape, self.median_s)
        if self.data_cv:
            shape_of_gamma = self.data_cv**-2
            times_s *= rng.standard_gamma(shape_of_gamma, shape) / shape_of_gamma
        return times_s

    def __str__(self) -> str:
        """Return the command-line form."""
        values = [
            f"{field.name.removesuffix('_s')}={getattr(self, field.name):.6g}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"composite:{','.join(values)}"


def chen2016() -> Composite:
    """Return the law that agrees with the straggler study of Chen et al.: 100 workers, in seconds.

    They found 80 % of the 98th gradients of a step, and 30 % of the 100th, within 2 s, and means of
    1.4 to 1.8 s but for the last few (arXiv:1604.00981). Were the workers independent, the second
    figure would make the first 88 %; so slow steps cluster, and p_t ~ Beta(3.098, 209.5) gives both
    exactly: the number of events in a step is beta-binomial.

    Example:
        >>> times_s = chen2016().sample(np.random.default_rng(0), steps=20_000, workers=100)
        >>> in_time = np.sort(times_s, axis=1) < 2
        >>> in_time[:, 97].mean().round(1).item(), in_time[:, 99].mean().round(1).item()
        (0.8, 0.3)
    """
    return Composite(
        median_s=1.45, sigma=0.09, cap_s=2.0,
        event_a=3.098, event_b=209.5, event_scale_s=2.0, event_alpha=2.26,
    )  # fmt: skip
