"""Plays policies in virtual time, and holds each against what any policy owes its root.

The player is the package's own simulation. `Watched` stands between it and the policy and asserts:
judging and asking twice changes nothing, what is late stays late, who asks to be woken closes, and
what follows a step is a policy that is equal when asked for again. No gradient gets two verdicts.
"""

from dataclasses import replace

from mpisync.planning.simulation import Deadlock, simulate
from mpisync.policies import Arrival, Decision, OpenStep, Policy
from mpisync.records import StepRecord
from mpisync.records.schema import StepChecker

__all__ = ["Deadlock", "Watched", "cycling", "opened", "play", "recorded", "steady"]


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


def play(policy, delay, *, workers, steps, deaths=None, rejected=(), eager=False):
    """Return the records of the first `steps` steps; what happens at once, in order of beginning.

    delay(worker, sequence) says how many seconds a computation takes; deaths maps workers to the
    times at which they die; rejected holds the (worker, sequence) that carry a NaN; an eager root
    lets a worker go on before it closes the step that this worker's gradient completed.
    """
    checker, records = StepChecker(workers), []
    for record in simulate(
        Watched(policy),
        delay,
        workers=workers,
        steps=steps,
        deaths=deaths,
        rejected=rejected,
        eager=eager,
        seed=None,
    ):
        checker.check(record)
        records.append(record)
    return records


class Watched(Policy):
    """A policy that is asked everything twice."""

    def __init__(self, policy, late=()):
        self.policy, self.late, self.seen = policy, list(late), None

    def _ask(self, step, question):
        if step.step != self.seen:
            self.seen = step.step
            for arrival in self.late:
                assert self.policy.judge(arrival, step) is Decision.LATE, "late is final"
        before = replace(step, accepted=step.accepted[:], held=step.held[:])
        answer = question()
        assert question() == answer and step == before, "a policy only looks"
        return answer

    def judge(self, arrival, step):
        decision = self._ask(step, lambda: self.policy.judge(arrival, step))
        if decision is Decision.LATE:
            self.late.append(arrival)
        return decision

    def closes(self, step, now_s):
        answer = self._ask(step, lambda: self.policy.closes(step, now_s))
        assert answer or now_s < self.policy.wakes_at(step), "it asked to be woken to close"
        return answer

    def wakes_at(self, step):
        return self._ask(step, lambda: self.policy.wakes_at(step))

    def target(self, step):
        return self._ask(step, lambda: self.policy.target(step))

    def after(self, record):
        policy = self.policy.after(record)
        assert policy == self.policy.after(record), "what was seen decides, and nothing else"
        assert policy.staleness == self.staleness and policy.steps == self.steps
        assert str(policy) == str(self.policy), "its settings stay what they are"
        return Watched(policy, self.late)

    def check(self, workers):
        self.policy.check(workers)

    def resumes_at(self, worker, sequence, newest):
        return self.policy.resumes_at(worker, sequence, newest)

    staleness = property(lambda self: self.policy.staleness)
    steps = property(lambda self: self.policy.steps)
    wants_norms = property(lambda self: self.policy.wants_norms)
    why = property(lambda self: self.policy.why)

    def __str__(self):
        return str(self.policy)
