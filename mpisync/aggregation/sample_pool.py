"""The pool of an epoch's batches: a worker that claims one has it, and a batch that did not count comes back.

A batch is known by its id, two numbers from which every worker can work out its samples. It is *fresh* until somebody
claims it, *out* while at least one worker holds it, and then *used*, or *returned*, to be claimed before any fresh one.
Used is for ever: whoever still holds a used batch holds nothing.

A batch may be out with several workers, since one that hangs gives nothing back: another gets it too where its holder
is so far behind that it will be late, and where nothing else is left. The first accepted gradient of it uses it.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class BatchId(NamedTuple):
    """The id of a batch: an epoch, and the batch's number in that epoch's order."""

    epoch: int
    batch: int


class SamplePool:
    """A pool that deals the batches of epoch after epoch.

    Args:
        batches: How many an epoch has.
        epochs: How many epochs there are; None for any number.

    Example:
        >>> pool = SamplePool(batches=2, epochs=1)
        >>> first, second = pool.claim(0), pool.claim(1)
        >>> pool.give_back(1, pool.take(1, 1))  # it came too late
        >>> pool.use(pool.take(0, 1))
        >>> pool.claim(0) == second, pool.remaining
        (True, 1)
    """

    def __init__(self, batches: int, epochs: int | None = None) -> None:
        self.batches, self._epochs = batches, epochs
        self._fresh = BatchId(0, 0)
        self._returned: list[BatchId] = []
        self._out: dict[BatchId, set[int]] = {}  # who holds it, in order of first claims
        self._held: dict[int, deque[BatchId]] = {}  # by each worker, in order of its claims; used ones too
        self._open: set[BatchId] = set()  # used by a step that is not published yet

    @property
    def remaining(self) -> int | None:
        """The number of batches that are not used; None where there is no end to them."""
        if self._epochs is None:
            return None
        fresh = (self._epochs - self._fresh.epoch) * self.batches - self._fresh.batch
        return max(fresh, 0) + len(self._returned) + len(self._out)

    def claim(self, worker: int, behind: Iterable[int] = ()) -> BatchId | None:
        """Give a worker the next batch; None where there is none that it could use.

        Args:
            worker: Who claims it.
            behind: Workers that compute at parameters so old that their gradients will be late.
        """
        batch_id = self._surely_late(worker, behind)
        if batch_id is None and self._returned:
            batch_id = heapq.heappop(self._returned)
        if batch_id is None and (self._epochs is None or self._fresh.epoch < self._epochs):
            batch_id = self._fresh
            is_last = batch_id.batch + 1 == self.batches
            self._fresh = BatchId(batch_id.epoch + 1, 0) if is_last else BatchId(batch_id.epoch, batch_id.batch + 1)
        if batch_id is None:
            others = [(len(holders), batch_id) for batch_id, holders in self._out.items() if worker not in holders]
            batch_id = min(others)[1] if others else None
        if batch_id is not None:
            self._out.setdefault(batch_id, set()).add(worker)
            self._held.setdefault(worker, deque()).append(batch_id)
        return batch_id

    def _surely_late(self, worker: int, behind: Iterable[int]) -> BatchId | None:
        """Return a batch of a worker that will be late for sure, unless another worker has it already."""
        for other in behind:
            batch_id = next((batch_id for batch_id in self._held.get(other, ()) if batch_id in self._out), None)
            if batch_id is not None and self._out[batch_id] == {other} and other != worker:
                return batch_id
        return None

    def take(self, worker: int, count: int) -> list[BatchId]:
        """Take the first `count` batches from a worker's hands: it has computed on them, or passed them over."""
        held = self._held.get(worker, deque())
        return [held.popleft() for _ in range(min(count, len(held)))]

    def is_used(self, ids: Iterable[BatchId]) -> bool:
        """Say whether any of these batches, which were out, is used meanwhile."""
        return any(batch_id not in self._out for batch_id in ids)

    def use(self, ids: Iterable[BatchId]) -> None:
        """Use batches: nobody else's copy of them will count."""
        for batch_id in ids:
            self._out.pop(batch_id, None)
            self._open.add(batch_id)

    def settle(self, ids: Iterable[BatchId]) -> None:
        """Settle batches whose step is published."""
        self._open.difference_update(ids)

    def restore(self, ids: Iterable[BatchId]) -> None:
        """Take back used batches that did not count after all."""
        for batch_id in ids:
            self._open.discard(batch_id)
            heapq.heappush(self._returned, batch_id)

    def give_back(self, worker: int, ids: Iterable[BatchId]) -> None:
        """Give back batches that did not count: others may claim them, if they have not done so."""
        for batch_id in ids:
            holders = self._out.get(batch_id, set())
            holders.discard(worker)
            if batch_id in self._out and not holders:
                del self._out[batch_id]
                heapq.heappush(self._returned, batch_id)

    def give_up(self, worker: int, ids: Collection[BatchId]) -> None:
        """Give up batches: they will never count, unless somebody else holds them too."""
        self.give_back(worker, ids)
        self._returned = [batch_id for batch_id in self._returned if batch_id not in ids]
        heapq.heapify(self._returned)

    def leave(self, worker: int) -> None:
        """Take back all that a worker holds, which claims nothing more."""
        self.give_back(worker, self._held.pop(worker, ()))

    def state(self) -> dict[str, Any]:
        """Return what no published step has used, in numbers and lists; what is out now will be claimed again."""
        left = sorted([*self._returned, *self._out, *self._open])
        return {"batches": self.batches, "fresh": list(self._fresh), "returned": [list(one) for one in left]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, of a pool that has dealt nothing yet.

        Raises:
            ValueError: That run had another number of batches an epoch.
        """
        if state["batches"] != self.batches:
            raise ValueError(
                f"the run to go on with had {state['batches']} batches an epoch and this one has {self.batches}: its "
                "place in the data means nothing with other data or another batch size"
            )
        self._fresh = BatchId(*state["fresh"])
        self._returned = sorted(BatchId(*one) for one in state["returned"])


class ReplayedPool(SamplePool):
    """A pool that deals the batches of a record, so that its replay computes on the same ones.

    Args:
        batches: How many an epoch has.
        ids: Those of each worker's gradients, in order.

    Example:
        >>> script = ReplayedPool(2, [[[BatchId(0, 1)]], []])
        >>> script.claim(0), script.claim(0)
        (BatchId(epoch=0, batch=1), None)
    """

    def __init__(self, batches: int, ids: Sequence[Sequence[Sequence[BatchId]]]) -> None:
        super().__init__(batches)
        self._due = [deque(batch_id for gradient in own for batch_id in gradient) for own in ids]
        self._gradients = [deque(map(list, own)) for own in ids]

    def claim(self, worker: int, behind: Iterable[int] = ()) -> BatchId | None:
        """Give a worker the batch that it had in the recorded run."""
        own = self._due[worker]
        return own.popleft() if own else None

    def take(self, worker: int, count: int) -> list[BatchId]:
        """Return the batches that the worker's next gradient was computed from.

        Raises:
            RuntimeError: In the recorded run it was computed from more batches, or from fewer.
        """
        own = self._gradients[worker]
        ids = own.popleft() if own else []
        if len(ids) != count:
            raise RuntimeError(
                f"the replay left its record: worker {worker}'s gradient comes from {count} batches and is recorded "
                f"with {len(ids)}; a loop that passes batches over cannot be replayed under on_late='requeue'"
            )
        return ids

    def is_used(self, ids: Iterable[BatchId]) -> bool:
        """Say no: the record's verdicts are the replay's."""
        return False

    def state(self) -> dict[str, Any]:
        """Return nothing to go on from: the repeated run has its own."""
        return {}
