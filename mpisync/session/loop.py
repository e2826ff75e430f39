"""The extent of a session's loop: where it begins, where it ends, and the pool that it may draw from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mpisync.aggregation.late_work import LateWork, Requeue
from mpisync.aggregation.sample_pool import BatchId, ReplayedPool, SamplePool
from mpisync.data.batches import batches_an_epoch
from mpisync.policies import Policy, Replay

_FIELDS = ("on_late", "seed", "accounts")


@dataclass(frozen=True)
class LoopOptions:
    """The options of `Session.batches`.

    Attributes:
        steps: How many versions to make; None for no limit.
        epochs: How many times each sample is used; None for no limit.
        resume: What `Session.state_dict` said of the samples of the run that goes on; None for a new one.
    """

    steps: int | None
    epochs: int | None
    resume: Mapping[str, Any] | None

    def check(self, late: LateWork, seed: int, *, is_first: bool) -> None:
        """Raise TypeError, ValueError or RuntimeError for options that this loop cannot have."""
        on_late, pools = str(late), isinstance(late, Requeue)
        if not is_first and (pools or self.resume is not None):
            what = "resume= belongs to its first loop" if self.resume is not None else (
                "under on_late='requeue' it has one, whose pool deals out all epochs: give epochs= of them together, "
                "and do what came between them in the loop (session.evaluate(fn, every=)) or in on_step="
            )
            raise RuntimeError(f"session.batches was called before in this session: {what}")
        if self.epochs is not None and not pools:
            raise ValueError(
                f"epochs are counted under on_late='requeue' only, where each sample is used once in each, but on_late "
                f"is {on_late!r}, which leaves samples out: give steps= instead"
            )
        if self.resume is None:
            return
        if not isinstance(self.resume, Mapping) or any(name not in self.resume for name in _FIELDS):
            raise TypeError('resume must be the "samples" of a session\'s state_dict, as its root had them')
        for name, here in (("on_late", on_late), ("seed", seed)):
            if self.resume[name] != here:
                raise ValueError(
                    f"the run to go on with had {name}={self.resume[name]!r} and this session has {here!r}: its place "
                    "in the data means nothing here"
                )
        if pools and not self.resume.get("pool"):
            raise ValueError("the run to go on with was a replay, which has no place in the data: resume its original")

    def accounts(self, workers: int) -> list[Mapping[str, int]]:
        """Return each worker's account so far; nothing for a new run."""
        if self.resume is None:
            return []
        accounts: list[Mapping[str, int]] = self.resume["accounts"]
        if len(accounts) != workers:
            raise ValueError(
                f"the run to go on with had {len(accounts)} workers and this one has {workers}: start it with as many"
            )
        return accounts

    def handed(self, worker: int, workers: int) -> int:
        """Return how many samples the worker was handed in the run that goes on."""
        accounts = self.accounts(workers)
        return accounts[worker]["handed"] if accounts else 0

    def batches(self, worker: int) -> int:
        """Return how many of the worker's batches were done with in the run that goes on."""
        return 0 if self.resume is None else int(self.resume["accounts"][worker]["batches"])


def pool_of(loader: Iterable[Any], loop: LoopOptions, policy: Policy, workers: int) -> SamplePool:
    """Return the pool of a loader's batches; under a replay, the one that its record describes."""
    batches = batches_an_epoch(loader)
    if isinstance(policy, Replay):
        recorded = policy.lots(workers)
        return ReplayedPool(batches, [[[BatchId(*one) for one in ids] for ids in own] for own in recorded])
    return SamplePool(batches, loop.epochs)
