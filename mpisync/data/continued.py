"""The batches of a worker over all loops of a session: a loader that comes again goes on where it was."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mpisync.data.batches import Batches, ClaimBatch


class ContinuedBatches:
    """A worker's batches, from one loader after the other.

    Sequences count on over all loaders, and so do epochs, so that no two batches have the same random numbers and no
    two epochs the same order.

    Args:
        worker: Whose.
        workers: How many share the data.
        seed: The run's.
    """

    def __init__(self, worker: int, workers: int, seed: int) -> None:
        self._worker, self._workers, self._seed = worker, workers, seed
        self._loader: Iterable[Any] | None = None
        self._batches: Batches | None = None
        self._loaders = 0

    def of(self, loader: Iterable[Any], *, claim: ClaimBatch | None = None, start: int = 0) -> Batches:
        """Return the loader's batches: those that come next, where they were the last that this was asked for.

        Args:
            loader: As given to `Session.batches`.
            claim: As in `Batches`.
            start: The sequence of the first batch of all.
        """
        if self._batches is not None and loader is self._loader:
            return self._batches
        first = self._batches is None
        start = start if self._batches is None else self._batches.sequence
        self.close()
        self._loader = loader
        self._batches = Batches(
            loader, worker=self._worker, workers=self._workers, seed=self._seed, claim=claim,
            start=start, skip=start if first else 0, epoch=self._loaders,
        )  # fmt: skip
        self._loaders += 1
        return self._batches

    def close(self) -> None:
        """Let the newest loader go: if it comes again it begins anew."""
        self._loader = None
        if self._batches is not None:
            self._batches.close()
