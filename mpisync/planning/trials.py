"""What policies would do with these delays: how fast a model trains, and what `Adaptive` would decide.

The model is a quadratic with as much noise as the run's gradients have: which policy is sooner at an
error, and by how much, follows from delays and noise; the errors themselves are the model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mpisync.planning.advice import Advice
from mpisync.planning.choices import Choices
from mpisync.planning.costs import Costs
from mpisync.planning.empirical import Empirical
from mpisync.planning.laws import Seconds
from mpisync.planning.learning import Array, Descent, Quadratic
from mpisync.planning.scale import backup_step_times
from mpisync.planning.simulation import simulate
from mpisync.policies import Adaptive, Async, BackupWorkers, Deadline, Policy
from mpisync.records import StepRecord

__all__ = ["Decisions", "Trial", "Trials", "decisions", "try_policies"]

MOST_WORKERS = 2000  # beyond, playing every event takes minutes
_FEWEST_STEPS, _MOST_STEPS, _GRADIENTS = 40, 200, 20_000  # that full synchronous SGD takes in the model
_MOST_DECIDED = 100_000  # gradients of the run that Adaptive is played on
_DIMENSION = 1000  # so many that the error hardly depends on chance
_MADS = 4.0  # of the deadline that follows the workers
_COMPARED = 0.6  # of the time: the error there is well above the noise that a constant rate ends in


@dataclass(frozen=True)
class Trial:
    """How one policy trains the model.

    Attributes:
        policy: Its command-line form.
        times_s: When each version was published, from 0, in seconds.
        errors: F(θ) − F* of each version; the first is 1.
        sooner: How many times sooner than full synchronous SGD it is at the target; 0 if it never was.
    """

    policy: str
    times_s: Seconds
    errors: Seconds
    sooner: float


@dataclass(frozen=True)
class Trials:
    """The policies that a plan compares, in training the model.

    Attributes:
        each: Full synchronous SGD first.
        noise: N_c at the start of training, in gradients.
        is_assumed: Whether that is the number of workers, since N_c is not known.
        rate: The learning rate, the best for full synchronous SGD in this time, the same for all.
        target: The error at which they are compared.
    """

    each: list[Trial]
    noise: float
    is_assumed: bool
    rate: float
    target: float


@dataclass(frozen=True)
class Decisions:
    """The N_t of `Adaptive`.

    Attributes:
        steps: The records that tell them.
        is_own: Whether the run itself was under `Adaptive`; else it is played with the run's delays.
    """

    steps: list[StepRecord]
    is_own: bool


class _Model(Descent):
    """Descent whose noise is drawn in the order in which gradients are asked for, which is faster."""

    def __init__(self, problem: Quadratic, rate: float, seed: int) -> None:
        super().__init__(problem, rate, seed)
        self._random = np.random.default_rng(seed)

    def gradient(self, parameters: Array, worker: int, sequence: int) -> Array:
        return self.problem.gradient(parameters, self._random)


def try_policies(
    advice: Advice, *, seed: int = 0, watched: Callable[[Sequence[Policy]], Iterable[Policy]] = iter
) -> Trials | None:
    """Train the model under each policy, for as long as full synchronous SGD takes for some 100 steps.

    Times are those that were measured, in their order; where they are too few they are drawn again.

    Args:
        advice: What was advised, with the times.
        seed: Of all that is drawn.
        watched: Goes through the policies; may show a bar.

    Returns:
        None where the plan chose nothing, or the workers are too many.

    Example:
        >>> from mpisync.planning.advice import advise
        >>> from mpisync.planning.observed import observe
        >>> times_s = np.ones((40, 4)) * [1.0, 1.0, 1.0, 2.0]
        >>> trials = try_policies(advise(observe(times_s)))
        >>> [(one.policy, one.sooner > 1.5) for one in trials.each[:2]]
        [('backup:0', False), ('backup:1', True)]
    """
    workers = advice.observed.times_s.shape[1]
    if advice.choices is None or workers > MOST_WORKERS:
        return None
    steps = min(_MOST_STEPS, max(_FEWEST_STEPS, _GRADIENTS // workers))
    times_s = _rows(advice.observed.times_s, 2 * steps, seed)
    costs = Costs(publish_s=advice.observed.overhead_s)
    horizon_s = float(backup_step_times(times_s[:steps], 0).sum()) + steps * costs.publish_s
    known = advice.choices.efficiency.noise
    noise = known if math.isfinite(known) else float(workers)
    problem = _quadratic(noise)
    rate = _best_rate(problem, workers, steps)
    curves = []
    for policy in watched(_policies(advice, advice.choices)):
        model = _Model(problem, rate, seed)
        published_s = [0.0]
        for record in simulate(policy, times_s, steps=100 * steps, costs=costs, learner=model):
            published_s.append(record.published_s)
            if record.published_s >= horizon_s:
                break
        curves.append((str(policy), np.array(published_s), np.array(model.errors)))
    target = float(curves[0][2][round(_COMPARED * steps)])
    reached_s = [_first_s(times, errors, target) for _, times, errors in curves]
    each = [Trial(*curve, reached_s[0] / at_s) for curve, at_s in zip(curves, reached_s, strict=True)]
    return Trials(each, noise, not math.isfinite(known), rate, target)


def _rows(times_s: Seconds, rows: int, seed: int) -> Seconds:
    lacking = rows - len(times_s)
    if lacking <= 0:
        return times_s[:rows]
    again = Empirical(times_s).sample(np.random.default_rng(seed), lacking, times_s.shape[1])
    return np.concatenate([times_s, again])


def _policies(advice: Advice, choices: Choices) -> list[Policy]:
    """Return what a plan compares: full synchronous SGD, the best b and some about it, and other policies."""
    workers, best = advice.observed.times_s.shape[1], choices.best.backup
    others = {1, max(1, best // 2), best, 2 * best} if best else {1}
    backups = sorted(b for b in others if 0 < b <= workers // 2 or b == best > 0)
    policies: list[Policy] = [BackupWorkers(0), *map(BackupWorkers, backups)]
    if advice.deadline is not None:
        policies.append(Deadline(advice.deadline.seconds, (workers + 1) // 2, mads=_MADS))
    return [*policies, Async(choices.best.accepted), Adaptive()]


def _quadratic(noise: float) -> Quadratic:
    """Return a quadratic with this N_c = σ²/‖∇F‖² at its start."""
    plain = Quadratic(_DIMENSION, noise=0.0)
    square = float(np.sum((plain.curvature * plain.start) ** 2))
    return Quadratic(_DIMENSION, noise=math.sqrt(noise * square))


def _best_rate(problem: Quadratic, workers: int, steps: int) -> float:
    """Return the rate at which full synchronous SGD has the least expected error after so many steps.

    E θ² ← (1 − ηλ)² E θ² + η²σ²/N in each direction, and after t steps a geometric sum.
    """
    rates = np.geomspace(1e-3, 1.0, 60)
    shrinks = (1 - rates[:, None] * problem.curvature) ** 2
    left = shrinks**steps
    noise = (rates * problem.sigma) ** 2 / workers
    squares = left * problem.start**2 + noise[:, None] * (1 - left) / (1 - shrinks)
    return float(rates[np.argmin((problem.curvature * squares).sum(axis=1))])


def _first_s(times_s: Seconds, errors: Seconds, target: float) -> float:
    below = np.flatnonzero(errors <= target)
    return float(times_s[below[0]]) if len(below) else math.inf


def decisions(advice: Advice) -> Decisions | None:
    """Return what `Adaptive` decided in the run, or would have decided with its delays.

    Returns:
        None where the plan chose nothing, or the workers are too many.

    Example:
        >>> from mpisync.planning.advice import advise
        >>> from mpisync.planning.observed import observe
        >>> times_s = np.ones((40, 4)) * [1.0, 1.0, 1.0, 2.0]
        >>> [step.target for step in decisions(advise(observe(times_s))).steps[:6]]
        [3, 3, 3, 3, 3, 3]
    """
    observed = advice.observed
    if (observed.policy or "").partition(":")[0] == "adaptive":
        return Decisions(observed.steps, is_own=True)
    times_s = advice.whole.times_s
    rows, workers = times_s.shape
    if advice.choices is None or workers > MOST_WORKERS:
        return None
    policy = Adaptive(noise_scale=advice.choices.efficiency.noise)
    costs = Costs(publish_s=observed.overhead_s)
    steps = max(_FEWEST_STEPS, min(rows, _MOST_DECIDED // workers))
    return Decisions(list(simulate(policy, times_s, steps=steps, costs=costs)), is_own=False)
