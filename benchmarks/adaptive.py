"""Adaptive against every number of backup workers and against rules after DBW and AdaSync, simulated.

    python benchmarks/adaptive.py            about five minutes on a core of its own
    python benchmarks/adaptive.py --quick    fewer steps and seeds

Regimes: `light`, 32 workers with a real trace's light tails; `persistent`, one of 16 is 2.36 times
slower; `none`, 16 alike; `heavy`, 100 with the clustered heavy tails of the paper's straggler study;
and changes from one to another half-way. First with the noise scale given: progress a second, where
a step of N gradients progresses by N/(N + noise scale), against the best static b. Then everything
is measured in training on a noisy quadratic: seconds to a fiftieth of the first error, the median over
seeds. Every rule keeps N within the same bounds, half of the workers and all. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mpisync.planning.learning import Descent, Quadratic
from mpisync.planning.scale import backup_step_times
from mpisync.planning.simulation import simulate
from mpisync.policies import Adaptive, BackupWorkers, OpenStep, Policy, StepRecord
from mpisync.policies.backup import FirstN
from mpisync.policies.durations import Turnarounds

TRACE = Path(__file__).parent.parent / "tests/data/bytedance_SE_dp_compute_seconds_42x32.csv"
RATE, NOISE, TARGET = 0.1, 2.0, 0.01  # noise of one gradient among 16 workers, and in proportion among more
WINDOW = 16  # steps that the rules of others look back on
ROWS = 240  # of compute times in training, somewhat more than it takes; then they repeat


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


class DBW(Rule):
    """The greatest expected decrease of the loss a second, bounded from its smoothness.

    C. Xu, G. Neglia, N. Sebastianelli, "Dynamic backup workers for parallel machine learning"
    (arXiv:2004.14696): the gain of k is (η − Lη²/2)‖∇F‖² − Lη²/2·V/k, with L from the losses of the
    last steps; its time here the mean k-th smallest of the last steps' times, late ones too.
    """

    def choose(self, workers: int) -> int:
        """The best gain a second; all workers if none gains."""
        pairs = list(itertools.pairwise(self.recent))
        estimates = [estimate for record in self.recent if (estimate := moments(record))]
        if len(pairs) < 4 or not estimates:
            return workers
        square, variance = (statistics.fmean(values) for values in zip(*estimates, strict=True))
        change = statistics.fmean(loss(b) - loss(a) for a, b in pairs)
        mean_square = statistics.fmean(record.norms[1] for record in self.recent if record.norms)
        bend = max((change + RATE * max(square, 0.0)) / mean_square, 0.0)  # Lη²/2
        table = Turnarounds(self.recent, workers).table(self.recent[0].step, len(self.recent))
        times_s = np.sort(np.array(table), axis=1).mean(axis=0)
        gains = {k: (RATE - bend) * square - bend * variance / k for k in range((workers + 1) // 2, workers + 1)}
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


def moments(record: StepRecord) -> tuple[float, float] | None:
    """Return estimates of ‖∇F‖² and of a gradient's variance."""
    k = len(record.accepted)
    if record.norms is None or k < 2:
        return None
    variance = (record.norms[0] - k * record.norms[1]) / (k - 1)
    return record.norms[1] - variance / k, variance


# -- regimes ---------------------------------------------------------------------------------------


def light(random: np.random.Generator, steps: int) -> np.ndarray:
    """Steps of a real trace, drawn whole: sequence imbalance, independent over ranks and time."""
    trace = np.loadtxt(TRACE, delimiter=",")
    return trace[random.integers(len(trace), size=steps)]


def persistent(random: np.random.Generator, steps: int, slow: int = 1) -> np.ndarray:
    """One of 16 workers, or more, 2.36 times slower throughout."""
    times_s = random.lognormal(0.0, 0.03, (steps, 16))
    times_s[:, :slow] *= 2.36
    return times_s


def none(random: np.random.Generator, steps: int) -> np.ndarray:
    """Sixteen alike to 1 %."""
    return random.lognormal(0.0, 0.01, (steps, 16))


def heavy(random: np.random.Generator, steps: int, workers: int = 100) -> np.ndarray:
    """The clustered heavy tails that fit the straggler study of arXiv:1604.00981."""
    slow = random.beta(3.098, 209.5, (steps, 1))
    body = np.minimum(1.45 * random.lognormal(0.0, 0.09, (steps, workers)), 2.0)
    tail = 2.0 * (1.0 + random.pareto(2.26, (steps, workers)))
    return np.where(random.random((steps, workers)) < slow, tail, body)


def then(first: Callable[..., np.ndarray], second: Callable[..., np.ndarray], **more: int) -> Any:
    """One regime, then another."""
    return lambda random, steps: np.concatenate([first(random, steps // 2), second(random, steps // 2, **more)])


REGIMES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "light": light, "persistent": persistent, "none": none, "heavy": heavy,
    "none > persistent": then(none, persistent), "none > 4 persistent": then(none, persistent, slow=4),
    "none > heavy": then(none, heavy, workers=16), "persistent > none": then(persistent, none),
}  # fmt: skip


# -- the comparison --------------------------------------------------------------------------------


def progress(accepted: np.ndarray, took_s: float, noise_scale: float) -> float:
    """Return progress a second: of N gradients N/(N + noise scale), or N where all is noise."""
    worth = accepted if math.isinf(noise_scale) else accepted / (accepted + noise_scale)
    return float(worth.sum() / took_s)


def with_noise_given(regime: str, noise_scale: float, steps: int, seed: int) -> dict[str, Any]:
    """Set Adaptive against every static b."""
    times_s = REGIMES[regime](np.random.default_rng(seed), steps)
    workers = times_s.shape[1]
    static = {}
    for b in range(workers // 2 + 1):
        took_s = float(backup_step_times(times_s, b).sum())
        static[b] = progress(np.full(len(times_s), workers - b), took_s, noise_scale)
    records = list(simulate(Adaptive(noise_scale=noise_scale), times_s, steps=len(times_s)))
    accepted = np.array([len(record.accepted) for record in records])
    best = max(static, key=lambda b: static[b])
    return {
        "regime": regime, "noise_scale": noise_scale, "seed": seed, "best_b": best,
        "adaptive_of_best": round(progress(accepted, records[-1].published_s, noise_scale) / static[best], 4),
        "b0_of_best": round(static[0] / static[best], 4), "mean_b": round(workers - accepted.mean(), 2),
        "changes": int(np.count_nonzero(np.diff(accepted))),
    }  # fmt: skip


def training(regime: str, policy: Policy, seed: int) -> float:
    """Return the seconds to the target, infinity if it was not reached."""
    times_s = REGIMES[regime](np.random.default_rng(seed), ROWS)
    descent = Descent(Quadratic(dimension=50, noise=NOISE * math.sqrt(times_s.shape[1] / 16)), RATE, seed)
    for record in simulate(policy, times_s, steps=4 * ROWS, learner=descent):
        if descent.errors[-1] <= TARGET:
            return record.published_s
    return math.inf


def trained(regime: str, seeds: range) -> dict[str, float | None]:
    """Return each policy's median seconds to the target."""
    workers = REGIMES[regime](np.random.default_rng(0), 2).shape[1]
    backups = [b for b in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 50) if b <= workers // 2]
    found: dict[str, float | None] = {}
    for policy in (*map(BackupWorkers, backups), Adaptive(), DBW(), AdaSync()):
        median_s = statistics.median(training(regime, policy, seed) for seed in seeds)
        found[str(policy)] = round(median_s, 2) if math.isfinite(median_s) else None
    return found


def main() -> None:
    """Compare in every regime."""
    about, more = str(__doc__).split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps and seeds")
    parser.add_argument("--out", help="append the JSON line to this file")
    asked = parser.parse_args()
    steps, seeds, runs = (300, range(2), range(4)) if asked.quick else (600, range(5), range(20))
    given = []
    for regime, noise_scale, seed in itertools.product(REGIMES, (10.0, 411.0, math.inf), seeds):
        given.append(with_noise_given(regime, noise_scale, steps, seed))
        print("  ".join(f"{name} {value}" for name, value in given[-1].items()), flush=True)
        given[-1]["noise_scale"] = str(noise_scale)
    trainings = {}
    for regime in REGIMES:
        trainings[regime] = trained(regime, runs)
        print(f"{regime}, seconds to the target: {trainings[regime]}", flush=True)
    worst = min(each["adaptive_of_best"] for each in given)
    settings = vars(asked) | {"steps": steps, "seeds": len(seeds), "runs": len(runs)}
    result = {"benchmark": "adaptive", "settings": settings}
    line = json.dumps({**result, "worst_of_best": worst, "given": given, "training_s": trainings})
    if asked.out:
        with open(asked.out, "a") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
