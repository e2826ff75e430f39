"""The law of times that were measured, drawn again."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from mpisync.planning.laws import Seconds

__all__ = ["Empirical", "block_steps"]


class Empirical:
    """Measured times, drawn again in blocks of whole steps.

    What happened together stays together: workers that were slow in the same step, a slow worker,
    and, within a block, slow phases. Times longer than the longest one measured never occur.

    Args:
        times_s: The seconds that each worker took in each step, (steps, workers), all positive.
        name: Where they are from.

    Example:
        >>> law = Empirical([[1.0, 1.5], [2.0, 2.5]])
        >>> np.ptp(law.sample(np.random.default_rng(0), steps=5, workers=2), axis=1)
        array([0.5, 0.5, 0.5, 0.5, 0.5])
    """

    def __init__(self, times_s: ArrayLike, name: str = "") -> None:
        self.times_s = np.asarray(times_s, np.float64)
        self._name = name
        if self.times_s.ndim != 2 or not self.times_s.size:
            raise ValueError(f"times must be an array of steps × workers, not of shape {self.times_s.shape}")
        if not (np.isfinite(self.times_s) & (self.times_s > 0)).all():
            raise ValueError("times must be finite and greater than 0: fill or leave out the others first")

    def sample(self, rng: np.random.Generator, steps: int, workers: int) -> Seconds:
        """Draw the seconds that each worker takes for a gradient in each step: (steps, workers).

        Fewer workers than were measured are a random choice of them, the same in all steps.

        Raises:
            ValueError: They are more than were measured: repeating some would not show how slow the
                slowest of so many can be.
        """
        measured, known = self.times_s.shape
        if workers > known:
            raise ValueError(
                f"these are the times of {known} workers, which say nothing of the slowest of {workers}: "
                "fit a law to them and ask that"
            )
        length = block_steps(measured)
        starts = rng.integers(measured, size=math.ceil(steps / length))  # blocks wrap around
        rows = (starts[:, None] + np.arange(length)).ravel()[:steps] % measured
        columns = np.arange(known)
        if workers < known:
            columns = np.sort(rng.permutation(known)[:workers])
        drawn: Seconds = self.times_s[np.ix_(rows, columns)]
        return drawn

    def __str__(self) -> str:
        """Return the command-line form."""
        return f"empirical:{self._name}"


def block_steps(steps: int) -> int:
    """Return how long a block of the bootstrap is: the cube root of the number of steps.

    The order of growth that is best for the variance of a mean (H. Künsch, "The Jackknife and the
    Bootstrap for General Stationary Observations", Annals of Statistics 17, 1989).

    Example:
        >>> block_steps(200)
        6
    """
    return math.ceil(math.pow(steps, 1 / 3) - 1e-9)
