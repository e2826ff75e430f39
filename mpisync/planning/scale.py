"""Backup workers at any scale: step times from compute times by whole arrays, with no event in between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["arrival_times", "backup_step_times"]

Array = npt.NDArray[np.float64]


def arrival_times(compute_s: Array | Iterable[Array], counts: Sequence[int]) -> Array:
    """Return when the k-th gradient of each step is there if every worker begins every step.

    That is what interrupting late workers gives, and what the theory of order statistics is about.

    Args:
        compute_s: Seconds, (steps, workers); or blocks of steps, to keep memory small.
        counts: The k of interest, from 1 to the number of workers.

    Returns:
        Seconds since the step began, (steps, counts).

    Example:
        >>> arrival_times(np.array([[3.0, 1.0, 2.0], [5.0, 5.0, 4.0]]), counts=[1, 3])
        array([[1., 3.],
               [4., 5.]])
    """
    return np.concatenate([_smallest(block, counts) for block in _blocks(compute_s)])


def _smallest(block: Array, counts: Sequence[int]) -> Array:
    places = [count - 1 for count in counts]
    if min(counts) < 1 or max(counts) > block.shape[1]:
        raise ValueError(f"counts must be from 1 to the {block.shape[1]} workers, not {list(counts)}")
    # a few places are found faster than all are sorted
    ordered = np.partition(block, places, axis=1) if len(places) < 16 else np.sort(block, axis=1)
    chosen: Array = ordered[:, places]
    return chosen


def backup_step_times(compute_s: Array | Iterable[Array], backup: int, *, between_s: float = 0.0) -> Array:
    """Return how long each step takes under `BackupWorkers(backup)`.

    As in a real run, and as `simulate` plays it event by event: a worker that is late finishes what
    it began, and then begins the newest version.

    Args:
        compute_s: Seconds, (steps, workers); or blocks of steps, to keep memory small.
        backup: How many workers a step does without.
        between_s: From the closing of a step to the opening of the next.

    Returns:
        Seconds from each step's opening to its closing.

    Example:
        >>> backup_step_times(np.array([[1.0, 1.0, 5.0], [1.0, 2.0, 1.0]]), backup=1)
        array([1., 2.])
    """
    took_s: list[float] = []
    opened_s = 0.0
    free_s: Array | None = None  # when each worker is done with what it began before
    for row in (row for block in _blocks(compute_s) for row in block):
        if free_s is None:
            free_s, place = np.zeros(row.size), row.size - backup - 1
            if not 0 <= place < row.size:
                raise ValueError(f"backup must be from 0 to {row.size - 1} with {row.size} workers, not {backup}")
        arrived_s = np.maximum(free_s, opened_s)
        arrived_s += row
        closed_s = float(np.partition(arrived_s, place)[place])
        np.copyto(free_s, arrived_s, where=free_s <= closed_s)
        took_s.append(closed_s - opened_s)
        opened_s = closed_s + between_s
    return np.array(took_s)


def _blocks(compute_s: Array | Iterable[Array]) -> Iterator[Array]:
    """Go through blocks of steps, each an array (steps, workers)."""
    for block in [compute_s] if isinstance(compute_s, np.ndarray) else compute_s:
        if block.ndim != 2 or not block.size or not (np.isfinite(block).all() and (block >= 0).all()):
            raise ValueError(
                f"compute times must be finite, not negative and (steps, workers), but here are {block.shape}: "
                "leave out the steps with gaps"
            )
        yield block
