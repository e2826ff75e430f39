"""A root and its workers in virtual time, under the very policy objects that drive a real root.

The rules are those of `mpisync.policies.base`; what computing takes is given, and messages and the
root's work cost what a model of them says (`Costs`). Nothing is drawn but the lots that break ties.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mpisync.planning.costs import Costs
from mpisync.planning.learning import Learner
from mpisync.planning.network import Network
from mpisync.policies import Arrival, Decision, OpenStep, Policy
from mpisync.records import ArrivalRecord, StepRecord

__all__ = ["ComputeTimes", "Deadlock", "simulate"]

Delay = Callable[[int, int], float]
ComputeTimes = npt.NDArray[np.float64] | Delay
"""Seconds of each computation, as an array (steps, workers) or as a function of (worker, sequence)."""
Verdict = Literal["accepted", "late", "rejected"]


class Deadlock(RuntimeError):
    """Nothing is under way any more, and the open step does not close.

    Example:
        >>> from mpisync.policies import BackupWorkers
        >>> records = simulate(BackupWorkers(0), np.ones((1, 2)), steps=9, deaths={0: 0.5, 1: 0.5})
        >>> list(records)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        mpisync.planning.simulation.Deadlock: step 0 of backup:0 cannot close: ...
    """


def simulate(
    policy: Policy,
    compute_s: ComputeTimes,
    *,
    steps: int,
    workers: int | None = None,
    costs: Costs | None = None,
    learner: Learner | None = None,
    deaths: Mapping[int, float] | None = None,
    rejected: Collection[tuple[int, int]] = (),
    eager: bool = False,
    seed: int | None = 0,
) -> Iterator[StepRecord]:
    """Yield the record of each step, as a real root would write it.

    Args:
        policy: When a step closes and what counts; `Policy.after` is asked after every step.
        compute_s: Seconds of each computation, as an array (steps, workers) or as a function of
            (worker, sequence). A computation takes the row of its version where each worker
            computes once a version (staleness 0), so that steps slow for all stay so, else that of
            its sequence; after the last row the first follows.
        steps: How many steps.
        workers: How many workers; needed if `compute_s` is a function.
        costs: What messages and the root cost; nothing without.
        learner: Trains something on the way, so that its error can be set against time.
        deaths: When workers die, in seconds.
        rejected: The (worker, sequence) whose gradients carry a NaN.
        eager: Let a worker go on before the step closes that its gradient completed.
        seed: Of the lots between what happens at the same time; None for the order of beginning.

    Raises:
        ValueError: The policy cannot serve so many workers, or the times make no sense.
        Deadlock: No further step can close.

    Example:
        >>> from mpisync.policies import BackupWorkers
        >>> times = np.array([[1.0, 2.0, 9.0], [1.0, 2.0, 9.0]])
        >>> [record.closed_s for record in simulate(BackupWorkers(1), times, steps=2)]
        [2.0, 4.0]
    """
    count, delay = _delay(compute_s, workers, by_version=policy.staleness == 0)
    policy.check(count)
    lots = (lambda: 0.0) if seed is None else random.Random(seed).random
    root = _Root(policy, delay, count, steps, costs or Costs(), learner, set(rejected), eager, lots)
    for worker, at_s in (deaths or {}).items():
        root.later(at_s, root.die, worker)
    for worker in range(count):
        root.resume(worker, 0, 0, 0.0)
    return root.run()


def _delay(
    compute_s: ComputeTimes, workers: int | None, *, by_version: bool
) -> tuple[int, Callable[[int, int, int], float]]:
    """Return the number of workers, and the seconds of (worker, sequence, version)."""
    if callable(compute_s):
        if workers is None:
            raise ValueError("workers must be given where compute_s is a function: say how many there are")
        function = compute_s
        return workers, lambda worker, sequence, version: function(worker, sequence)
    times = np.asarray(compute_s, dtype=np.float64)
    if times.ndim != 2 or not times.size or workers not in (None, times.shape[1]):
        raise ValueError(
            f"compute_s must be an array (steps, workers), here for {workers or 'any number of'} workers, "
            f"but its shape is {times.shape}"
        )
    if not (np.isfinite(times).all() and (times >= 0).all()):
        raise ValueError("compute_s must be finite and not negative: leave out the steps with gaps")
    rows, length = times.tolist(), len(times)  # Python's floats, which are faster one by one
    if by_version:
        return times.shape[1], lambda worker, sequence, version: rows[version % length][worker]
    return times.shape[1], lambda worker, sequence, version: rows[sequence % length][worker]


class _Root:
    """The root's event loop."""

    def __init__(
        self,
        policy: Policy,
        delay: Callable[[int, int, int], float],
        workers: int,
        steps: int,
        costs: Costs,
        learner: Learner | None,
        rejected: set[tuple[int, int]],
        eager: bool,
        lots: Callable[[], float],
    ) -> None:
        self.policy, self.delay, self.costs, self.learner = policy, delay, costs, learner
        self.rejected, self.eager, self.lots = rejected, eager, lots
        self.steps = steps if policy.steps is None else min(steps, policy.steps)
        self.network = Network(costs, workers)
        self.now_s = 0.0
        self.event_s = -1.0  # when the last event was
        self.is_tie = False  # whether others are at the same time
        self.tied: set[int] = set()  # workers whose gradients came at the same time as others
        self.free_s = 0.0  # when the root has done what it does
        self.idle_s = 0.0  # until when it last had nothing to do
        self.is_closing = False
        self.events: list[tuple[float, float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.order = itertools.count()
        self.inbox: deque[Arrival] = deque()  # headers that came while the root was busy
        self.waiting: dict[int, tuple[int, int]] = {}  # worker: (sequence, version), until published
        self.computing: dict[int, tuple[float, Any]] = {}  # worker: its seconds, its parameters
        self.answered: list[ArrivalRecord] = []
        self.counts: dict[str, int] = {"accepted": 0, "late": 0, "rejected": 0}
        self.gradients: list[npt.NDArray[np.float64]] = []
        self.closed: StepRecord | None = None
        self.step = OpenStep(0, 0.0, workers, set(range(workers)))

    def run(self) -> Iterator[StepRecord]:
        """Yield each step once it is published."""
        for _ in range(self.steps):
            while self.closed is None:
                self.advance()
            record, self.closed = self.closed, None
            yield record
            if record.step + 1 < self.steps:
                self.open(record.step + 1)

    def later(self, at_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Plan an event."""
        heapq.heappush(self.events, (at_s, self.lots(), next(self.order), action, arguments))

    def advance(self) -> None:
        """Do what comes next: the root's own waking, a header it has not looked at, or an event."""
        next_s = self.events[0][0] if self.events else math.inf
        if not self.is_closing:
            wakes_s = max(self.policy.wakes_at(self.step), self.free_s)
            if self.inbox and self.free_s <= min(next_s, wakes_s):
                self.now_s = self.free_s
                return self.hear(self.inbox.popleft())
            if wakes_s < next_s:
                self.now_s = max(self.now_s, wakes_s)
                if not self.policy.closes(self.step, self.now_s):
                    raise RuntimeError(f"{self.policy} asked to be woken at {wakes_s} s, and closed nothing")
                return self.close()
        if not self.events:
            raise Deadlock(f"step {self.step.step} of {self.policy} cannot close: {self.step}")
        before_s = self.event_s
        self.event_s, _, _, action, arguments = heapq.heappop(self.events)
        self.is_tie = self.event_s == before_s or bool(self.events and self.events[0][0] == self.event_s)
        self.now_s = self.event_s
        return action(*arguments)

    # -- workers -----------------------------------------------------------------------------------

    def resume(self, worker: int, sequence: int, newest: int, at_s: float) -> None:
        """Let a worker begin its next computation, or wait for its version."""
        version = self.policy.resumes_at(worker, sequence, newest)
        if worker not in self.step.alive:
            return
        if version > self.step.step:
            self.waiting[worker] = (sequence, version)
            return
        version = self.step.step
        begins_s = self.network.served_s(worker, version, at_s)
        takes_s = self.delay(worker, sequence, version)
        self.computing[worker] = takes_s, None if self.learner is None else self.learner.parameters
        done_s = begins_s + takes_s
        heard_s, stamp_s = self.network.heard_s(worker, done_s)
        self.later(heard_s, self.arrive, Arrival(worker, sequence, version, stamp_s))

    def arrive(self, arrival: Arrival) -> None:
        """A header has come to the root."""
        if arrival.worker not in self.step.alive:
            return
        if self.is_tie:
            self.tied.add(arrival.worker)
        if self.is_closing or self.inbox or self.free_s > self.now_s:
            self.inbox.append(arrival)
        else:
            self.hear(arrival)

    def die(self, worker: int) -> None:
        """A worker is late for ever; what of it has arrived counts."""
        self.step.alive = self.step.alive - {worker}
        self.waiting.pop(worker, None)
        if not self.is_closing and self.policy.closes(self.step, self.now_s):
            self.close()

    # -- judging -----------------------------------------------------------------------------------

    def hear(self, arrival: Arrival) -> None:
        """The root looks at a header."""
        self.idle_s = self.now_s
        self.now_s += self.costs.header_s
        self.free_s = self.now_s
        self.settle(arrival)

    def settle(self, arrival: Arrival) -> None:
        """Judge a gradient, and what may count now that it does."""
        if self.take(arrival):
            self.look_again()
        self.ask()

    def take(self, arrival: Arrival) -> bool:
        """Judge a gradient, and close the step if that completes it.

        Returns:
            Whether it was accepted and the step is still open: what is held is to be judged again.
        """
        decision, step = self.policy.judge(arrival, self.step), self.step
        if decision is Decision.ACCEPT and not self.network.is_whole(arrival):
            self.network.queue.append(arrival)
            return False
        if decision is Decision.LATE:
            self.answer(arrival, "late", step.step)
        elif decision is Decision.HOLD:
            step.held.append(arrival)
        elif (arrival.worker, arrival.sequence) in self.rejected:
            decision = Decision.LATE  # nothing was added
            self.answer(arrival, "rejected", step.step)
        else:
            self.accept(arrival)
        closes = self.policy.closes(step, self.now_s)
        if decision is Decision.ACCEPT:
            at_next = (closes and not self.eager) or self.policy.staleness == 0
            self.answer(arrival, "accepted", step.step + at_next)
        if closes:
            self.close()
        return decision is Decision.ACCEPT and not closes

    def accept(self, arrival: Arrival) -> None:
        """Count a whole gradient."""
        self.step.accepted.append(arrival)
        self.free_s = max(self.free_s, self.network.accepted(arrival.worker, self.idle_s, self.now_s))
        if self.learner is not None:
            parameters = self.computing[arrival.worker][1]
            self.gradients.append(self.learner.gradient(parameters, arrival.worker, arrival.sequence))

    def answer(self, arrival: Arrival, verdict: Verdict, newest: int) -> None:
        """Give a verdict, and let the worker go on."""
        worker, step = arrival.worker, self.step
        is_tie = worker in self.tied
        self.tied.discard(worker)
        self.counts[verdict] += 1
        self.answered.append(
            ArrivalRecord(
                worker,
                arrival.sequence,
                arrival.version,
                verdict,
                offset_s=arrival.at_s - step.opened_s,
                late_by=step.step - arrival.version if verdict == "late" else 0,
                tie=is_tie and verdict == "accepted",
                compute_s=self.computing[worker][0],
                samples=1,
                loss=None if self.learner is None else self.learner.errors[arrival.version],
                bytes=self.costs.gradient_bytes if self.network.is_whole(arrival) else 0,
            )
        )
        self.resume(worker, arrival.sequence + 1, newest, self.now_s)

    def look_again(self) -> None:
        """Judge what is held, from the first again after each acceptance."""
        held = self.step.held
        again = True
        while again and not self.is_closing:
            again = False
            for arrival in list(held):
                if self.policy.judge(arrival, self.step) is Decision.HOLD:
                    continue
                held.remove(arrival)
                again = self.take(arrival)
                if again or self.is_closing:
                    break

    def ask(self) -> None:
        """Ask for as many payloads as the step still lacks, first come first."""
        network = self.network
        while network.queue and not self.is_closing:
            lacking = self.policy.target(self.step) - len(self.step.accepted)
            if lacking <= len(network.wanted):
                return
            arrival = network.queue.popleft()
            self.later(network.payload_s(arrival, self.now_s), self.whole, arrival)

    def whole(self, arrival: Arrival) -> None:
        """The last byte of an asked-for gradient has come."""
        if arrival.worker not in self.step.alive or not self.network.came(arrival):
            return
        if not self.is_closing:  # else it is judged when the next step opens
            self.network.wanted.pop(arrival.worker)
            self.idle_s = self.now_s = max(self.now_s, self.free_s)
            self.settle(replace(arrival, at_s=self.now_s))

    # -- closing, opening --------------------------------------------------------------------------

    def close(self) -> None:
        """Fold what is left, update, publish."""
        self.is_closing = True
        closed_s, costs = self.now_s, self.costs
        reduced_s = max(closed_s, self.free_s) + costs.reduce_s(self.network.pending(closed_s))
        published_s = reduced_s + costs.updating_s + costs.publication_s
        if published_s > closed_s:
            self.later(published_s, self.publish, closed_s, reduced_s)
        else:
            self.publish(closed_s, reduced_s)

    def publish(self, closed_s: float, reduced_s: float) -> None:
        """Record the step that was closed."""
        step, policy, costs = self.step, self.policy, self.costs
        norms = self.learn()
        record = StepRecord(
            step=step.step,
            opened_s=step.opened_s,
            closed_s=closed_s,
            published_s=self.now_s,
            target=policy.target(step),
            alive=len(step.alive),
            accepted=[(one.worker, one.sequence, one.version) for one in step.accepted],
            arrivals=self.answered,
            samples_used=len(step.accepted),
            reduce_s=reduced_s - closed_s,
            update_s=costs.updating_s,
            publish_s=costs.publication_s,
            counts=dict(self.counts),
            norms=norms if policy.wants_norms else None,
            why=policy.why,
        )
        self.closed, self.answered = record, []
        self.policy = policy.after(record)

    def learn(self) -> tuple[float, float] | None:
        """Update the learner's parameters; the norms that a policy may want."""
        if self.learner is None:
            return None
        mean = np.mean(self.gradients, axis=0)
        squares = sum(float(np.vdot(one, one)) for one in self.gradients)
        self.gradients = []
        self.learner.update(mean)
        return squares, float(np.vdot(mean, mean))

    def open(self, number: int) -> None:
        """Open the next step, and judge what waits for it."""
        old, now_s = self.step, self.now_s
        self.step = OpenStep(number, now_s, old.workers, old.alive, held=old.held)
        self.is_closing, self.free_s, self.idle_s = False, now_s, now_s
        self.network.published(number, now_s)
        for worker, (sequence, version) in list(self.waiting.items()):
            if version <= number:
                del self.waiting[worker]
                self.resume(worker, sequence, version, now_s)
        self.look_again()
        for arrival in self.network.recalled():
            if self.is_closing:
                self.network.keep(arrival)
            elif arrival.worker not in self.network.wanted:
                if self.take(arrival):
                    self.look_again()
            elif self.policy.judge(arrival, self.step) is Decision.LATE:
                self.network.wanted.pop(arrival.worker)
                self.answer(arrival, "late", number)
        self.ask()
