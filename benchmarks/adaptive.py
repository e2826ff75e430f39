"""Adaptive against every number of backup workers and against rules after DBW and AdaSync, simulated.

    python benchmarks/adaptive.py            about two minutes on one core; no MPI
    python benchmarks/adaptive.py --quick    one seed, for a look

Regimes: `light`, 32 workers with a real trace's light tails; `persistent`, one of 16 is 2.36 times
slower; `none`, 16 alike; `heavy`, 100 with the clustered heavy tails of the paper's straggler study;
and changes from one to another half-way. By these Adaptive's constants were chosen, with seeds from
0; the measured seeds are others. Of the regimes held out nothing was chosen but one thing left out:
weighing N after every step, not every fourth, changed it far more often there and was no faster.

First with the noise scale given: progress a second over 400 steps, where a step of N gradients
progresses by N/(N + noise scale). Then in training on a noisy quadratic, where all is measured: the
seconds until the error is 1/100 of the first, at a constant rate and at one that falls as 1/t. What
is timed is the error expected given the N of each step, which is exact for a quadratic, rather than
the error itself, whose luck at the target would hide what is compared. Both are told as a speed:
times the best static b's, chosen in hindsight. `foresight` is the best pair of b, one before the
change and one from the very step of it: nobody who has to notice the change can be faster by much.
Every rule keeps N within the same bounds, half of the workers and all. The last line is JSON.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mpisync.planning.composite import chen2016
from mpisync.planning.learning import Quadratic
from mpisync.planning.simulation import simulate
from mpisync.policies import Adaptive, OpenStep, Policy
from mpisync.policies.adaptive import moments
from mpisync.policies.backup import FirstN
from mpisync.records import StepRecord
from mpisync.records.turnarounds import Turnarounds

Rate = Callable[[int], float]
Array = np.ndarray

TRACE = Path(__file__).parent.parent / "tests/data/bytedance_SE_dp_compute_seconds_42x32.csv"
STEPS = 400  # with the noise scale given
DIMENSION, TARGET = 50, 0.01
RATES: dict[str, tuple[Rate, float]] = {  # with the noise of one gradient among 16 workers
    "constant": (lambda step: 0.1, 2.0), "falling": (lambda step: min(0.1, 10 / (step + 1)), 4.0),
}  # fmt: skip
WINDOW = 16  # steps that the rules of others look back on
FIRST_SEED = 100


# -- rules of others -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule(FirstN):
    """A rule that chooses N from the records of the last steps, at first all workers or as it says."""

    n: int | None = None
    first: StepRecord | None = None
    recent: tuple[StepRecord, ...] = field(default=(), hash=False)

    wants_norms = True

    def check(self, workers: int) -> None:
        """Any number will do."""

    def target(self, step: OpenStep) -> int:
        """N, or as many as can still be had."""
        n = self.start(step.workers) if self.n is None else self.n
        return min(n, step.reachable)

    def after(self, record: StepRecord) -> Rule:
        """Choose again after every step."""
        known = replace(self, recent=(*self.recent, record)[-WINDOW:], first=self.first or record)
        return replace(known, n=known.choose(record.alive))

    def start(self, workers: int) -> int:
        """The first N."""
        return workers

    def choose(self, workers: int) -> int:
        """The next N."""
        raise NotImplementedError

    def __str__(self) -> str:
        return type(self).__name__


@dataclass(frozen=True)
class DBW(Rule):
    """The greatest expected decrease of the loss a second, bounded from its smoothness.

    C. Xu, G. Neglia, N. Sebastianelli, "Dynamic backup workers for parallel machine learning"
    (arXiv:2004.14696): the gain of k is (η − Lη²/2)‖∇F‖² − Lη²/2·V/k, with L from the losses of the
    last steps, which are exact here, and η as it is; its time the mean k-th smallest of the last
    steps' times, late ones too.
    """

    rate: Rate = RATES["constant"][0]

    def choose(self, workers: int) -> int:
        """The best gain a second; all workers if none gains."""
        pairs = list(itertools.pairwise(self.recent))
        estimates = [estimate for record in self.recent if (estimate := moments(record))]
        if len(pairs) < 4 or not estimates:
            return workers
        variance, square = (statistics.fmean(values) for values in zip(*estimates, strict=True))
        rate = self.rate(self.recent[-1].step)
        change = statistics.fmean(loss(b) - loss(a) for a, b in pairs)
        mean_square = statistics.fmean(record.norms[1] for record in self.recent if record.norms)
        bend = max((change + rate * max(square, 0.0)) / mean_square, 0.0)  # Lη²/2
        table = Turnarounds(self.recent, workers).table(self.recent[0].step, len(self.recent))
        times_s = np.sort(np.array(table), axis=1).mean(axis=0)
        gains = {k: (rate - bend) * square - bend * variance / k for k in range((workers + 1) // 2, workers + 1)}
        if max(gains.values()) <= 0:
            return workers
        return max(gains, key=lambda k: gains[k] / times_s[k - 1])


class AdaSync(Rule):
    """Start with the fewest, and grow as the loss falls: N_0·√(F_0/F_t).

    S. Dutta, J. Wang, G. Joshi, "Slow and stale gradients can win the race: error-runtime trade-offs
    in distributed SGD" and its adaptive rule AdaSync (arXiv:2003.10579).
    """

    def start(self, workers: int) -> int:
        """As few as may be."""
        return (workers + 1) // 2

    def choose(self, workers: int) -> int:
        """In proportion to the root of what was won."""
        assert self.first is not None
        now = statistics.fmean(loss(record) for record in self.recent[-4:])
        grown = self.start(workers) * math.sqrt(max(loss(self.first), 0.0) / max(now, 1e-12))
        return min(workers, max(self.start(workers), round(grown)))


def loss(record: StepRecord) -> float:
    """Return the mean loss of the accepted gradients."""
    return statistics.fmean(one.loss for one in record.arrivals if one.verdict == "accepted" and one.loss is not None)


# -- regimes ---------------------------------------------------------------------------------------


Phase = Callable[[np.random.Generator, int], Array]


def light(random: np.random.Generator, steps: int) -> Array:
    """Steps of a real trace, drawn whole: sequence imbalance, independent over ranks and time."""
    trace = np.loadtxt(TRACE, delimiter=",")
    return trace[random.integers(len(trace), size=steps)]


def persistent(random: np.random.Generator, steps: int, slow: Sequence[int] = (0,)) -> Array:
    """Some of 16 workers 2.36 times slower throughout."""
    times_s = random.lognormal(0.0, 0.03, (steps, 16))
    times_s[:, list(slow)] *= 2.36
    return times_s


def none(random: np.random.Generator, steps: int, median_s: float = 1.0) -> Array:
    """Sixteen alike to 1 %."""
    return random.lognormal(math.log(median_s), 0.01, (steps, 16))


def heavy(random: np.random.Generator, steps: int, workers: int = 100) -> Array:
    """The clustered heavy tails that fit the straggler study of arXiv:1604.00981."""
    return chen2016().sample(random, steps, workers)


def exponential(random: np.random.Generator, steps: int) -> Array:
    """Eight workers, a shift and an exponential tail."""
    return 1.0 + random.exponential(0.3, (steps, 8))


def pareto(random: np.random.Generator, steps: int) -> Array:
    """Twelve independent workers with a heavy tail."""
    return 1.0 + random.pareto(2.5, (steps, 12))


def cloud(random: np.random.Generator, steps: int) -> Array:
    """24 workers with the mean, deviation and range of ResNet-50's steps in a cloud (eager-SGD, PPoPP'20)."""
    sigma = math.sqrt(math.log1p((0.116 / 0.454) ** 2))
    return np.clip(random.lognormal(math.log(0.454) - sigma**2 / 2, sigma, (steps, 24)), 0.399, 1.892)


def unequal(random: np.random.Generator, steps: int, workers: int = 20) -> Array:
    """Machines of different speed, none of which stands out."""
    return np.linspace(0.8, 1.3, workers) * random.lognormal(0.0, 0.05, (steps, workers))


def stretches(random: np.random.Generator, steps: int) -> Array:
    """Sixteen workers, of which four, others each time, are twice as slow for 40 steps."""
    times_s = random.lognormal(0.0, 0.05, (steps, 16))
    for first in range(0, steps, 40):
        times_s[first : first + 40, random.permutation(16)[:4]] *= 2.0
    return times_s


def gradual(random: np.random.Generator, steps: int) -> Array:
    """One of 16 becomes slower all the time."""
    times_s = random.lognormal(0.0, 0.03, (steps, 16))
    times_s[:, 0] *= np.linspace(1.0, 3.0, steps)
    return times_s


four = functools.partial(persistent, slow=range(4))
heavy16 = functools.partial(heavy, workers=16)
slower = functools.partial(none, median_s=1.45)
REGIMES: dict[str, tuple[Phase, ...]] = {
    "light": (light,), "persistent": (persistent,), "none": (none,), "heavy": (heavy,),
    "none > persistent": (none, persistent), "none > 4 persistent": (none, four), "none > heavy": (slower, heavy16),
    "persistent > none": (persistent, none),
}  # fmt: skip
HELD_OUT: dict[str, tuple[Phase, ...]] = {
    "exponential": (exponential,), "pareto": (pareto,), "cloud": (cloud,), "unequal": (unequal,),
    "stretches": (stretches,), "gradual": (gradual,), "heavy > none": (heavy16, slower),
    "pareto > unequal": (pareto, functools.partial(unequal, workers=12)),
    "persistent > another": (persistent, functools.partial(persistent, slow=(5,))),
}  # fmt: skip


def drawn(phases: tuple[Phase, ...], seed: int, change: int, steps: int) -> Array:
    """Return seconds of compute, (steps, workers); a second phase begins at the change."""
    random = np.random.default_rng(seed)
    if len(phases) == 1:
        return phases[0](random, steps)
    return np.concatenate([phases[0](random, change), phases[1](random, steps - change)])


# -- what static numbers do, all at once -----------------------------------------------------------


def schedules(workers: int, steps: int, change: int | None) -> Array:
    """Return N by schedule and step: every static b up to half of the workers, then pairs about a change."""
    backups = list(range(workers // 2 + 1))
    static = [[workers - b] * steps for b in backups]
    if change is None:
        return np.array(static)
    pairs = itertools.product(backups, backups)
    return np.array(static + [[workers - a] * change + [workers - b] * (steps - change) for a, b in pairs if a != b])


def published_s(times_s: Array, accepted: Array) -> Array:
    """Return when each step of each schedule is done; a late worker finishes what it began."""
    now_s, free_s = np.zeros((len(accepted), 1)), np.zeros((len(accepted), times_s.shape[1]))
    done_s = np.empty(accepted.shape)
    for step, row in enumerate(times_s):
        arrived_s = np.maximum(free_s, now_s) + row
        now_s = np.take_along_axis(np.sort(arrived_s, axis=1), accepted[:, step, None] - 1, axis=1)
        np.copyto(free_s, arrived_s, where=free_s <= now_s)
        done_s[:, step] = now_s[:, 0]
    return done_s


class Expected:
    """The error of a quadratic that is expected given the N of each step, for one schedule or many."""

    def __init__(self, problem: Quadratic, noise: float, rate: Rate) -> None:
        self.problem, self.rate, self.steps = problem, rate, 0
        self.variance = noise**2 / DIMENSION
        self.squares = problem.start**2

    def step(self, accepted: float | Array) -> Array:
        """Take a step; E θ² ← (1 − ηλ)² E θ² + η²σ²/N in each direction."""
        rate, curvature = self.rate(self.steps), self.problem.curvature
        self.steps += 1
        noise = rate**2 * self.variance / np.asarray(accepted, float)
        self.squares = (1 - rate * curvature) ** 2 * self.squares + noise[..., None]
        return 0.5 * (curvature * self.squares).sum(axis=-1)


def reached(accepted: Array, noise: float, rate: Rate) -> Array:
    """Return after how many steps each schedule is at the target; more than there are if never."""
    expected = Expected(Quadratic(DIMENSION), noise, rate)
    errors = np.stack([expected.step(row) for row in accepted.T])
    return np.where((errors <= TARGET).any(axis=0), (errors <= TARGET).argmax(axis=0) + 1, len(errors) + 1)


# -- with the noise scale given --------------------------------------------------------------------


def progress(accepted: Array, took_s: Array | float, noise_scale: float) -> Array:
    """Return progress a second: of N gradients N/(N + noise scale), or N where all is noise."""
    worth = accepted if math.isinf(noise_scale) else accepted / (accepted + noise_scale)
    return worth.sum(axis=-1) / took_s


def with_noise_given(phases: tuple[Phase, ...], noise_scale: float, seed: int) -> dict[str, float]:
    """Set Adaptive against every static b."""
    times_s = drawn(phases, seed, STEPS // 2, STEPS)
    workers = times_s.shape[1]
    static = schedules(workers, STEPS, None)
    paces = progress(static, published_s(times_s, static)[:, -1], noise_scale)
    records = list(simulate(Adaptive(noise_scale=noise_scale), times_s, steps=STEPS))
    accepted = np.array([len(record.accepted) for record in records])
    own = progress(accepted, records[-1].published_s, noise_scale)
    return {
        "best_b": int(paces.argmax()), "speed": float(own / paces.max()), "b0": float(paces[0] / paces.max()),
        "mean_b": float(workers - accepted.mean()), "changes": int(np.count_nonzero(np.diff(accepted))),
    }  # fmt: skip


# -- in training -----------------------------------------------------------------------------------


class Training:
    """A quadratic on which a simulation trains; noise is drawn for all workers of a step at once."""

    def __init__(self, workers: int, noise: float, rate: Rate, seed: int) -> None:
        self.problem, self.rate = Quadratic(DIMENSION), rate
        self.expected, self.expected_error = Expected(self.problem, noise, rate), 1.0
        self.parameters = self.problem.start
        self.errors = [1.0]
        self._random, self._shape = np.random.default_rng([seed, 1]), (workers, DIMENSION)
        self._sigma, self._accepted = noise / math.sqrt(DIMENSION), 0
        self._draw()

    def _draw(self) -> None:
        noise = self._sigma * self._random.standard_normal(self._shape)
        self._gradients = self.problem.curvature * self.parameters + noise

    def gradient(self, parameters: Array, worker: int, sequence: int) -> Array:
        """Return the worker's gradient at the newest parameters: what is accepted is of these."""
        self._accepted += 1
        return self._gradients[worker]

    def update(self, mean: Array) -> None:
        """Take a step, and forget who was in it."""
        self.parameters = self.parameters - self.rate(len(self.errors) - 1) * mean
        self.errors.append(self.problem.error(self.parameters))
        self.expected_error = float(self.expected.step(self._accepted))
        self._accepted = 0
        self._draw()


def trained(policy: Policy, times_s: Array, noise: float, rate: Rate, seed: int) -> float:
    """Return the seconds to the target; infinity if it was not reached."""
    training = Training(times_s.shape[1], noise, rate, seed)
    for record in simulate(policy, times_s, steps=len(times_s), learner=training):
        if training.expected_error <= TARGET:
            return record.published_s
    return math.inf


def in_training(phases: tuple[Phase, ...], rate_name: str, seeds: range) -> dict[str, Any]:
    """Set the rules against every static b; the change is half-way of what all workers would need."""
    rate, noise = RATES[rate_name]
    workers = drawn(phases, 0, 1, 2).shape[1]
    noise *= math.sqrt(workers / 16)
    needed = int(reached(np.full((1, 5000), workers), noise, rate)[0])
    change, steps = needed // 2, 3 * needed
    accepted = schedules(workers, steps, change if len(phases) > 1 else None)
    counts, statics = reached(accepted, noise, rate), workers // 2 + 1
    static_s = []
    times: dict[str, list[float]] = {"Adaptive": [], "DBW": [], "AdaSync": []}
    for seed in seeds:
        times_s = drawn(phases, seed, change, steps)
        done_s = np.pad(published_s(times_s, accepted), ((0, 0), (0, 1)), constant_values=math.inf)
        static_s.append(done_s[np.arange(len(accepted)), counts - 1])
        for policy in (Adaptive(), DBW(rate=rate), AdaSync()):
            times[type(policy).__name__].append(trained(policy, times_s, noise, rate, seed))
    every_s = np.array(static_s)
    best = int(every_s[:, :statics].mean(axis=0).argmin())
    best_s = every_s[:, best]
    speeds = {name: best_s / np.array(each) for name, each in times.items()}
    found: dict[str, Any] = {
        "steps": needed, "best_b": best, "best_s": float(best_s.mean()),
        "b0": float((best_s / every_s[:, 0]).mean()), **{name: float(each.mean()) for name, each in speeds.items()},
        "Adaptive_se": float(speeds["Adaptive"].std(ddof=1) / math.sqrt(len(seeds))) if len(seeds) > 1 else None,
    }  # fmt: skip
    if len(phases) > 1:
        found["foresight"] = float((best_s / every_s[:, every_s.mean(axis=0).argmin()]).mean())
    return found


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Four digits after the point are more than is known."""
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}


def told(name: str, values: dict[str, Any]) -> str:
    """Return a line for people."""
    cells = (f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items())
    return f"{name:22} " + "  ".join(cells)


def main() -> None:
    """Compare in every regime."""
    about, more = str(__doc__).split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--out", help="append the JSON line to this file")
    asked = parser.parse_args()
    count, began = (1 if asked.quick else 3), time.perf_counter()
    seeds = range(FIRST_SEED, FIRST_SEED + count)
    result: dict[str, Any] = {"benchmark": "adaptive", "settings": {**vars(asked), "seeds": [*seeds]}}
    for group, regimes in (("regimes", REGIMES), ("held out", HELD_OUT)):
        result[group] = {"given": {}, **{name: {} for name in RATES}}
        for noise_scale, (name, phases) in itertools.product((10.0, 411.0, math.inf), regimes.items()):
            each = [with_noise_given(phases, noise_scale, seed) for seed in seeds]
            mean = rounded({key: statistics.fmean(one[key] for one in each) for key in each[0]})
            result[group]["given"].setdefault(name, {})[str(noise_scale)] = mean
            print(told(name, {"noise scale": str(noise_scale), **mean}), flush=True)
        for rate_name, (name, phases) in itertools.product(RATES, regimes.items()):
            found = rounded(in_training(phases, rate_name, seeds))
            result[group][rate_name][name] = found
            print(told(name, {"rate": rate_name, **found}), flush=True)
    result["took_s"] = round(time.perf_counter() - began, 1)
    line = json.dumps(result)
    if asked.out:
        with open(asked.out, "a") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
