"""A root and its workers in virtual time: plays a policy without MPI, clocks, arrays or threads.

It keeps the rules of `mpisync.policies.base` to the letter, and holds each policy against what any
policy owes its root: judging and asking twice changes nothing, what is late stays late, and no
gradient gets two verdicts.
"""

import heapq
import itertools
import math
from dataclasses import replace

from mpisync.policies import Arrival, ArrivalRecord, Decision, OpenStep, StepRecord


def cycling(table):
    """Delays from a table: a row for each worker, its numbers again and again."""
    return lambda worker, sequence: table[worker][sequence % len(table[worker])]


def steady(*delays):
    return cycling([[delay] for delay in delays])


def recorded(*lists):
    """The records of steps 0, 1, ... that accepted these (worker, sequence, version)."""
    return [StepRecord(i, i, i + 1, i + 1, 0, 0, list(one), []) for i, one in enumerate(lists)]


def opened(workers=3, *, step=5, alive=None, accepted=(), opened_s=0.0):
    """An open step in which these (worker, sequence, version, at_s) were accepted."""
    alive = set(range(workers)) if alive is None else alive
    arrivals = [Arrival(*one) for one in accepted]
    return OpenStep(step, opened_s, workers, alive, accepted=arrivals)


class Deadlock(AssertionError):
    """Nothing is under way, and the step does not close."""


def play(policy, delay, *, workers, steps, deaths=None, rejected=(), eager=False):
    """Return the records of the first `steps` steps.

    delay(worker, sequence) says how many seconds a computation takes; deaths maps workers to the
    times at which they die; rejected holds the (worker, sequence) that carry a NaN; an eager root
    lets a worker go on before it closes the step that this worker's gradient completed.
    """
    policy.check(workers)
    player = _Player(policy, delay, workers, steps, set(rejected), eager)
    for worker, at_s in (deaths or {}).items():
        player.later(at_s, player.die, worker)
    player.start()
    while not player.done:
        player.advance()
    return player.records


class _Player:
    def __init__(self, policy, delay, workers, steps, rejected, eager):
        self.policy, self.delay, self.steps = policy, delay, steps
        self.rejected, self.eager = rejected, eager
        self.now_s = 0.0
        self.events = []  # (time, order of being planned, what to do, with what)
        self.order = itertools.count()
        self.waiting = {}  # worker: (sequence, version), until that version is published
        self.verdicts = {}  # (worker, sequence): verdict
        self.late = []
        self.answered = []  # the arrivals that got their verdict in this step
        self.records = []
        self.step = OpenStep(0, 0.0, workers, set(range(workers)))

    @property
    def done(self):
        return len(self.records) == self.steps

    def start(self):
        for worker in range(self.step.workers):
            self.resume(worker, 0, newest=0)

    def later(self, at_s, action, *arguments):
        heapq.heappush(self.events, (at_s, next(self.order), action, arguments))

    def advance(self):
        wakes_at = self.policy.wakes_at(self.step)
        if not self.events and wakes_at == math.inf:
            raise Deadlock(f"step {self.step.step} of {self.policy}: {self.step}")
        if not self.events or wakes_at < self.events[0][0]:
            self.now_s = max(self.now_s, wakes_at)
            assert self.closes(), "it asked to be woken to close"
            self.close()
        else:
            self.now_s, _, action, arguments = heapq.heappop(self.events)
            action(*arguments)

    def resume(self, worker, sequence, newest):
        version = self.policy.resumes_at(worker, sequence, newest)
        if worker not in self.step.alive:
            return
        if version > self.step.step:
            self.waiting[worker] = (sequence, version)
        else:
            arrival = (worker, sequence, self.step.step)
            self.later(self.now_s + self.delay(worker, sequence), self.arrive, *arrival)

    def arrive(self, worker, sequence, version):
        if worker in self.step.alive:
            self.take(Arrival(worker, sequence, version, self.now_s))

    def die(self, worker):
        self.step.alive = self.step.alive - {worker}
        self.waiting.pop(worker, None)
        if self.closes():
            self.close()

    def take(self, arrival):
        decision = self.judge(arrival)
        if decision is Decision.LATE:
            self.late.append(arrival)
            self.answer(arrival, "late", self.step.step)
        elif decision is Decision.HOLD:
            self.step.held.append(arrival)
        elif (arrival.worker, arrival.sequence) in self.rejected:
            self.answer(arrival, "rejected", self.step.step)
        else:
            self.step.accepted.append(arrival)
        accepted, closes = decision is Decision.ACCEPT, self.closes()
        if accepted and arrival in self.step.accepted:
            at_next = (closes and not self.eager) or self.policy.staleness == 0
            self.answer(arrival, "accepted", self.step.step + at_next)
        if closes:
            self.close()
        elif accepted:
            self.look_again()

    def answer(self, arrival, verdict, newest):
        gradient = (arrival.worker, arrival.sequence)
        assert gradient not in self.verdicts, f"{gradient} has two verdicts"
        self.verdicts[gradient] = verdict
        late_by = self.step.step - arrival.version if verdict == "late" else 0
        offset_s = arrival.at_s - self.step.opened_s
        record = ArrivalRecord(*gradient, arrival.version, verdict, offset_s, late_by)
        self.answered.append(record)
        self.resume(arrival.worker, arrival.sequence + 1, newest)

    def look_again(self):
        for arrival in list(self.step.held):
            if not self.done and self.judge(arrival) is not Decision.HOLD:
                self.step.held.remove(arrival)
                self.take(arrival)
                return self.look_again()

    def close(self):
        step = self.step
        accepted = [(one.worker, one.sequence, one.version) for one in step.accepted]
        target, alive = self.policy.target(step), len(step.alive)
        times = (step.opened_s, self.now_s, self.now_s)
        self.records.append(StepRecord(step.step, *times, target, alive, accepted, self.answered))
        self.answered = []
        if not self.done:
            self.open(step.step + 1)

    def open(self, number):
        old = self.step
        self.step = OpenStep(number, self.now_s, old.workers, old.alive, held=old.held)
        for worker, (sequence, version) in list(self.waiting.items()):
            if version <= number:
                del self.waiting[worker]
                self.resume(worker, sequence, version)
        for arrival in self.late:
            assert self.policy.judge(arrival, self.step) is Decision.LATE, "late is final"
        self.look_again()

    def judge(self, arrival):
        return self.ask(lambda: self.policy.judge(arrival, self.step))

    def closes(self):
        return self.ask(lambda: self.policy.closes(self.step, self.now_s))

    def ask(self, question):
        before = replace(self.step, accepted=self.step.accepted[:], held=self.step.held[:])
        answer = question()
        assert question() == answer and self.step == before, "a policy only looks"
        return answer
