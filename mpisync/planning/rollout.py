"""How long each step takes when the times of all gradients are known: order statistics with memory.

A worker that is late finishes its gradient before it begins the next, so it may miss several steps.
With rare long events that matters as much as who is the slowest of a step.
"""

from __future__ import annotations

import numpy as np

from mpisync.planning.laws import Seconds

__all__ = ["backup_step_times", "deadline_step_times"]


def backup_step_times(compute_s: Seconds, backup: int, *, between_s: float = 0.0) -> Seconds:
    """Return the seconds of each step under `BackupWorkers`, where late gradients are finished.

    Were they stopped at once (`session.stale()`), it would be the N-th smallest of each row.

    Args:
        compute_s: Seconds of the gradient that a worker begins in a step, (steps, workers).
        backup: b, with N the other workers.
        between_s: From the closing of a step to the opening of the next.

    Returns:
        From opening to closing, (steps,).

    Example:
        >>> times_s = np.array([[1.0, 2.0, 5.0], [1.0, 2.0, 1.0], [1.0, 1.5, 1.5]])
        >>> backup_step_times(times_s, backup=1)  # the third is late until 5.0, in the third step
        array([2. , 2. , 1.5])
    """
    place = compute_s.shape[1] - backup - 1
    free, now = np.zeros(compute_s.shape[1]), 0.0  # when each worker can begin
    took = np.empty(len(compute_s))
    for step, times in enumerate(compute_s):
        ends = np.maximum(free, now) + times
        closed = np.partition(ends, place)[place]
        # Who could not begin before the closing is still at an older gradient.
        np.copyto(free, ends, where=free <= closed)
        took[step], now = closed - now, closed + between_s
    return took


def deadline_step_times(
    compute_s: Seconds, seconds: float, at_least: int = 1, *, between_s: float = 0.0
) -> tuple[Seconds, Seconds]:
    """Return the seconds of each step under `Deadline`, and how many gradients it accepts.

    Args:
        compute_s: Seconds of the gradient that a worker begins in a step, (steps, workers).
        seconds: The deadline, from the opening of a step.
        at_least: For so many it waits in any case.
        between_s: From the closing of a step to the opening of the next.

    Example:
        >>> deadline_step_times(np.array([[1.0, 2.0, 5.0], [1.0, 2.0, 1.0]]), 1.5)
        (array([1.5, 1.5]), array([1., 1.]))
    """
    free, now = np.zeros(compute_s.shape[1]), 0.0
    took, counts = np.empty(len(compute_s)), np.empty(len(compute_s))
    for step, times in enumerate(compute_s):
        ends = np.maximum(free, now) + times
        enough = np.partition(ends, at_least - 1)[at_least - 1]
        closed = min(max(now + seconds, enough), ends.max())
        counts[step] = np.count_nonzero(ends <= closed)
        np.copyto(free, ends, where=free <= closed)
        took[step], now = closed - now, closed + between_s
    return took, counts
