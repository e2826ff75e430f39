"""What becomes of late work, as the session's settings say, at the rank that keeps the accounts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mpisync.aggregation.late_work import Carry, Discard, Requeue, Retry
from mpisync.aggregation.sample_pool import BatchId, ReplayedPool, SamplePool
from mpisync.data.batches import batches_an_epoch
from mpisync.policies import Policy, Replay
from mpisync.session.loop import LoopOptions


def late_work(on_late: str, limit: int) -> Discard:
    """Return the accounts under `on_late`."""
    if on_late == "retry":
        return Retry(limit)
    return {"discard": Discard, "carry": Carry, "requeue": Requeue}[on_late]()


def pool_of(loader: Iterable[Any], extent: LoopOptions, policy: Policy, workers: int) -> SamplePool:
    """Return the pool of a loader's batches; under a replay, what its record says of them."""
    batches = batches_an_epoch(loader)
    if isinstance(policy, Replay):
        recorded = policy.lots(workers)
        return ReplayedPool(batches, [[[BatchId(*lot) for lot in lots] for lots in own] for own in recorded])
    state = None if extent.resume is None else extent.resume["pool"]
    return SamplePool(batches, extent.epochs, state)
