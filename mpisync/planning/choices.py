"""What each number of backup workers costs and gains, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mpisync.planning.efficiency import Efficiency
from mpisync.planning.empirical import block_steps
from mpisync.planning.laws import Seconds
from mpisync.planning.rollout import deadline_step_times
from mpisync.planning.scale import backup_step_times

__all__ = ["Choice", "Choices", "DeadlineChoice", "best_deadline", "candidates", "choices", "needed_steps"]

_RESAMPLES = 1000
_FLAT = 0.005  # among choices this close to the best, the fewest backups discard least
_ALL_UP_TO = 40  # workers; with more, only some numbers of backups are looked at

Watched = Callable[[Sequence[int]], Iterable[int]]


@dataclass(frozen=True)
class Choice:
    """What one number of backup workers costs and gains, against none.

    Attributes:
        backup: b.
        accepted: N.
        step_s: The mean time of a step, in seconds, overhead included; late gradients are finished.
        stopped_s: The same if late gradients are stopped at once: E[T_(N)] + overhead.
        per_step: How many times as many steps a second.
        per_sample: How many times as many accepted gradients a second, which for the same machines
            is the speed-up per machine.
        gain: How many times sooner the target, by J(N): from per_sample (all noise) to per_step.
        low: The gain may be as low as this (95 %).
        high: And as high as this.
        stopped_gain: The gain if late gradients are stopped at once.
        pays_below: It pays while N_c is below this many gradients; infinite if it always does.
        discarded: The share of the computing that is for nothing.

    Example:
        >>> made = choices(np.array([[1.0, 1.0, 2.0]] * 30), Efficiency(0.0))
        >>> made.best.backup, made.best.gain, made.best.pays_below
        (1, 2.0, inf)
    """

    backup: int
    accepted: int
    step_s: float
    stopped_s: float
    per_step: float
    per_sample: float
    gain: float
    low: float
    high: float
    stopped_gain: float
    pays_below: float
    discarded: float


@dataclass(frozen=True)
class Choices:
    """All that were looked at, and which is the best.

    Attributes:
        options: By growing b, from 0.
        best: The fewest backups within 0.5 % of the least time to target.
        fewest: The least b that resamples of the steps would choose (95 %).
        most: The largest.
        efficiency: J(N), by which they were compared.
        overhead_s: Of every step, in seconds.
    """

    options: list[Choice]
    best: Choice
    fewest: int
    most: int
    efficiency: Efficiency
    overhead_s: float

    def best_for(self, efficiency: Efficiency) -> Choice:
        """Return what would be the best by another J(N)."""
        cost = np.array([one.step_s * float(efficiency.relative(one.accepted)) for one in self.options])
        return self.options[_fewest_near_best(cost)]


def candidates(workers: int) -> list[int]:
    """Return the numbers of backups that are looked at: all if few, else ever more coarsely.

    Example:
        >>> candidates(4), len(candidates(10_000)), candidates(10_000)[-1]
        ([0, 1, 2, 3], 56, 9000)
    """
    if workers <= _ALL_UP_TO:
        return list(range(workers))
    grid = np.geomspace(1, 0.9 * workers, _ALL_UP_TO)
    few = [*range(12), *grid, *(workers * np.arange(0.01, 0.16, 0.01))]
    return sorted({round(b) for b in few})


def choices(
    times_s: Seconds, efficiency: Efficiency, *, overhead_s: float = 0.0, stopped_s: Seconds | None = None,
    late_stop: bool = False, seed: int = 0, watched: Watched = iter,
) -> Choices:
    """Compare numbers of backups over the steps that were measured or drawn.

    Each is played with all its steps in their order; the bands come from resampling the steps in
    blocks, so that clusters and slow phases stay together.

    Args:
        times_s: Seconds by step and worker, (steps, workers), all positive.
        efficiency: J(N).
        overhead_s: What every step takes beyond the N-th gradient, in seconds.
        stopped_s: E[T_(N)] for N = 1..P where it is known exactly, in seconds.
        late_stop: Whether late gradients are stopped at once, rather than finished.
        seed: Of the resampling.
        watched: Goes through the numbers; may show a bar.
    """
    workers = times_s.shape[1]
    backups = candidates(workers)
    accepted = workers - np.array(backups)
    ordered = np.sort(times_s, axis=1)
    took = ordered[:, accepted - 1]
    if not late_stop:
        played = [backup_step_times(times_s, b, between_s=overhead_s) for b in watched(backups[1:])]
        took = np.stack([took[:, 0], *played], axis=1)
    stopped = (ordered.mean(axis=0) if stopped_s is None else stopped_s)[accepted - 1] + overhead_s
    step = stopped if late_stop else took.mean(axis=0) + overhead_s
    weight = efficiency.relative(accepted)
    drawn = _resampled(took, np.random.default_rng(seed)) + overhead_s
    low, high = np.quantile(weight[0] * drawn[:, :1] / (weight * drawn), [0.025, 0.975], axis=0)
    work = np.cumsum(ordered.sum(axis=0))
    options = [
        _choice(
            workers, n, step[[0, i]], stopped[[0, i]], float(weight[0] / weight[i]), (float(low[i]), float(high[i])),
            float(1 - work[n - 1] / work[-1]),
        )
        for i, n in enumerate(accepted.tolist())
    ]  # fmt: skip
    best = _fewest_near_best(weight * step)
    each = [_fewest_near_best(one) for one in weight * drawn]
    fewest, most = np.quantile(each, [0.025, 0.975], method="nearest").astype(int)
    return Choices(options, options[best], backups[fewest], backups[most], efficiency, overhead_s)


def _choice(
    workers: int, accepted: int, step_s: Seconds, stopped_s: Seconds, worth: float, band: tuple[float, float],
    discarded: float,
) -> Choice:
    """Compare one choice with none: the times are those of none and of this one."""
    all_s, own_s = step_s.tolist()
    ratio = _times(all_s, own_s)
    return Choice(
        backup=workers - accepted,
        accepted=accepted,
        step_s=own_s,
        stopped_s=float(stopped_s[1]),
        per_step=ratio,
        per_sample=ratio * accepted / workers,
        gain=ratio * worth,
        low=band[0],
        high=band[1],
        stopped_gain=_times(*stopped_s.tolist()) * worth,
        pays_below=_pays_below(all_s, own_s, workers, accepted),
        discarded=discarded,
    )


def _resampled(took: Seconds, rng: np.random.Generator) -> Seconds:
    """Return means of the steps' times over resamples in blocks: (resamples, options)."""
    steps, length = len(took), block_steps(len(took))
    # A block's sum from any start, wrapping around; then a mean is a mean of some of these.
    wrapped = np.concatenate([np.zeros((1, took.shape[1])), np.cumsum(np.tile(took, (2, 1)), axis=0)])
    sums = wrapped[length : length + steps] - wrapped[:steps]
    blocks = max(1, round(steps / length))
    drawn = rng.integers(steps, size=(_RESAMPLES, blocks))
    return np.stack([sums[one].mean(axis=0) / length for one in drawn])


def _fewest_near_best(cost: Seconds) -> int:
    return int(np.flatnonzero(cost <= (1 + _FLAT) * cost.min())[0])


def _times(all_s: float, step_s: float) -> float:
    """Divide times that may be infinite, as means of a heavy tail are."""
    if math.isinf(step_s):
        return 1.0 if math.isinf(all_s) else 0.0
    return all_s / step_s


def _pays_below(all_s: float, step_s: float, workers: int, accepted: int) -> float:
    """Solve (1 + N_c/N) T_N = (1 + N_c/P) T_P for N_c."""
    if math.isinf(step_s):
        return 0.0
    saved, paid = all_s - step_s, step_s / accepted - all_s / workers
    if paid <= 0:
        return math.inf if saved > 0 else 0.0
    return max(0.0, saved / paid)


def needed_steps(steps: int, gain: float, low: float, high: float) -> int:
    """Return how many steps would tell the gain to half of itself, and to 2 % at the finest.

    Errors shrink with the square root of the steps.

    Example:
        >>> needed_steps(40, gain=1.1, low=1.0, high=1.2)
        160
    """
    wanted = max(0.02, (gain - 1) / 2)
    return math.ceil(steps * max(1.0, ((high - low) / 2 / wanted) ** 2) - 1e-6)


@dataclass(frozen=True)
class DeadlineChoice:
    """The best deadline.

    Attributes:
        seconds: From the opening of a step.
        at_least: For so many gradients it waits in any case.
        accepted: How many count, on average.
        gain: How many times sooner the target, against waiting for all.

    Example:
        >>> round(best_deadline(np.array([[1.0, 1.0, 2.0]] * 30), Efficiency(0.0)).gain, 2)
        1.98
    """

    seconds: float
    at_least: int
    accepted: float
    gain: float


def best_deadline(times_s: Seconds, efficiency: Efficiency, *, overhead_s: float = 0.0) -> DeadlineChoice:
    """Find the deadline with the least time to target; half the workers are waited for in any case.

    A step that averages n gradients is worth 1/(1 + N_c/n) steps without noise, or n where only
    samples count.
    """
    workers = times_s.shape[1]
    at_least = (workers + 1) // 2
    baseline = (times_s.max(axis=1).mean() + overhead_s) * float(efficiency.relative(workers))
    found = []
    for q in (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995):
        seconds = float(np.quantile(times_s, q)) * 1.01  # what ends at it is in time
        took, counts = deadline_step_times(times_s, seconds, at_least, between_s=overhead_s)
        cost = (took.mean() + overhead_s) / float((1 / efficiency.relative(counts)).mean())
        found.append(DeadlineChoice(seconds, at_least, float(counts.mean()), float(baseline / cost)))
    return max(found, key=lambda one: one.gain)
