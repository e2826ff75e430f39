"""What becomes of the samples of gradients that do not count: every worker's account, and what comes back.

The root keeps the accounts, and entries are final. A late gradient's samples are

    discard   discarded
    retry     requeued to the worker that has them, so many times in a row; then discarded
    carry     still in flight: its worker adds the gradient to its next one, or gives it up for its age: discarded; lost
              where the worker leaves with it
    requeue   requeued to the pool, where anyone may claim them

The samples of a gradient with NaN or Inf are discarded in any case, and so are those that are late after the end, but
for the pool's: whoever resumes from there claims them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mpisync.aggregation.members import Account, Fate, Member, Outcome
from mpisync.aggregation.sample_pool import BatchId, SamplePool
from mpisync.aggregation.work import Part, Work
from mpisync.transport.wire import Header


class Discard:
    """Late gradients' samples are discarded.

    Attributes:
        by_cost: An account for each class k of costs, from 2^k to 2^(k+1).
        goes_on: Whether the training does.
    """

    def __init__(self) -> None:
        self.by_cost: dict[int, Account] = {}
        self.goes_on = True

    @property
    def remaining(self) -> int | None:
        """How many gradients there are samples for at most; None where there is no end to them."""
        return None

    def claim(self, member: Member, behind: Sequence[int], batches: int) -> BatchId | None:
        """Give a worker, whose loader makes so many batches an epoch, its next one."""
        raise RuntimeError(f"worker {member.worker} claims a batch, but there is no pool: the protocol is broken")

    def begin(self, member: Member, header: Header) -> Work:
        """Take note of an announced gradient's samples, or of those that were passed over."""
        return Work([Part(header.sequence, header.samples, header.batches, header.cost)])

    def is_used(self, work: Work) -> bool:
        """Whether its samples count already, in another worker's gradient."""
        return False

    def accept(self, member: Member, work: Work) -> None:
        """It counts in the open step."""

    def use(self, member: Member, work: Work) -> None:
        """Its step is published."""
        self._enter(member, work, "accepted")
        self._tally(member, work.parts, "used")

    def refuse(self, member: Member, work: Work, outcome: Outcome, *, may_return: bool) -> None:
        """It does not count; `may_return` where it is late, and finite."""
        self._enter(member, work, outcome)
        self._let_go(member, work, may_return=may_return)

    def pass_over(self, member: Member, header: Header, *, may_return: bool) -> None:
        """Batches left no gradient; `may_return` where it would have been late."""
        self._let_go(member, self.begin(member, header), may_return=may_return)

    def withdraw(self, member: Member, work: Work) -> None:
        """It was announced, and its worker is gone."""

    def _let_go(self, member: Member, work: Work, *, may_return: bool) -> None:
        self._tally(member, work.parts, "discarded")

    def abandon(self, member: Member, work: Work, *, is_told: bool) -> None:
        """It was accepted into a step that will never close; unless told already its worker will have it refused."""
        if is_told:
            self._tally(member, work.parts, "discarded")

    def lose(self, member: Member, taken: int) -> None:
        """A worker contributes nothing more, but for `taken` samples in the open step."""
        member.account.lost += member.account.in_flight - taken

    def state(self, members: Sequence[Member]) -> dict[str, Any]:
        """Return the accounts, to go on from: what is in flight now will be handed out again."""
        return {"accounts": [{**vars(m.account), "handed": m.account.handed - m.account.in_flight} for m in members]}

    def _enter(self, member: Member, work: Work, outcome: Outcome) -> None:
        for account in self._accounts(member, work.own):
            account.judge(outcome)

    def _tally(self, member: Member, parts: Sequence[Part], fate: Fate, *, is_settled: bool = True) -> None:
        for part in parts:
            member.account.batches += part.batches * is_settled
            for account in self._accounts(member, part):
                account.tally(fate, part.samples)

    def _accounts(self, member: Member, part: Part) -> list[Account]:
        if math.isnan(part.cost):
            return [member.account]
        return [member.account, self.by_cost.setdefault(math.frexp(part.cost)[1] - 1, Account())]


class Retry(Discard):
    """A late gradient's batches are computed again, at most `limit` times in a row."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit
        self._again: Counter[int] = Counter()  # how often each worker has been given back what it has

    def accept(self, member: Member, work: Work) -> None:
        """It counts in the open step: the worker goes on to other batches."""
        self._again[member.worker] = 0

    def _let_go(self, member: Member, work: Work, *, may_return: bool) -> None:
        if may_return and self.goes_on and self._again[member.worker] < self._limit:
            self._again[member.worker] += 1
            self._tally(member, work.parts, "requeued", is_settled=False)
        else:
            self._again[member.worker] = 0
            self._tally(member, work.parts, "discarded")


class Carry(Discard):
    """A late gradient is added to its worker's next one, unless it has become too old by then."""

    def __init__(self) -> None:
        super().__init__()
        self._carried: dict[int, Sequence[Part]] = {}  # in each worker's hands

    def begin(self, member: Member, header: Header) -> Work:
        """Take note of a gradient, and of what it carries or of what was given up."""
        carried = self._carried.pop(member.worker, ())
        if not header.carries:
            self._tally(member, carried, "discarded")
            return super().begin(member, header)
        fresh = header.samples - sum(part.samples for part in carried)
        return Work([*carried, Part(header.sequence, fresh, header.batches, header.cost)])

    def _let_go(self, member: Member, work: Work, *, may_return: bool) -> None:
        if may_return and self.goes_on:
            self._carried[member.worker] = work.parts
        else:
            self._tally(member, work.parts, "discarded")

    def pass_over(self, member: Member, header: Header, *, may_return: bool) -> None:
        """Batches left no gradient, so that there is none to carry."""
        self._tally(member, super().begin(member, header).parts, "discarded")


class Requeue(Discard):
    """A late gradient's batches go back to the pool, and so do those of workers that leave or die.

    Attributes:
        pool: Of the run's batches; none until the root's loop has begun.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool: SamplePool | None = None

    @property
    def _lots(self) -> SamplePool:
        if self.pool is None:
            raise RuntimeError("batches were claimed before the root's loop had begun: the protocol is broken")
        return self.pool

    @property
    def remaining(self) -> int | None:
        """How many lots are not used."""
        return None if self.pool is None else self.pool.remaining

    def claim(self, member: Member, behind: Sequence[int], batches: int) -> BatchId | None:
        """Deal a lot; none where the root has not come to its loop, which is the end."""
        if self.pool is None or not self.goes_on:
            return None
        if batches != self.pool.batches:
            raise ValueError(
                f"the loader of worker {member.worker} makes {batches} batches an epoch and the root's "
                f"{self.pool.batches}: all ranks must pass the same loader to session.batches"
            )
        return self.pool.claim(member.worker, behind)

    def begin(self, member: Member, header: Header) -> Work:
        """Take note of a gradient and of the lots that it was computed from."""
        lots = self._lots.take(member.worker, header.batches)
        return Work(super().begin(member, header).parts, lots)

    def is_used(self, work: Work) -> bool:
        """Whether another worker was given one of its lots too, and was first."""
        return self._lots.is_used(work.lots)

    def accept(self, member: Member, work: Work) -> None:
        """It counts in the open step."""
        self._lots.use(work.lots)

    def use(self, member: Member, work: Work) -> None:
        """Its step is published."""
        super().use(member, work)
        self._lots.settle(work.lots)

    def _let_go(self, member: Member, work: Work, *, may_return: bool) -> None:
        if may_return:
            self._lots.give_back(member.worker, work.lots)
            self._tally(member, work.parts, "requeued")
        else:
            self._lots.give_up(member.worker, work.lots)
            self._tally(member, work.parts, "discarded")

    def withdraw(self, member: Member, work: Work) -> None:
        """It was announced, and its worker is gone."""
        self._lots.give_back(member.worker, work.lots)

    def abandon(self, member: Member, work: Work, *, is_told: bool) -> None:
        """It was accepted into a step that will never close: it is in the pool again in any case."""
        self._lots.restore(work.lots)
        if is_told:
            self._tally(member, work.parts, "requeued")

    def lose(self, member: Member, taken: int) -> None:
        """What a worker had in its hands goes back to the pool."""
        member.account.requeued += member.account.in_flight - taken
        if self.pool is not None:
            self.pool.leave(member.worker)

    def state(self, members: Sequence[Member]) -> dict[str, Any]:
        """Return the accounts and the pool."""
        return {**super().state(members), "pool": None if self.pool is None else self.pool.state}
