"""The player of a policy, by the rules of `mpisync.policies.base`: one for every root there is.

The root of a run, a simulated one and a process that trains alone differ in where gradients are and what a verdict sets
off. They keep the gradients (`Keeper`); the player keeps the open step, judges, and says when it closes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol

from mpisync.policies.base import Arrival, Decision, OpenStep, Policy
from mpisync.records.schema import ArrivalRecord, StepRecord

__all__ = ["LATE", "Keeper", "Payloads", "Player", "Refusal"]


class Refusal(NamedTuple):
    """A verdict that is not acceptance.

    Example:
        >>> Refusal("rejected", "the gradient has NaN or Inf").verdict
        'rejected'
    """

    verdict: Literal["late", "rejected"]
    reason: str = ""


LATE = Refusal("late")


class Keeper(Protocol):
    """The keeper of the gradients that a player judges; it is told each verdict once."""

    def objection(self, arrival: Arrival) -> Refusal | None:
        """Say why a gradient that is in time cannot count all the same; None where it can."""

    def accept(self, arrival: Arrival) -> None:
        """Count a whole gradient: it is the last of `OpenStep.accepted`."""

    def refuse(self, arrival: Arrival, refusal: Refusal) -> None:
        """Give a gradient back."""


class Payloads(Protocol):
    """The places of gradients between their announcement and the sum."""

    def is_whole(self, worker: int) -> bool:
        """Say whether every byte of a worker's gradient is where it will be folded."""

    def want(self, worker: int) -> None:
        """Fetch a worker's gradient, which could count, and tell `Player.whole` once it is whole."""

    def drop(self, worker: int) -> None:
        """Stop fetching a worker's gradient."""


class Player:
    """The judge of gradients at the open step, who keeps what is recorded of it.

    Args:
        policy: When a step closes and what counts.
        workers: How many there are.
        keeper: Keeps the gradients.
        payloads: Where they are.
        clock: Monotonic seconds.
        ties: Breaks ties between gradients that wait for the next step; None for the order in which they came.
        version: The first step's number.

    Attributes:
        policy: Of the open step; it may change from step to step.
        step: The open step.
        is_closing: Whether the step is complete, so that nothing more is judged until the next one opens.
        accepted_s: When its last gradient was accepted; when it opened, before there is one.
        counts: Verdicts since the start.
        arrivals: The records of those given while this step has been open.

    Raises:
        ValueError: The policy cannot serve so many workers.

    Example:
        >>> from mpisync.policies import BackupWorkers
        >>> class Shown:  # every gradient is whole, finite and forgotten
        ...     def is_whole(self, worker): return True
        ...     def objection(self, arrival): return None
        ...     def accept(self, arrival): print("accepted", arrival.worker)
        ...     def refuse(self, arrival, refusal): print(refusal.verdict, arrival.worker)
        >>> player = Player(BackupWorkers(1), 2, Shown(), Shown(), clock=lambda: 0.0)
        >>> player.hear(Arrival(worker=1, sequence=0, version=0, at_s=0.0))
        >>> player.judge(1)
        accepted 1
        >>> player.is_closing
        True
    """

    def __init__(
        self,
        policy: Policy,
        workers: int,
        keeper: Keeper,
        payloads: Payloads,
        *,
        clock: Callable[[], float],
        ties: random.Random | None = None,
        version: int = 0,
    ) -> None:
        policy.check(workers)
        self.policy = policy
        self.counts: dict[str, int] = {"accepted": 0, "late": 0, "rejected": 0}
        self._keeper, self._payloads, self._clock, self._ties = keeper, payloads, clock, ties
        self._pending: dict[int, Arrival] = {}  # by worker: what was heard and has no verdict
        self._begin(OpenStep(version, clock(), workers, set(range(workers))))

    def _begin(self, step: OpenStep) -> None:
        self.step = step
        self.is_closing = False
        self.accepted_s = step.opened_s
        self.arrivals: list[ArrivalRecord] = []

    # -- judging -----------------------------------------------------------------------------------

    def hear(self, arrival: Arrival) -> None:
        """Take note of an announced gradient; `judge` is to follow."""
        self._pending[arrival.worker] = arrival

    def whole(self, worker: int, at_s: float) -> Arrival:
        """Take note of when a wanted gradient's last byte came; the next `judge` goes by that time."""
        arrival = self._pending[worker] = replace(self._pending[worker], at_s=at_s)
        held = self.step.held
        held[:] = [arrival if one.worker == worker else one for one in held]
        return arrival

    def judge(self, worker: int) -> None:
        """Decide about a worker's gradient, as things stand, and then about held ones, until nothing changes."""
        accepted, held = self._decide(worker), self.step.held
        while accepted and held and not self.is_closing:
            accepted = any(one in held and self._decide(one.worker) for one in list(held))

    def _decide(self, worker: int) -> bool:
        """Decide about one gradient, lateness before anything else, and say whether it was accepted."""
        arrival, step = self._pending[worker], self.step
        decision = self.policy.judge(arrival, step)
        if decision is Decision.LATE:
            self._refuse(arrival, LATE)
        elif decision is Decision.HOLD:
            if arrival not in step.held:
                step.held.append(arrival)
        elif (refusal := self._keeper.objection(arrival)) is not None:
            self._refuse(arrival, refusal)
        elif self._payloads.is_whole(worker):
            self._accept(arrival)
            return True
        else:
            self._payloads.want(worker)
        return False

    def _accept(self, arrival: Arrival) -> None:
        """Count a gradient."""
        self.forget(arrival.worker)
        step = self.step
        step.accepted.append(arrival)
        self.accepted_s = now_s = self._clock()
        self.is_closing = self.policy.closes(step, now_s)
        self._keeper.accept(arrival)

    def _refuse(self, arrival: Arrival, refusal: Refusal) -> None:
        self.forget(arrival.worker)
        self._keeper.refuse(arrival, refusal)

    def forget(self, worker: int) -> None:
        """Expect no verdict on a worker's gradient any more."""
        self._payloads.drop(worker)
        self._pending.pop(worker, None)
        if self.step.held:
            self.step.held[:] = [one for one in self.step.held if one.worker != worker]

    def closes(self, now_s: float) -> bool:
        """Say whether the step closes now."""
        return self.is_closing or self.policy.closes(self.step, now_s)

    def would_be_late(self, version: int) -> bool:
        """Say whether a gradient of this version would be late."""
        staleness = self.policy.staleness
        return staleness is not None and version + staleness < self.step.step

    @property
    def lacking(self) -> int:
        """The number of gradients that the step wants and that are not in."""
        return self.policy.target(self.step) - len(self.step.accepted)

    # -- records and steps -------------------------------------------------------------------------

    def enter(self, arrival: ArrivalRecord) -> None:
        """Enter a verdict into the counts and the open step's record."""
        self.counts[arrival.verdict] += 1
        self.arrivals.append(arrival)

    def close(
        self,
        *,
        closed_s: float,
        published_s: float,
        samples_used: int,
        reduce_s: float = 0.0,
        update_s: float = 0.0,
        publish_s: float = 0.0,
        updated: bool = True,
        norms: tuple[float, float] | None = None,
    ) -> StepRecord:
        """Record the step, whose version is published, and choose the next one's policy; `open` is to follow."""
        step = self.step
        record = StepRecord(
            step=step.step,
            opened_s=step.opened_s,
            closed_s=closed_s,
            published_s=published_s,
            target=self.policy.target(step),
            alive=len(step.alive),
            accepted=[(one.worker, one.sequence, one.version) for one in step.accepted],
            arrivals=self.arrivals,
            samples_used=samples_used,
            reduce_s=reduce_s,
            update_s=update_s,
            publish_s=publish_s,
            updated=updated,
            counts=dict(self.counts),
            norms=norms if self.policy.wants_norms else None,
            why=self.policy.why,
        )
        self.policy = self.policy.after(record)
        return record

    def open(self, alive: Set[int], remaining: int | None = None) -> None:
        """Open the step of the next version; held gradients wait for `judge_again`."""
        old = self.step
        self._begin(
            OpenStep(old.step + 1, self._clock(), old.workers, alive, held=old.held, remaining=remaining)
        )

    def judge_again(self) -> None:
        """Judge the gradients heard before the step opened that have no verdict, first come first."""
        if not self._pending:
            return
        waiting = list(self._pending.values())
        if self._ties is not None:
            self._ties.shuffle(waiting)
        for arrival in sorted(waiting, key=lambda one: one.at_s):
            if not self.is_closing and self._pending.get(arrival.worker) is arrival:
                self.judge(arrival.worker)

    # -- restoring ---------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what a later run needs to go on from the open step's beginning, in plain values."""
        return {
            "version": self.step.step,
            "policy": self.policy.state(),
            "counts": dict(self.counts),
            "clock_s": self._clock(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, before anything is heard."""
        old = self.step
        self.policy = self.policy.load(state["policy"], self._clock() - state["clock_s"])
        self.counts = dict(state["counts"])
        self._begin(OpenStep(state["version"], self._clock(), old.workers, old.alive))
