"""Hyperplane regression: find the plane that noisy points lie on."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, Dataset

from mpisync.tasks.base import Task

__all__ = ["Hyperplane"]

DIMENSIONS = 8192
NOISE = 0.1


class _Points(Dataset[tuple[Tensor, Tensor]]):
    """Points drawn when they are asked for, each from its own number: 32,768 of them would take 1 GiB.

    Args:
        plane: Its coefficients (8192) and its offset.
        seed: Of all points.
        first: Number of the first point.
        count: How many there are.
    """

    def __init__(self, plane: tuple[Tensor, float], seed: int, first: int, count: int) -> None:
        self._coefficients, self._offset = plane[0].numpy(), plane[1]
        self._seed, self._first, self._count = seed, first, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        # With a zero in front, no point has the plane's own seed.
        random = np.random.default_rng((0, self._seed, self._first + index))
        x = random.standard_normal(DIMENSIONS, dtype=np.float32)
        y = float(self._coefficients @ x) + self._offset + NOISE * random.standard_normal()
        return torch.from_numpy(x), torch.tensor([y], dtype=torch.float32)


class Hyperplane(Task):
    """Linear regression of y = w·x + c + noise in 8,192 dimensions, x standard normal, |w| about 1.

    A convex problem whose best loss is known, that of the noise: 0.01. An error in w of length d, and one in c, add
    their squares to it.

    Source: the regression of 8,193 parameters in S. Li, T. Ben-Nun, S. Di Girolamo, D. Alistarh, T. Hoefler, "Taming
    Unbalanced Training Workloads in Deep Learning with Partial Collective Operations" (PPoPP 2020, eager-SGD).

    Args:
        seed: Of the plane and of all points.
    """

    name = "hyperplane"
    about = "linear regression in 8,192 dimensions (8,193 parameters), convex"
    metric = "validation loss"
    target = 0.1
    batch_size = 64
    steps = 400
    learning_rate = 6e-3

    def __init__(self, seed: int = 0, samples: int = 32_768, held_out: int = 512) -> None:
        random = np.random.default_rng((1, seed))
        self._coefficients = torch.from_numpy(random.standard_normal(DIMENSIONS, dtype=np.float32) / DIMENSIONS**0.5)
        self._offset = float(random.standard_normal())
        plane = self._coefficients, self._offset
        self._points = _Points(plane, seed, 0, samples)
        self._others = _Points(plane, seed, samples, held_out)

    def model(self) -> nn.Module:
        """Return a linear model; it begins at zero, so that the first loss is the variance of y."""
        model = nn.Linear(DIMENSIONS, 1)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        return model

    def optimizer(self, model: nn.Module) -> Optimizer:
        """Return plain SGD: its gradient's noise is known, and no step size hides it."""
        return SGD(model.parameters(), lr=self.learning_rate)

    def loader(self, batch_size: int | None = None) -> DataLoader[Any]:
        """Return points in shuffled batches."""
        return DataLoader(self._points, batch_size=batch_size or self.batch_size, shuffle=True, drop_last=True)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean squared error."""
        x, y = batch
        return F.mse_loss(model(x), y)

    @functools.cached_property
    def _validation(self) -> tuple[Tensor, Tensor]:
        points = [self._others[index] for index in range(len(self._others))]
        return torch.stack([x for x, _ in points]), torch.stack([y for _, y in points])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the mean squared error on held-out points, and how far the coefficients are from the true ones."""
        x, y = self._validation
        weight = next(p for p in model.parameters() if p.numel() == DIMENSIONS)
        with torch.no_grad():
            distance = (weight.flatten() - self._coefficients).norm() / self._coefficients.norm()
            return {self.metric: float(F.mse_loss(model(x), y)), "relative distance": float(distance)}
