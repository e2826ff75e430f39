"""The interface that all roles share: what a session asks of the rank that it is on."""

from __future__ import annotations

import abc
from collections.abc import Generator, Iterable
from typing import Any

from mpisync.aggregation.verdict import Verdict
from mpisync.model.copies import Values
from mpisync.model.update import Averages
from mpisync.session.loop import LoopOptions


class Role(abc.ABC):
    """A rank's part in a session.

    Attributes:
        worker: Its number; None at the root.
        workers: How many there are.
        makes_updates: Whether this rank's optimizer makes them.
    """

    worker: int | None
    workers: int
    makes_updates: bool

    @property
    @abc.abstractmethod
    def version(self) -> int:
        """The number of updates that the parameters here have had."""

    @property
    @abc.abstractmethod
    def averages(self) -> Averages | None:
        """Each parameter with its average, at the end; None where none was kept."""

    @abc.abstractmethod
    def batches(self, loader: Iterable[Any], loop: LoopOptions) -> Generator[Any, None, None]:
        """Yield what this rank computes on until the training ends."""

    @abc.abstractmethod
    def step(self, loss: float, samples: int | None, cost: float) -> Verdict:
        """Hand over the gradient that was computed, and take the newest parameters."""

    @abc.abstractmethod
    def stale(self) -> bool:
        """Say whether the step that this rank computes for has closed."""

    @abc.abstractmethod
    def stop(self) -> None:
        """End the training on every rank."""

    @abc.abstractmethod
    def measure(self, version: int, metric: float) -> None:
        """Hand over what an evaluation of a version has found, for the record and the schedulers that go by it."""

    @abc.abstractmethod
    def newest(self, *, average: bool) -> tuple[int, Values]:
        """Return the newest version, whole: its number, and the values in it of the model's tensors.

        What is not among them is right in the model as it is.
        """

    @abc.abstractmethod
    def samples(self) -> dict[str, Any]:
        """Return every worker's account and place in the data; nothing where others keep them."""

    @abc.abstractmethod
    def leave(self, error: BaseException | None) -> None:
        """Leave the run; without an error this rank has the final parameters."""
