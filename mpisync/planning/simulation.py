"""A root and its workers in virtual time, under the very policy objects that drive a real root.

The player that judges is a real root's too (`mpisync.policies.player`); what computing takes is given, and messages and
the root's work cost what a model of them says (`Costs`). Nothing is drawn but the lots that break ties.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mpisync.planning.costs import Costs
from mpisync.planning.learning import Learner
from mpisync.planning.network import Network
from mpisync.policies import Arrival, Policy
from mpisync.policies.player import Player, Refusal
from mpisync.records import ArrivalRecord, StepRecord

__all__ = ["ComputeTimes", "Deadlock", "simulate"]

Delay = Callable[[int, int], float]
ComputeTimes = npt.NDArray[np.float64] | Delay
"""Seconds of each computation, as an array (steps, workers) or as a function of (worker, sequence)."""
Verdict = Literal["accepted", "late", "rejected"]
_NOT_FINITE = Refusal("rejected")


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
    root = _Root(policy, delay, count, steps, costs or Costs(), learner, set(rejected), eager, seed)
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
    """The root's event loop, and the workers that it hears of; it keeps the gradients that its player judges."""

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
        seed: int | None,
    ) -> None:
        self._delay, self._costs, self._learner = delay, costs, learner
        self._rejected, self._eager = rejected, eager
        self._draw: Callable[[], float] = random.Random(seed).random if seed is not None else float
        self._steps = steps if policy.steps is None else min(steps, policy.steps)
        self._network = Network(costs, workers)
        self._now_s = 0.0
        self._event_s = -1.0  # when the last event was
        self._is_tie = False  # whether others are at the same time
        self._tied: set[int] = set()  # workers whose gradients came at the same time as others
        self._free_s = 0.0  # when the root has done what it does
        self._idle_s = 0.0  # until when it last had nothing to do
        self._is_closing = False  # from a step's close to its publication
        self._events: list[tuple[float, float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._inbox: deque[Arrival] = deque()  # headers that came while the root was busy
        self._heard: dict[int, Arrival] = {}  # by worker: what has no verdict yet
        self._alive = set(range(workers))
        self._waiting: dict[int, tuple[int, int]] = {}  # worker: (sequence, version), until published
        self._computing: dict[int, tuple[float, Any]] = {}  # worker: its seconds, its parameters
        self._gradients: list[npt.NDArray[np.float64]] = []
        self._closed: StepRecord | None = None
        ties = None if seed is None else random.Random(seed)
        self._player = Player(policy, workers, self, self, clock=lambda: self._now_s, ties=ties)

    def run(self) -> Iterator[StepRecord]:
        """Yield each step once it is published."""
        for number in range(1, self._steps + 1):
            while self._closed is None:
                self._advance()
            record, self._closed = self._closed, None
            yield record
            if number < self._steps:
                self._open()

    def later(self, at_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Plan an event."""
        heapq.heappush(self._events, (at_s, self._draw(), next(self._order), action, arguments))

    def _advance(self) -> None:
        """Do what comes next: the root's own waking, a header it has not looked at, or an event."""
        next_s, player = self._events[0][0] if self._events else math.inf, self._player
        if not self._is_closing:
            wakes_s = max(player.policy.wakes_at(player.step), self._free_s)
            if self._inbox and self._free_s <= min(next_s, wakes_s):
                self._now_s = self._free_s
                return self._hear(self._inbox.popleft())
            if wakes_s < next_s:
                self._now_s = max(self._now_s, wakes_s)
                if not player.closes(self._now_s):
                    raise RuntimeError(f"{player.policy} asked to be woken at {wakes_s} s, and closed nothing")
                return self._close()
        if not self._events:
            raise Deadlock(f"step {player.step.step} of {player.policy} cannot close: {player.step}")
        before_s = self._event_s
        self._event_s, _, _, action, arguments = heapq.heappop(self._events)
        self._is_tie = self._event_s == before_s or bool(self._events and self._events[0][0] == self._event_s)
        self._now_s = self._event_s
        return action(*arguments)

    # -- workers -----------------------------------------------------------------------------------

    def resume(self, worker: int, sequence: int, newest: int, at_s: float) -> None:
        """Let a worker begin its next computation, or wait for its version."""
        due, version = self._player.policy.resumes_at(worker, sequence, newest), self._player.step.step
        if worker not in self._alive:
            return
        if due > version:
            self._waiting[worker] = (sequence, due)
            return
        begins_s = self._network.served_s(worker, version, at_s)
        takes_s = self._delay(worker, sequence, version)
        self._computing[worker] = takes_s, None if self._learner is None else self._learner.parameters
        done_s = begins_s + takes_s
        heard_s, stamp_s = self._network.heard_s(worker, done_s)
        self.later(heard_s, self._arrive, Arrival(worker, sequence, version, stamp_s))

    def _arrive(self, arrival: Arrival) -> None:
        """A header has come to the root."""
        if arrival.worker not in self._alive:
            return
        if self._is_tie:
            self._tied.add(arrival.worker)
        if self._is_closing or self._inbox or self._free_s > self._now_s:
            self._inbox.append(arrival)
        else:
            self._hear(arrival)

    def die(self, worker: int) -> None:
        """A worker is late for ever; what was accepted of it counts."""
        self._alive = self._player.step.alive = self._alive - {worker}
        self._waiting.pop(worker, None)
        self._player.forget(worker)
        self._settle()

    # -- judging -----------------------------------------------------------------------------------

    def _hear(self, arrival: Arrival) -> None:
        """The root looks at a header."""
        self._idle_s = self._now_s
        self._now_s += self._costs.header_s
        self._free_s = self._now_s
        self._heard[arrival.worker] = arrival
        self._player.hear(arrival)
        self._player.judge(arrival.worker)
        self._settle()

    def _whole(self, arrival: Arrival) -> None:
        """The last byte of an asked-for gradient has come."""
        worker = arrival.worker
        if worker not in self._alive or not self._network.came(arrival):
            return
        if self._is_closing:  # it is judged when the next step opens
            self._heard[worker] = self._player.whole(worker, self._now_s)
            return
        self._idle_s = self._now_s = max(self._now_s, self._free_s)
        self._heard[worker] = self._player.whole(worker, self._now_s)
        self._player.judge(worker)
        self._settle()

    def _settle(self) -> None:
        """Close the step if it is complete; else ask for as many payloads as it still lacks, first come first."""
        if self._is_closing:
            return
        if self._player.closes(self._now_s):
            return self._close()
        network = self._network
        while network.queue and self._player.lacking > len(network.wanted):
            arrival = network.queue.popleft()
            self.later(network.payload_s(arrival, self._now_s), self._whole, arrival)

    def is_whole(self, worker: int) -> bool:
        """Say whether every byte of a worker's gradient is where it will be folded."""
        return self._network.is_whole(self._heard[worker])

    def want(self, worker: int) -> None:
        """Let a worker stand in line, once."""
        arrival = self._heard[worker]
        if worker not in self._network.wanted and arrival not in self._network.queue:
            self._network.queue.append(arrival)

    def drop(self, worker: int) -> None:
        """Ask a worker for nothing."""
        self._network.drop(worker)

    def objection(self, arrival: Arrival) -> Refusal | None:
        """Say why a gradient that is in time cannot count all the same."""
        return _NOT_FINITE if (arrival.worker, arrival.sequence) in self._rejected else None

    def accept(self, arrival: Arrival) -> None:
        """Count a whole gradient."""
        worker, player = arrival.worker, self._player
        self._free_s = max(self._free_s, self._network.accepted(worker, self._idle_s, self._now_s))
        if self._learner is not None:
            parameters = self._computing[worker][1]
            self._gradients.append(self._learner.gradient(parameters, worker, arrival.sequence))
        at_next = (player.is_closing and not self._eager) or player.policy.staleness == 0
        self._answer(arrival, "accepted", player.step.step + at_next)

    def refuse(self, arrival: Arrival, refusal: Refusal) -> None:
        """Give a verdict that is not acceptance."""
        self._answer(arrival, refusal.verdict, self._player.step.step)

    def _answer(self, arrival: Arrival, verdict: Verdict, newest: int) -> None:
        """Give a verdict, and let the worker go on."""
        worker, step = arrival.worker, self._player.step
        is_tie = worker in self._tied
        self._tied.discard(worker)
        self._player.enter(
            ArrivalRecord(
                worker,
                arrival.sequence,
                arrival.version,
                verdict,
                offset_s=arrival.at_s - step.opened_s,
                late_by=step.step - arrival.version if verdict == "late" else 0,
                tie=is_tie and verdict == "accepted",
                compute_s=self._computing[worker][0],
                samples=1,
                loss=None if self._learner is None else self._learner.errors[arrival.version],
                bytes=self._costs.gradient_bytes if self._network.is_whole(arrival) else 0,
            )
        )
        self.resume(worker, arrival.sequence + 1, newest, self._now_s)

    # -- closing, opening --------------------------------------------------------------------------

    def _close(self) -> None:
        """Fold what is left, update, publish."""
        self._is_closing = True
        closed_s, costs = self._now_s, self._costs
        reduced_s = max(closed_s, self._free_s) + costs.reduce_s(self._network.pending(closed_s))
        published_s = reduced_s + costs.updating_s + costs.publication_s
        if published_s > closed_s:
            self.later(published_s, self._publish, closed_s, reduced_s)
        else:
            self._publish(closed_s, reduced_s)

    def _publish(self, closed_s: float, reduced_s: float) -> None:
        """Record the step that was closed."""
        self._closed = self._player.close(
            closed_s=closed_s,
            published_s=self._now_s,
            samples_used=len(self._player.step.accepted),
            reduce_s=reduced_s - closed_s,
            update_s=self._costs.updating_s,
            publish_s=self._costs.publication_s,
            norms=self._learn(),
        )

    def _learn(self) -> tuple[float, float] | None:
        """Update the learner's parameters; the norms that a policy may want."""
        if self._learner is None:
            return None
        mean = np.mean(self._gradients, axis=0)
        squares = sum(float(np.vdot(one, one)) for one in self._gradients)
        self._gradients = []
        self._learner.update(mean)
        return squares, float(np.vdot(mean, mean))

    def _open(self) -> None:
        """Open the next step, and judge what waits for it."""
        now_s, player = self._now_s, self._player
        player.open(self._alive)
        number = player.step.step
        self._is_closing, self._free_s, self._idle_s = False, now_s, now_s
        self._network.published(number, now_s)
        for worker, (sequence, version) in list(self._waiting.items()):
            if version <= number:
                del self._waiting[worker]
                self.resume(worker, sequence, version, now_s)
        player.judge_again()
        self._settle()
