"""The first N of N+b: the paper's synchronous SGD with backup workers."""

from __future__ import annotations

from dataclasses import dataclass

from mpisync.policies.base import Arrival, Decision, OpenStep, Policy, whole_number

__all__ = ["BackupWorkers"]


class FirstN(Policy):
    """The rule that a step takes the first N gradients computed at its version, one of each worker.

    Those who follow say by `target` how many that is.

    Example:
        >>> isinstance(BackupWorkers(1), FirstN)
        True
    """

    @property
    def staleness(self) -> int:
        """Always 0: gradients of older parameters never count."""
        return 0

    def judge(self, arrival: Arrival, step: OpenStep) -> Decision:
        """Accept the first N of this version, one of each worker."""
        if arrival.version < step.step:
            return Decision.LATE
        if (
            arrival.version > step.step
            or len(step.accepted) >= self.target(step)
            or step.has(arrival.worker)
        ):
            return Decision.HOLD
        return Decision.ACCEPT

    def closes(self, step: OpenStep, now_s: float) -> bool:
        """Close at the N-th."""
        return 0 < len(step.accepted) >= self.target(step)

    def lacks(self, step: OpenStep) -> int:
        """Return N less the number that is in."""
        return max(1, self.target(step) - len(step.accepted))


@dataclass(frozen=True)
class BackupWorkers(FirstN):
    """Close each step at the N-th gradient; the `backup` slowest workers are not waited for.

    Invariant: every update is the mean of exactly N gradients from N distinct workers, all computed
    at the very parameters being updated, where N is workers − backup, or as many as can still be
    had when fewer are alive.

    Source: J. Chen, X. Pan, R. Monga, S. Bengio, R. Jozefowicz, "Revisiting Distributed
    Synchronous SGD" (arXiv:1604.00981), algorithms 3 and 4. `BackupWorkers(0)` is full synchronous
    SGD.

    Attributes:
        backup: How many of the workers a step may do without (the paper's b).

    Example:
        >>> policy = BackupWorkers(1)
        >>> policy.check(workers=4)
        >>> step = OpenStep(step=5, opened_s=0.0, workers=4, alive={0, 1, 2, 3})
        >>> policy.target(step)
        3
        >>> policy.judge(Arrival(worker=0, sequence=4, version=4, at_s=0.1), step)
        <Decision.LATE: 'late'>
    """

    backup: int

    def __post_init__(self) -> None:
        """Refuse values that make no sense with any number of workers."""
        backup = whole_number("backup", self.backup, 0, "use 0 to wait for every worker")
        object.__setattr__(self, "backup", backup)

    def check(self, workers: int) -> None:
        """Refuse as many backup workers as there are workers, or more."""
        if self.backup >= workers:
            raise ValueError(
                f"backup must be less than the number of workers, or a step would wait for nobody, "
                f"but backup is {self.backup} with {workers} worker{'s' * (workers != 1)}: "
                f"use BackupWorkers({max(workers - 1, 0)}) or less, or start more ranks"
            )

    def target(self, step: OpenStep) -> int:
        """Return N: workers − backup, or as many as can still be had."""
        return min(step.workers - self.backup, step.reachable)

    def __str__(self) -> str:
        """Return for example `backup:1`."""
        return f"backup:{self.backup}"
