"""A session after its `with`: the model is the user's own again, and nobody is left to talk to."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any, NoReturn

from mpisync.model.copies import Values
from mpisync.model.update import Averages
from mpisync.session.loop import LoopOptions
from mpisync.session.roles.base import Role


class EndedRole(Role):
    """The role of a rank whose session has ended: what the rank was, and what it may still be asked.

    Args:
        worker: The number that it had; None at the root.
        workers: How many workers there were.
        version: The final one.
        makes_updates: Whether this rank's optimizer made them.
        averages: Each parameter with its average; None where none was kept.
        samples: What a run that goes on from here needs to know of the samples.
    """

    def __init__(
        self,
        worker: int | None,
        workers: int,
        version: int,
        makes_updates: bool,
        averages: Averages | None,
        samples: dict[str, Any],
    ) -> None:
        self.worker, self.workers, self.makes_updates = worker, workers, makes_updates
        self._version, self._averages, self._samples = version, averages, samples

    @property
    def version(self) -> int:
        """The final version."""
        return self._version

    @property
    def averages(self) -> Averages | None:
        """Each parameter with its average; None where none was kept."""
        return self._averages

    def samples(self) -> dict[str, Any]:
        """Return every worker's account and place in the data, as they were at the end."""
        return self._samples

    def batches(self, loader: Iterable[Any], loop: LoopOptions) -> Generator[Any, None, None]:
        """Raise RuntimeError: no batch follows."""
        raise RuntimeError("the session has ended: its loop belongs inside the `with`; make another session")

    def step(self, loss: float, samples: int | None, cost: float) -> NoReturn:
        """Raise RuntimeError: no step follows."""
        raise RuntimeError("the session has ended: call session.step inside session.batches only")

    def stale(self) -> bool:
        """Say yes: no step is open."""
        return True

    def stop(self) -> None:
        """Do nothing: the training has ended."""

    def measure(self, version: int, metric: float) -> None:
        """Do nothing: the record is closed."""

    def newest(self, *, average: bool) -> tuple[int, Values]:
        """Return the final version and the averages, where they are asked for: the model is right otherwise."""
        if not average:
            return self.version, ()
        if self.averages is None:
            raise RuntimeError("there is no average: the session ended by an error")
        return self.version, self.averages

    def leave(self, error: BaseException | None) -> NoReturn:
        """Raise RuntimeError: this rank has left before."""
        raise RuntimeError("the session has ended: make another one, one for each `with`")
