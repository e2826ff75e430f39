"""What a task is, and what tasks of classification share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["Classification", "Task"]


class Task(ABC):
    """Something to train: a model, its data and its loss, with defaults under which it learns.

    Data are the same in every process and every run; the model's initial values follow from torch's global seed.

    Attributes:
        name: Its name in `TASKS`.
        about: What it is, in one line.
        files: The files that it reads from a folder, in words; "" if it brings its data.
        metric: What `evaluate` measures first.
        higher_is_better: Whether a good model has much of it.
        target: A value of the metric that training with the defaults passes well before its end.
        uneven: Whether batches differ much in cost.
        batch_size: Samples in a worker's batch, by default.
        steps: Updates, by default.
        learning_rate: Of the default optimizer.

    Example:
        >>> import torch
        >>> from mpisync.tasks.table import make_task
        >>> task = make_task("digits-mlp")
        >>> model = task.model()
        >>> optimizer = task.optimizer(model)
        >>> for batch in task.loader():
        ...     optimizer.zero_grad()
        ...     task.loss(model, batch).backward()
        ...     optimizer.step()
        >>> task.evaluate(model)[task.metric] > 0.5  # the share of digits recognised after one epoch
        True
    """

    name: str
    about: str
    files = ""
    metric: str
    higher_is_better = False
    target: float
    uneven = False
    batch_size: int
    steps: int
    learning_rate: float

    @abstractmethod
    def model(self) -> nn.Module:
        """Return a new model."""

    @abstractmethod
    def loader(self, batch_size: int | None = None) -> DataLoader[Any]:
        """Return the training data in shuffled batches, with torch's own samplers, so that a Session shares it out."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss to be minimised, a scalar with a graph."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the metric, and perhaps others, on data that were held out."""

    def cost(self, batch: Any) -> float:
        """Return what a batch costs to compute, in units of the task's own: here its samples."""
        return float(len(batch[0]))

    def optimizer(self, model: nn.Module) -> Optimizer:
        """Return the default optimizer."""
        return Adam(model.parameters(), lr=self.learning_rate)


class Classification(Task):
    """Images to be told apart: cross entropy, and the share of held-out images named rightly.

    Args:
        training: Images (N × channels × height × width, any dtype) and labels (N, int64).
        testing: The same, held out.
    """

    metric = "test accuracy"
    higher_is_better = True

    def __init__(self, training: tuple[Tensor, Tensor], testing: tuple[Tensor, Tensor]) -> None:
        self._training = TensorDataset(*training)
        self._testing = testing

    def loader(self, batch_size: int | None = None) -> DataLoader[Any]:
        """Return the training images in shuffled batches."""
        return DataLoader(self._training, batch_size=batch_size or self.batch_size, shuffle=True, drop_last=True)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the cross entropy in nats."""
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the share of held-out images that are named rightly."""
        images, labels = self._testing
        with torch.no_grad():
            named = torch.cat([model(part).argmax(1) for part in torch.split(images, 500)])
        return {self.metric: float((named == labels).float().mean())}


class Scaled(nn.Module):
    """Turns pixels, kept as bytes to save memory, into floats from 0 to 1.

    Args:
        most: A pixel's largest value.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def forward(self, pixels: Tensor) -> Tensor:
        """Divide by the largest value."""
        return pixels.float() / self._most
