"""How long each step takes under a deadline when the times of all gradients are known.

A worker that is late finishes its gradient before it begins the next, so it may miss several steps.
With rare long events that matters as much as who is the slowest of a step.
"""

from __future__ import annotations

import numpy as np

from mpisync.planning.laws import Seconds

__all__ = ["deadline_step_times"]


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
