"""The pool of an epoch's batches: whoever claims one has it, and what did not count comes back.

A lot is one batch of one epoch's order, which every worker can work out by itself, so that only two numbers travel. It
is *fresh* until somebody claims it, *out* while at least one worker holds it, and then *used*, or *returned*, to be
claimed before any fresh one. Used is for ever: whoever still holds a used lot holds nothing.

A lot may be out with several workers, since one that hangs gives nothing back: another gets it too where its holder is
so far behind that it will be late, and where nothing else is left. The first accepted gradient of it uses it.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple


class BatchId(NamedTuple):
    """One batch: which of which epoch's order."""

    epoch: int
    batch: int


class SamplePool:
    """Deals the batches of epoch after epoch.

    Args:
        batches: How many an epoch has.
        epochs: How many epochs there are; None for any number.
        state: What `state` returned, to go on from there.

    Example:
        >>> pool = SamplePool(batches=2, epochs=1)
        >>> first, second = pool.claim(0), pool.claim(1)
        >>> pool.give_back(1, pool.take(1, 1))  # it came too late
        >>> pool.use(pool.take(0, 1))
        >>> pool.claim(0) == second, pool.remaining
        (True, 1)
    """

    def __init__(self, batches: int, epochs: int | None = None, state: dict[str, Any] | None = None) -> None:
        self.batches, self._epochs = batches, epochs
        self._fresh = BatchId(0, 0)
        self._returned: list[BatchId] = []
        if state is not None:
            if state["batches"] != batches:
                raise ValueError(
                    f"the run to go on with had {state['batches']} batches an epoch and this one has {batches}: its "
                    "place in the data means nothing with other data or another batch size"
                )
            self._fresh = BatchId(*state["fresh"])
            self._returned = sorted(BatchId(*lot) for lot in state["returned"])
        self._out: dict[BatchId, set[int]] = {}  # who holds it, in order of first claims
        self._held: dict[int, deque[BatchId]] = {}  # by each worker, in order of its claims; used ones too
        self._open: set[BatchId] = set()  # used by a step that is not published yet

    @property
    def remaining(self) -> int | None:
        """How many lots are not used; None where there is no end to them."""
        if self._epochs is None:
            return None
        fresh = (self._epochs - self._fresh.epoch) * self.batches - self._fresh.batch
        return max(fresh, 0) + len(self._returned) + len(self._out)

    def claim(self, worker: int, behind: Iterable[int] = ()) -> BatchId | None:
        """Give a worker the next lot; None where there is none that it could use.

        Args:
            worker: Who claims it.
            behind: Workers that compute at parameters so old that their gradients will be late.
        """
        lot = self._late_for_sure(worker, behind)
        if lot is None and self._returned:
            lot = heapq.heappop(self._returned)
        if lot is None and (self._epochs is None or self._fresh.epoch < self._epochs):
            lot = self._fresh
            is_last = lot.batch + 1 == self.batches
            self._fresh = BatchId(lot.epoch + 1, 0) if is_last else BatchId(lot.epoch, lot.batch + 1)
        if lot is None:
            others = [(len(holders), lot) for lot, holders in self._out.items() if worker not in holders]
            lot = min(others)[1] if others else None
        if lot is not None:
            self._out.setdefault(lot, set()).add(worker)
            self._held.setdefault(worker, deque()).append(lot)
        return lot

    def _late_for_sure(self, worker: int, behind: Iterable[int]) -> BatchId | None:
        """The lot that such a worker computes on, unless another has it already."""
        for other in behind:
            lot = next((lot for lot in self._held.get(other, ()) if lot in self._out), None)
            if lot is not None and self._out[lot] == {other} and other != worker:
                return lot
        return None

    def take(self, worker: int, count: int) -> list[BatchId]:
        """Take the first `count` lots from a worker's hands: it has computed on them, or passed them over."""
        held = self._held.get(worker, deque())
        return [held.popleft() for _ in range(min(count, len(held)))]

    def is_used(self, lots: Iterable[BatchId]) -> bool:
        """Whether any of these, which were out, is used meanwhile."""
        return any(lot not in self._out for lot in lots)

    def use(self, lots: Iterable[BatchId]) -> None:
        """They count: nobody else's copy of them will."""
        for lot in lots:
            self._out.pop(lot, None)
            self._open.add(lot)

    def settle(self, lots: Iterable[BatchId]) -> None:
        """The step that used them is published."""
        self._open.difference_update(lots)

    def restore(self, lots: Iterable[BatchId]) -> None:
        """Used lots did not count after all."""
        for lot in lots:
            self._open.discard(lot)
            heapq.heappush(self._returned, lot)

    def give_back(self, worker: int, lots: Iterable[BatchId]) -> None:
        """They did not count: others may claim them, if they have not done so."""
        for lot in lots:
            holders = self._out.get(lot, set())
            holders.discard(worker)
            if lot in self._out and not holders:
                del self._out[lot]
                heapq.heappush(self._returned, lot)

    def give_up(self, worker: int, lots: Collection[BatchId]) -> None:
        """They will never count, unless somebody else holds them too."""
        self.give_back(worker, lots)
        self._returned = [lot for lot in self._returned if lot not in lots]
        heapq.heapify(self._returned)

    def leave(self, worker: int) -> None:
        """A worker claims nothing more: what it holds comes back."""
        self.give_back(worker, self._held.pop(worker, ()))

    @property
    def state(self) -> dict[str, Any]:
        """What no published step has used, in numbers and lists; what is out now will be claimed again."""
        left = sorted([*self._returned, *self._out, *self._open])
        return {"batches": self.batches, "fresh": list(self._fresh), "returned": [list(lot) for lot in left]}


class ReplayedPool(SamplePool):
    """Deals what a record says, so that its replay computes on the same batches.

    Args:
        lots: Those of each worker's gradients, in order.

    Example:
        >>> script = ReplayedPool(2, [[[BatchId(0, 1)]], []])
        >>> script.claim(0), script.claim(0)
        (BatchId(epoch=0, batch=1), None)
    """

    def __init__(self, batches: int, lots: Sequence[Sequence[Sequence[BatchId]]]) -> None:
        super().__init__(batches)
        self._due = [deque(lot for gradient in own for lot in gradient) for own in lots]
        self._gradients = [deque(map(list, own)) for own in lots]

    def claim(self, worker: int, behind: Iterable[int] = ()) -> BatchId | None:
        """Give a worker the lot that it had in the recorded run."""
        own = self._due[worker]
        return own.popleft() if own else None

    def take(self, worker: int, count: int) -> list[BatchId]:
        """What the worker's next gradient was computed from.

        Raises:
            RuntimeError: In the recorded run it was computed from more batches, or from fewer.
        """
        own = self._gradients[worker]
        lots = own.popleft() if own else []
        if len(lots) != count:
            raise RuntimeError(
                f"the replay left its record: worker {worker}'s gradient comes from {count} batches and is recorded "
                f"with {len(lots)}; a loop that passes batches over cannot be replayed under on_late='requeue'"
            )
        return lots

    def is_used(self, lots: Iterable[BatchId]) -> bool:
        """The record's verdicts are the replay's."""
        return False

    @property
    def state(self) -> dict[str, Any]:
        """None to go on from: the run that is repeated has its own."""
        return {}
