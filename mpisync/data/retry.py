"""The batches of a late gradient, handed out once more where the root says so."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from mpisync.data.batches import Batches
from mpisync.data.seeds import Stream, seed_everything


class _Handed(NamedTuple):
    batch: Any
    sequence: int
    samples: int
    fingerprint: int


class RetriedBatches:
    """Batches that are handed out again where their gradient was late.

    They come in the same order and under the same random numbers, so that only the parameters differ. A copy is kept
    for that: the loop may have changed the batch in place (normalised it, masked its words). Only what cannot be copied
    comes as the loop left it.

    Args:
        batches: Where new ones come from.
        worker: This worker's number.
        seed: The run's.

    Attributes:
        batches: As given.
        data_s: Seconds that the caller waited for the newest batch.
        batch_samples: Samples in the newest batch.
        fingerprint: Of the newest batch.
    """

    def __init__(self, batches: Batches, *, worker: int, seed: int) -> None:
        self.batches, self._worker, self._seed = batches, worker, seed
        self._handed: list[_Handed] = []  # since the last gradient
        self._next: list[_Handed] = []
        self.data_s = 0.0
        self.batch_samples = self.fingerprint = 0

    def __iter__(self) -> RetriedBatches:
        return self

    def __next__(self) -> tuple[Any, int]:
        if self._next:
            handed = self._next.pop(0)
            self.data_s = 0.0
            seed_everything(self._seed, self._worker, handed.sequence, Stream.LOOP)
        else:
            batch, sequence = next(self.batches)
            self.data_s = self.batches.data_s
            handed = _Handed(batch, sequence, self.batches.batch_samples, self.batches.fingerprint)
        self.batch_samples, self.fingerprint = handed.samples, handed.fingerprint
        self._handed.append(handed._replace(batch=_copied(handed.batch)))
        return handed.batch, handed.sequence

    def judged(self, *, again: bool) -> None:
        """Take note of what the root said of the batches handed out since the last call."""
        if again:
            self._next = [*self._handed, *self._next]
        self._handed = []


def _copied(batch: Any) -> Any:  # noqa: ANN401 (a batch is whatever the loader yields)
    try:
        return copy.deepcopy(batch)
    except Exception:  # an open file, a lock, a tensor of a graph: each refuses in a way of its own
        return batch
