"""The samples of gradients that do not count: every worker's account, and what comes back.

The rank that makes the updates keeps the accounts, and entries are final. A late gradient's samples are

    Discard   discarded
    Retry     requeued to the worker that has them, so many times in a row; then discarded
    Carry     still in flight: its worker adds the gradient to its next one, or gives it up for its age: discarded; lost
              where the worker leaves with it
    Requeue   requeued to the pool, where anyone may claim them

The samples of a gradient with NaN or Inf are discarded in any case, and so are those that are late after the end, but
for the pool's: whoever resumes from there claims them.

What a script gives to a session is such an object, as yet without accounts; the session works on a copy.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpisync.aggregation.account import Account, Fate, Outcome
from mpisync.aggregation.sample_pool import BatchId, SamplePool
from mpisync.aggregation.work import Part, Work


@dataclass
class LateWork:
    """The rule for late gradients' samples, and the accounts of all samples; here late ones are discarded.

    Attributes:
        by_cost: An account for each class k of costs, from 2^k to 2^(k+1).
        goes_on: Whether the training does.
    """

    by_cost: dict[int, Account] = field(default_factory=dict, init=False, repr=False, compare=False)
    goes_on: bool = field(default=True, init=False, repr=False, compare=False)

    @property
    def remaining(self) -> int | None:
        """The largest number of gradients that there are samples for; None where samples never run out."""
        return None

    def claim(self, worker: int, behind: Sequence[int], batches: int) -> BatchId | None:
        """Give a worker, whose loader makes so many batches an epoch, its next batch."""
        raise RuntimeError(f"worker {worker} claims a batch, but there is no pool: the protocol is broken")

    def announce(self, worker: int, account: Account, part: Part, *, carries: bool) -> Work:
        """Take note of the computation behind an announced gradient, or one that was passed over.

        Args:
            worker: Whose it is.
            account: That worker's.
            part: The computation; its samples are those of the whole gradient.
            carries: Whether the worker's late gradients are added in.
        """
        return Work([part])

    def is_used(self, work: Work) -> bool:
        """Say whether samples of a gradient count already, in another worker's."""
        return False

    def accept(self, worker: int, work: Work) -> None:
        """Count a gradient in the open step."""

    def commit(self, worker: int, account: Account, work: Work) -> None:
        """Enter the samples of a gradient whose step is published."""
        self._enter(account, work, "accepted")
        self._tally(account, work.parts, "used")

    def reject(self, worker: int, account: Account, work: Work, outcome: Outcome, *, may_return: bool) -> bool:
        """Enter a gradient that does not count; `may_return` where it is late, and finite.

        Returns:
            Whether its worker is to compute on the same batches again.
        """
        self._enter(account, work, outcome)
        return self._let_go(worker, account, work, may_return=may_return)

    def pass_over(self, worker: int, account: Account, part: Part, *, may_return: bool) -> bool:
        """Enter batches that left no gradient; `may_return` where it would have been late.

        Returns:
            Whether the worker is to have the same batches again.
        """
        work = self.announce(worker, account, part, carries=False)
        return self._let_go(worker, account, work, may_return=may_return)

    def drop(self, worker: int, work: Work) -> None:
        """Drop an announced gradient whose worker is gone."""

    def _let_go(self, worker: int, account: Account, work: Work, *, may_return: bool) -> bool:
        self._tally(account, work.parts, "discarded")
        return False

    def rollback(self, worker: int, account: Account, work: Work, *, is_told: bool) -> None:
        """Take back a gradient that was accepted into a step that will never close.

        Args:
            worker: Whose it is.
            account: That worker's.
            work: What it was computed from.
            is_told: Whether its worker knows of the acceptance; if not, `reject` follows.
        """
        if is_told:
            self._tally(account, work.parts, "discarded")

    def lose(self, worker: int, account: Account, taken: int) -> None:
        """Enter the samples that a worker holds as it leaves or dies, but for `taken` samples in the open step."""
        account.lost += account.in_flight - taken

    def state(self) -> dict[str, Any]:
        """Return what a later run needs to go on, beside the workers' accounts, in plain values."""
        return {"by_cost": {str(k): vars(account) for k, account in self.by_cost.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.by_cost = {int(k): Account(**fields) for k, fields in state.get("by_cost", {}).items()}

    def _enter(self, account: Account, work: Work, outcome: Outcome) -> None:
        for one in self._accounts(account, work.own):
            one.judge(outcome)

    def _tally(self, account: Account, parts: Sequence[Part], fate: Fate, *, is_settled: bool = True) -> None:
        for part in parts:
            account.batches += part.batches * is_settled
            for one in self._accounts(account, part):
                one.tally(fate, part.samples)

    def _accounts(self, account: Account, part: Part) -> list[Account]:
        if math.isnan(part.cost):
            return [account]
        return [account, self.by_cost.setdefault(math.frexp(part.cost)[1] - 1, Account())]


@dataclass
class Discard(LateWork):
    """Discard late gradients' samples, as in the paper.

    Example:
        >>> str(Discard())
        'discard'
    """

    def __str__(self) -> str:
        """Return the form in words."""
        return "discard"


@dataclass
class Retry(LateWork):
    """Give a late gradient's batches to its worker again, to compute on the newest parameters.

    Attributes:
        limit: How often in a row the same batches come again, at least 1.

    Example:
        >>> str(Retry())
        'retry:limit=3'
    """

    limit: int = 3
    _times: Counter[int] = field(default_factory=Counter, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse a limit below 1."""
        _check_number("limit", self.limit, "Discard() gives late work up at once")

    def accept(self, worker: int, work: Work) -> None:
        """Count a gradient in the open step: its worker goes on to other batches."""
        self._times[worker] = 0

    def _let_go(self, worker: int, account: Account, work: Work, *, may_return: bool) -> bool:
        again = may_return and self.goes_on and self._times[worker] < self.limit
        self._times[worker] = self._times[worker] + 1 if again else 0
        self._tally(account, work.parts, "requeued" if again else "discarded", is_settled=not again)
        return again

    def state(self) -> dict[str, Any]:
        """Return the costs' accounts, and how often in a row each worker was given its batches again."""
        return {**super().state(), "times": {str(worker): times for worker, times in self._times.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        super().load(state)
        self._times = Counter({int(worker): times for worker, times in state.get("times", {}).items()})

    def __str__(self) -> str:
        """Return for example `retry:limit=3`."""
        return f"retry:limit={self.limit}"


@dataclass
class Carry(LateWork):
    """Add a late gradient to its worker's next one, so that updates have stale parts.

    Attributes:
        max_staleness: How many versions old a carried gradient may be and still count, at least 1.

    Example:
        >>> str(Carry())
        'carry:max_staleness=3'
    """

    max_staleness: int = 3
    _carried: dict[int, Sequence[Part]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse a staleness below 1."""
        _check_number("max_staleness", self.max_staleness, "Discard() gives late work up at once")

    def announce(self, worker: int, account: Account, part: Part, *, carries: bool) -> Work:
        """Take note of a gradient, and of the late ones that it carries or that its worker gave up."""
        carried = self._carried.pop(worker, ())
        if not carries:
            self._tally(account, carried, "discarded")
            return Work([part])
        fresh = part.samples - sum(one.samples for one in carried)
        return Work([*carried, Part(part.sequence, fresh, part.batches, part.cost)])

    def _let_go(self, worker: int, account: Account, work: Work, *, may_return: bool) -> bool:
        if may_return and self.goes_on:
            self._carried[worker] = work.parts
        else:
            self._tally(account, work.parts, "discarded")
        return False

    def pass_over(self, worker: int, account: Account, part: Part, *, may_return: bool) -> bool:
        """Discard batches that left no gradient: there is none to carry."""
        self._tally(account, [part], "discarded")
        return False

    def __str__(self) -> str:
        """Return for example `carry:max_staleness=3`."""
        return f"carry:max_staleness={self.max_staleness}"


@dataclass
class Requeue(LateWork):
    """Give a late gradient's batches back to a pool that deals each epoch to all workers.

    So do those of workers that leave or die: every sample is used once an epoch, whoever is slow.

    Attributes:
        pool: Of the run's batches; none until the root's loop has begun.

    Example:
        >>> str(Requeue())
        'requeue'
    """

    pool: SamplePool | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def _batches(self) -> SamplePool:
        if self.pool is None:
            raise RuntimeError("batches were claimed before the root's loop had begun: the protocol is broken")
        return self.pool

    @property
    def remaining(self) -> int | None:
        """The number of batches that are not used; None before there is a pool."""
        return None if self.pool is None else self.pool.remaining

    def claim(self, worker: int, behind: Sequence[int], batches: int) -> BatchId | None:
        """Deal a batch; None where the root has not come to its loop, which is the end."""
        if self.pool is None or not self.goes_on:
            return None
        if batches != self.pool.batches:
            raise ValueError(
                f"the loader of worker {worker} makes {batches} batches an epoch and the root's "
                f"{self.pool.batches}: all ranks must pass the same loader to session.batches"
            )
        return self.pool.claim(worker, behind)

    def announce(self, worker: int, account: Account, part: Part, *, carries: bool) -> Work:
        """Take note of a gradient and of the batches that it was computed from."""
        return Work([part], self._batches.take(worker, part.batches))

    def is_used(self, work: Work) -> bool:
        """Say whether another worker, given one of a gradient's batches too, was first."""
        return self._batches.is_used(work.batches)

    def accept(self, worker: int, work: Work) -> None:
        """Count a gradient in the open step."""
        self._batches.use(work.batches)

    def commit(self, worker: int, account: Account, work: Work) -> None:
        """Enter the samples of a gradient whose step is published."""
        super().commit(worker, account, work)
        self._batches.settle(work.batches)

    def _let_go(self, worker: int, account: Account, work: Work, *, may_return: bool) -> bool:
        if may_return:
            self._batches.give_back(worker, work.batches)
            self._tally(account, work.parts, "requeued")
        else:
            self._batches.give_up(worker, work.batches)
            self._tally(account, work.parts, "discarded")
        return False

    def drop(self, worker: int, work: Work) -> None:
        """Drop an announced gradient whose worker is gone."""
        self._batches.give_back(worker, work.batches)

    def rollback(self, worker: int, account: Account, work: Work, *, is_told: bool) -> None:
        """Put back the batches of a gradient that was accepted into a step that will never close."""
        self._batches.restore(work.batches)
        if is_told:
            self._tally(account, work.parts, "requeued")

    def lose(self, worker: int, account: Account, taken: int) -> None:
        """Put back the batches that a worker holds as it leaves or dies."""
        account.requeued += account.in_flight - taken
        if self.pool is not None:
            self.pool.leave(worker)

    def state(self) -> dict[str, Any]:
        """Return the costs' accounts and the pool."""
        return {**super().state(), "pool": None if self.pool is None else self.pool.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; its pool, if it had one, is made for the loader by then."""
        super().load(state)
        if self.pool is not None:
            self.pool.load(state["pool"])

    def __str__(self) -> str:
        """Return the form in words."""
        return "requeue"


def late_work_of(value: LateWork | str) -> LateWork:
    """Return the rule that an object is, or that its form in words stands for.

    Raises:
        ValueError: It is no such form.
        TypeError: It is neither.

    Example:
        >>> late_work_of("retry"), late_work_of("retry:5"), late_work_of("carry:max_staleness=2")
        (Retry(limit=3), Retry(limit=5), Carry(max_staleness=2))
    """
    if isinstance(value, LateWork):
        return value
    if not isinstance(value, str):
        raise TypeError(f"on_late must be a word such as 'retry' or an object such as Retry(3), not {value!r}")
    kind, _, number = value.partition(":")
    kinds: dict[str, Callable[..., LateWork]] = {
        "discard": Discard, "retry": Retry, "carry": Carry, "requeue": Requeue
    }  # fmt: skip
    own = {"retry": "limit", "carry": "max_staleness"}.get(kind)
    name, _, digits = number.rpartition("=")
    if kind not in kinds or (number and (own is None or name not in ("", own) or not digits.isdecimal())):
        raise ValueError(f"on_late must be one of {', '.join(map(repr, kinds))}, not {value!r}")
    return kinds[kind](int(digits)) if number else kinds[kind]()


def _check_number(name: str, value: object, otherwise: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}; {otherwise}")
