"""A watch for workers that draw the same batches, as a sampler or iterable does that knows nothing of workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

_STEPS = 3  # in which two are equal before that is no chance


class EqualBatches:
    """The fingerprints of accepted gradients' batches; two workers that keep drawing alike are told once.

    A batch that is the only one a worker has says nothing (constant toy data), nor do batches that are equal now and
    then (a sampler that draws with replacement).

    Example:
        >>> watch = EqualBatches()
        >>> [bool(watch.see([(0, 11 + step), (1, 11 + step)])) for step in range(5)]
        [False, False, True, False, False]
    """

    def __init__(self) -> None:
        self._first: dict[int, int] = {}  # fingerprint of each worker
        self._varied: set[int] = set()
        self._seen: Counter[int] = Counter()  # fingerprints of each worker
        self._equal: Counter[tuple[int, int]] = Counter()  # steps
        self._has_told = False

    def see(self, fingerprints: Iterable[tuple[int, int]]) -> str:
        """Take a step's workers, each with its fingerprint (0: none); return what to tell, "" for nothing."""
        if self._has_told:
            return ""
        owners: dict[int, int] = {}
        for worker, fingerprint in fingerprints:
            if not fingerprint:
                continue
            self._seen[worker] += 1
            if self._first.setdefault(worker, fingerprint) != fingerprint:
                self._varied.add(worker)
            other = owners.setdefault(fingerprint, worker)
            if other != worker and (told := self._count(min(other, worker), max(other, worker))):
                self._has_told = True
                return told
        return ""

    def _count(self, one: int, other: int) -> str:
        """Count a step in which two workers were equal; return what there is to tell of them."""
        self._equal[one, other] += 1
        equal = self._equal[one, other]
        if equal < _STEPS or 2 * equal < min(self._seen[one], self._seen[other]) or not {one, other} <= self._varied:
            return ""
        return (
            f"workers {one} and {other} drew equal batches in {equal} steps, so the same data count twice: a sampler "
            "or iterable of your own must give each worker (session.worker of session.workers) data of its own"
        )
