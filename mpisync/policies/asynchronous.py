"""Asynchronous SGD: gradients count however old they are, up to a cut-off."""

from __future__ import annotations

from dataclasses import dataclass

from mpisync.policies.base import Arrival, Decision, OpenStep, Policy, whole_number

__all__ = ["Async"]


@dataclass(frozen=True)
class Async(Policy):
    """Close each step at the k-th gradient, whichever version it was computed at.

    A worker resumes as soon as its gradient is accepted, at the newest version there is, so that
    one fast worker may give several of the k and k may exceed the number of workers.

    Invariant: every update is the mean of exactly k gradients, each computed at one of the last
    `max_staleness` + 1 versions (at any version without a cut-off), by any workers. With a cut-off
    of 0 that is synchronous SGD: a worker gives one gradient a step, and k shrinks to the number of
    workers that can still give one. Where samples run out or all have left, the last k may be smaller.

    Source: k=1 is asynchronous SGD, algorithms 1 and 2 of J. Chen, X. Pan, R. Monga, S. Bengio,
    R. Jozefowicz, "Revisiting Distributed Synchronous SGD" (arXiv:1604.00981); the cut-off is what
    its reviewers asked for. k>1 is softsync, named K-batch-async by S. Dutta et al., "Slow and
    Stale Gradients Can Win the Race" (arXiv:1803.01113).

    Attributes:
        k: How many gradients an update takes.
        max_staleness: How many versions a gradient may lag and still count; None for any number.

    Example:
        >>> policy = Async(k=2, max_staleness=4)
        >>> step = OpenStep(step=9, opened_s=0.0, workers=4, alive={0, 1, 2, 3})
        >>> policy.judge(Arrival(worker=0, sequence=2, version=5, at_s=0.1), step)
        <Decision.ACCEPT: 'accept'>
        >>> policy.judge(Arrival(worker=1, sequence=2, version=4, at_s=0.1), step)
        <Decision.LATE: 'late'>
    """

    k: int = 1
    max_staleness: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that make no sense with any number of workers."""
        k = whole_number("k", self.k, 1, "use 1 to update at every gradient")
        object.__setattr__(self, "k", k)
        if self.max_staleness is not None:
            advice = "use None to accept gradients of any age"
            most = whole_number("max_staleness", self.max_staleness, 0, advice)
            object.__setattr__(self, "max_staleness", most)

    @property
    def staleness(self) -> int | None:
        """The cut-off."""
        return self.max_staleness

    def check(self, workers: int) -> None:
        """Refuse more gradients than workers where a worker may give only one a step."""
        if workers < 1:
            raise ValueError(f"there must be at least 1 worker, not {workers}: start more ranks")
        if self.max_staleness == 0 and self.k > workers:
            raise ValueError(
                f"k must not exceed the number of workers where max_staleness=0 lets each give one "
                f"gradient a step, or a step can never close, but k is {self.k} with {workers}: "
                f"use k={workers} or less, or max_staleness=1 or more"
            )

    def target(self, step: OpenStep) -> int:
        """Return k, or the number that is in when nobody is left."""
        if not step.alive:  # one worker may have given several
            return min(self.k, len(step.accepted))
        return min(self.k, step.reachable) if self.max_staleness == 0 else step.limited(self.k)

    def judge(self, arrival: Arrival, step: OpenStep) -> Decision:
        """Accept gradients no older than the cut-off, until there are k."""
        lag = step.step - arrival.version
        if self.max_staleness is not None and lag > self.max_staleness:
            return Decision.LATE
        if lag < 0 or len(step.accepted) >= self.target(step):
            return Decision.HOLD
        if self.max_staleness == 0 and step.has(arrival.worker):
            return Decision.HOLD
        return Decision.ACCEPT

    def closes(self, step: OpenStep, now_s: float) -> bool:
        """Close at the k-th."""
        return 0 < len(step.accepted) >= self.target(step)

    def __str__(self) -> str:
        """Return for example `async:k=2,max_staleness=4`."""
        cut_off = "" if self.max_staleness is None else f",max_staleness={self.max_staleness}"
        return f"async:k={self.k}{cut_off}"
