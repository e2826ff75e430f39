"""The open step: who is in it, which verdicts were given, and what became of everybody's samples.

The collector decides and keeps accounts; it knows no transport and folds nothing. Whoever uses it (the root among its
workers, a process that trains alone) asks what was decided, folds what is accepted and answers workers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping, Set
from typing import Any, NamedTuple

from mpisync.aggregation.account import Account
from mpisync.aggregation.late_work import LateWork
from mpisync.aggregation.work import Gradient, Part
from mpisync.policies import Arrival, Policy
from mpisync.policies.player import Payloads, Player, Refusal
from mpisync.records import ArrivalRecord, StepRecord
from mpisync.transport.wire import GradientInfo

_NOT_FINITE = Refusal("rejected", "the gradient has NaN or Inf")
_NOT_FIRST = Refusal(
    "rejected", "its forward pass initialised parameters, which others had done before: it is of other parameters"
)
TAKEN_OVER = Refusal("late", "its samples were given to another worker too, who was first")
_REJECTIONS_PER_WORKER = 20  # in a row, without one accepted, before training is given up


class Decided(NamedTuple):
    """A judged gradient, with its verdict."""

    gradient: Gradient
    refusal: Refusal | None = None  # None where it was accepted
    late_by: int = 0  # versions
    again: bool = False  # whether its worker is to compute on the same batches again


class Collector:
    """The judge of gradients at the open step, who keeps every worker's account.

    Args:
        policy: When a step closes and what counts.
        workers: How many there are.
        late: What becomes of late gradients' samples.
        payloads: Where gradients are.
        clock: Monotonic seconds.
        ties: Breaks ties; None for the order in which gradients came.
        gradient_bytes: What one takes, for the record.

    Attributes:
        player: Plays the policy at the open step.
        late: As given.
        accounts: Of each worker.
        gradients: The accepted ones of the open step, in order of acceptance.
    """

    def __init__(
        self,
        policy: Policy,
        workers: int,
        late: LateWork,
        *,
        payloads: Payloads,
        clock: Callable[[], float],
        ties: random.Random | None = None,
        gradient_bytes: int = 0,
    ) -> None:
        self.late = late
        self.accounts = [Account() for _ in range(workers)]
        self.gradients: list[Gradient] = []
        self._pending: dict[int, Gradient] = {}  # by worker: announced, and without a verdict
        self._next_sequence = [0] * workers
        self._rejected_in_a_row = 0
        self._decided: list[Decided] = []
        self._payloads, self._gradient_bytes = payloads, gradient_bytes
        self.player = Player(policy, workers, self, payloads, clock=clock, ties=ties)

    def decided(self) -> list[Decided]:
        """Return what was judged since the last call, in that order; the caller tells the workers."""
        decided, self._decided = self._decided, []
        return decided

    # -- what workers say --------------------------------------------------------------------------

    def next_sequence(self, worker: int) -> int:
        """Return the number of a worker's next gradient."""
        return self._next_sequence[worker]

    def register(self, arrival: Arrival, info: GradientInfo, handed: int, *, is_tie: bool = False) -> None:
        """Take note of an announced gradient; `Player.judge` is to follow.

        Args:
            arrival: Whose it is, and when it came.
            info: What its worker says of it.
            handed: Samples handed to that worker's loop so far.
            is_tie: Whether another one came at the same time.

        Raises:
            RuntimeError: Another gradient of its worker is due.
        """
        worker, due = arrival.worker, self._next_sequence[arrival.worker]
        newest = self.player.step.step
        if arrival.sequence != due or not 0 <= arrival.version <= newest:
            raise RuntimeError(
                f"worker {worker} sent gradient {arrival.sequence} of version {arrival.version}, but its gradient "
                f"{due} of a version up to {newest} is due: the protocol is broken"
            )
        self._next_sequence[worker] += 1
        account = self.accounts[worker]
        account.handed = handed
        part = Part(arrival.sequence, info.samples, info.batches, info.cost)
        work = self.late.announce(worker, account, part, carries=bool(info.carries))
        self._pending[worker] = Gradient(arrival, info, work, is_tie)
        self.player.hear(arrival)

    def whole(self, worker: int, at_s: float, *, is_tie: bool) -> None:
        """Take note of when a gradient's last byte came, and judge it unless the step is complete."""
        gradient = self._pending[worker]
        gradient.arrival, gradient.is_tie = self.player.whole(worker, at_s), is_tie
        if not self.player.is_closing:
            self.player.judge(worker)

    def pass_over(self, worker: int, info: GradientInfo, *, may_return: bool) -> bool:
        """Enter batches that left no gradient, and say whether their worker is to have them again.

        Args:
            worker: Whose they are.
            info: What it says of them.
            may_return: Whether they were given up for being late.
        """
        part = Part(self._next_sequence[worker], info.samples, info.batches, info.cost)
        return self.late.pass_over(worker, self.accounts[worker], part, may_return=may_return)

    def lose(self, worker: int) -> None:
        """Expect no further gradient of a worker; an accepted one counts all the same."""
        if (gradient := self._pending.pop(worker, None)) is not None:
            self.player.forget(worker)
            self.late.drop(worker, gradient.work)
        taken = sum(one.info.samples for one in self.gradients if one.worker == worker)
        self.late.lose(worker, self.accounts[worker], taken)

    @property
    def divergence(self) -> str:
        """The reason to give up training; "" where gradients count now and then."""
        limit = _REJECTIONS_PER_WORKER * len(self.player.step.alive)
        if self._rejected_in_a_row < max(limit, 1):
            return ""
        return (
            f"the last {limit} gradients all had NaN or Inf: training has diverged at version "
            f"{self.player.step.step}; lower the learning rate or clip the gradient"
        )

    def has_no_samples(self) -> bool:
        """Say whether all samples are used, so that there can be no further step."""
        step = self.player.step
        step.remaining = self.late.remaining
        return step.remaining == 0 and not step.accepted

    # -- what the player asks and tells ------------------------------------------------------------

    def objection(self, arrival: Arrival) -> Refusal | None:
        """Say why a gradient that is in time cannot count all the same."""
        gradient = self._pending[arrival.worker]
        if gradient.info.peak == math.inf:
            return _NOT_FINITE
        if gradient.info.initial and self.player.step.step > 0:
            return _NOT_FIRST
        return TAKEN_OVER if self.late.is_used(gradient.work) else None

    def accept(self, arrival: Arrival) -> None:
        """Count a whole gradient, of which nothing has entered the sum before."""
        gradient = self._pending.pop(arrival.worker)
        self.gradients.append(gradient)
        self.late.accept(arrival.worker, gradient.work)
        self._rejected_in_a_row = 0
        self._decided.append(Decided(gradient))

    def refuse(self, arrival: Arrival, refusal: Refusal, *, may_return: bool = True) -> None:
        """Give a verdict that is not acceptance.

        Args:
            arrival: Of whose gradient.
            refusal: The verdict.
            may_return: Whether its samples may come again, if it is late.
        """
        worker, is_late = arrival.worker, refusal.verdict == "late"
        gradient = self._pending.pop(worker)
        late_by = self.player.step.step - arrival.version if is_late else 0
        again = self.late.reject(
            worker,
            self.accounts[worker],
            gradient.work,
            refusal.verdict,
            may_return=may_return and is_late and gradient.info.peak < math.inf,
        )
        size_bytes = self._gradient_bytes if self._payloads.is_whole(worker) else 0
        self._enter(gradient, refusal.verdict, late_by=late_by, reason=refusal.reason or None, size_bytes=size_bytes)
        self._rejected_in_a_row += not is_late
        self._decided.append(Decided(gradient, refusal, late_by, again))

    def _enter(
        self, gradient: Gradient, verdict: Any, *, size_bytes: int, late_by: int = 0, reason: str | None = None
    ) -> None:
        arrival, info, work = gradient.arrival, gradient.info, gradient.work
        self.player.enter(
            ArrivalRecord(
                arrival.worker,
                arrival.sequence,
                arrival.version,
                verdict,
                offset_s=arrival.at_s - self.player.step.opened_s,
                late_by=late_by,
                tie=gradient.is_tie and verdict == "accepted",
                reason=reason,
                compute_s=info.compute_s,
                data_s=info.data_s,
                samples=info.samples,
                loss=None if math.isnan(info.loss) else info.loss,
                bytes=size_bytes,
                cost=None if math.isnan(info.cost) else info.cost,
                carried=work.carried or None,
                lots=[(one.epoch, one.batch) for one in work.batches] or None,
            )
        )

    # -- the end of a step, and of all -------------------------------------------------------------

    def close(self, alive: Set[int], **times: Any) -> StepRecord:  # noqa: ANN401 (as in Player.close)
        """Record the step, whose version is published, and open the next; `Player.judge_again` may follow.

        Args:
            alive: Workers of whom a gradient may still come.
            times: As in `Player.close`.
        """
        for gradient in self.gradients:
            self.late.commit(gradient.worker, self.accounts[gradient.worker], gradient.work)
            self._enter(gradient, "accepted", size_bytes=self._gradient_bytes)
        record = self.player.close(**times)
        self.gradients = []
        self.player.open(alive, self.late.remaining)
        return record

    def abandon(self, waiting: Collection[int]) -> None:
        """Give up the open step: what was accepted into it will not be used.

        Args:
            waiting: Workers who have not been told yet that their gradient was accepted: `give_up` tells them.
        """
        for gradient in self.gradients:
            worker = gradient.worker
            is_told = worker not in waiting
            self.late.rollback(worker, self.accounts[worker], gradient.work, is_told=is_told)
            if not is_told:
                self._pending[worker] = gradient
        self.gradients = []
        self.player.step.accepted.clear()

    def give_up(self, worker: int, reason: str, *, may_return: bool = True) -> None:
        """Refuse a worker's gradient as late, whatever the policy would say, since its loop is over.

        Args:
            worker: Whose it is.
            reason: What its worker is told.
            may_return: Whether its samples may come again.
        """
        self.player.forget(worker)
        self.refuse(self._pending[worker].arrival, Refusal("late", reason), may_return=may_return)

    # -- restoring ---------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what a later run needs to go on from the open step's beginning, in plain values."""
        return {
            "player": self.player.state(),
            "late": self.late.state(),
            "accounts": [account.settled() for account in self.accounts],
            "sequences": list(self._next_sequence),
            "rejected_in_a_row": self._rejected_in_a_row,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, before anything is heard."""
        self.player.load(state["player"])
        self.late.load(state["late"])
        self.accounts = [Account(**fields) for fields in state["accounts"]]
        self._next_sequence = list(state["sequences"])
        self._rejected_in_a_row = state["rejected_in_a_row"]
