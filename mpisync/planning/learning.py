"""Small problems that a simulated run can train on, so that error can be set against time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Descent", "Learner", "Logistic", "Problem", "Quadratic"]

Array = npt.NDArray[np.float64]


class Learner(Protocol):
    """What a simulation trains.

    Attributes:
        parameters: The newest; workers keep references, so that an update makes a new array.
        errors: F(θ_t) − F*, or what else is to be the loss of gradients of version t.

    Example:
        >>> from mpisync.planning.simulation import simulate
        >>> from mpisync.policies import BackupWorkers
        >>> learner = Descent(Quadratic(dimension=4, noise=0.0), rate=0.5)
        >>> records = simulate(BackupWorkers(1), np.ones((1, 3)), steps=2, learner=learner)
        >>> len(list(records)), len(learner.errors)
        (2, 3)
    """

    parameters: Array
    errors: list[float]

    def gradient(self, parameters: Array, worker: int, sequence: int) -> Array:
        """Return the gradient that a worker computes at these parameters as its `sequence`-th."""

    def update(self, mean: Array) -> None:
        """Take a step along a mean gradient."""


class Problem(Protocol):
    """A function to be minimised, and noisy gradients of it.

    Attributes:
        start: Where descent begins.

    Example:
        >>> class Parabola:
        ...     start = np.array([4.0])
        ...     def error(self, parameters):
        ...         return float(parameters[0] ** 2)
        ...     def gradient(self, parameters, random):
        ...         return 2 * parameters + random.normal(scale=0.1, size=1)
        >>> Descent(Parabola(), rate=0.25).errors
        [16.0]
    """

    start: Array

    def error(self, parameters: Array) -> float:
        """Return F(θ) − F*."""

    def gradient(self, parameters: Array, random: np.random.Generator) -> Array:
        """Return an unbiased estimate of ∇F(θ)."""


class Descent:
    """Stochastic gradient descent on a problem, the noise a function of (seed, worker, sequence).

    Args:
        problem: What to minimise.
        rate: The learning rate; a number, or a function of the step.
        seed: Of all noise.

    Attributes:
        parameters: The newest.
        errors: F(θ_t) − F* for t = 0, 1, ...; one more than there were updates.

    Example:
        >>> descent = Descent(Quadratic(dimension=4, noise=0.0), rate=0.5)
        >>> descent.update(descent.gradient(descent.parameters, worker=0, sequence=0))
        >>> descent.errors[1] < descent.errors[0]
        True
    """

    def __init__(self, problem: Problem, rate: float | Callable[[int], float], seed: int = 0) -> None:
        self.problem, self.seed = problem, seed
        self._rate = rate if callable(rate) else lambda step: rate
        self.parameters = problem.start
        self.errors = [problem.error(self.parameters)]

    def gradient(self, parameters: Array, worker: int, sequence: int) -> Array:
        """Return the gradient that a worker computes at these parameters as its `sequence`-th."""
        return self.problem.gradient(parameters, np.random.default_rng([self.seed, worker, sequence]))

    def update(self, mean: Array) -> None:
        """Take a step along a mean gradient."""
        self.parameters = self.parameters - self._rate(len(self.errors) - 1) * mean
        self.errors.append(self.problem.error(self.parameters))


class Quadratic:
    """F(θ) = ½ Σ λ_i θ_i², λ from 1/condition to 1, each gradient with independent normal noise.

    Attributes:
        start: Where descent begins: F(start) is 1.
        curvature: λ.
        sigma: The deviation of the noise in each element: σ/√dimension.

    Args:
        dimension: Of θ.
        noise: σ, the root of E‖g − ∇F‖²: of all elements together.
        condition: λ_max / λ_min.

    Example:
        >>> problem = Quadratic(dimension=3)
        >>> round(problem.error(problem.start), 12)
        1.0
    """

    def __init__(self, dimension: int, noise: float = 1.0, condition: float = 10.0) -> None:
        self.curvature = np.geomspace(1 / condition, 1.0, dimension)
        self.start = np.sqrt(2 / (self.curvature * dimension))
        self.sigma = noise / np.sqrt(dimension)

    def error(self, parameters: Array) -> float:
        """Return F(θ), whose least value is 0."""
        return float(0.5 * np.sum(self.curvature * parameters**2))

    def gradient(self, parameters: Array, random: np.random.Generator) -> Array:
        """Return ∇F(θ) and noise."""
        slope: Array = self.curvature * parameters + self.sigma * random.standard_normal(parameters.size)
        return slope


class Logistic:
    """Logistic regression with an L2 term on synthetic data; a gradient is that of a small batch.

    Args:
        samples: How many samples there are.
        features: How many numbers describe each.
        batch: How many samples a gradient is the mean of, drawn with replacement.
        l2: Weight of ½‖θ‖².
        seed: Of the data.

    Example:
        >>> problem = Logistic(samples=200, features=5, batch=8)
        >>> problem.error(problem.start) > 0.05 and problem.error(problem.best) < 1e-12
        True
    """

    def __init__(
        self, samples: int = 2000, features: int = 20, batch: int = 16, l2: float = 1e-3, seed: int = 0
    ) -> None:
        random = np.random.default_rng(seed)
        truth = random.standard_normal(features)
        self._x = random.standard_normal((samples, features))
        chance = 1 / (1 + np.exp(-self._x @ truth))
        self._sign = np.where(random.random(samples) < chance, 1.0, -1.0)
        self._batch, self._l2 = batch, l2
        self.start = np.zeros(features)
        self.best = self._newton(self.start)
        self._least = self._loss(self.best)

    def _loss(self, parameters: Array) -> float:
        margin = self._sign * (self._x @ parameters)
        return float(np.logaddexp(0, -margin).mean() + 0.5 * self._l2 * parameters @ parameters)

    def _slope(self, parameters: Array, x: Array, sign: Array) -> Array:
        wrong = 1 / (1 + np.exp(sign * (x @ parameters)))
        slope: Array = -(x * (sign * wrong)[:, None]).mean(axis=0) + self._l2 * parameters
        return slope

    def _newton(self, parameters: Array) -> Array:
        for _ in range(25):
            chance = 1 / (1 + np.exp(-self._x @ parameters))
            weight = (chance * (1 - chance))[:, None]
            curvature = (self._x * weight).T @ self._x / len(self._x) + self._l2 * np.eye(parameters.size)
            parameters = parameters - np.linalg.solve(curvature, self._slope(parameters, self._x, self._sign))
        return parameters

    def error(self, parameters: Array) -> float:
        """Return F(θ) − F*."""
        return max(self._loss(parameters) - self._least, 0.0)

    def gradient(self, parameters: Array, random: np.random.Generator) -> Array:
        """Return the gradient of a batch."""
        drawn = random.integers(len(self._x), size=self._batch)
        return self._slope(parameters, self._x[drawn], self._sign[drawn])
