"""Check the planning against what it must reproduce: closed forms, the straggler study, the trace.

    python benchmarks/planning.py            about a minute on one core; no MPI

Closed forms and quadratures: 10^6 steps of every law at several (K, P), as a number of standard
errors of the Monte Carlo. The straggler study of Chen et al. under the calibrated law. The gains on
the trace in tests/data. Backup workers that finish late gradients against order statistics, in each
regime. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from mpisync.planning.advice import UNKNOWN_NOISE, advise
from mpisync.planning.choices import choices
from mpisync.planning.composite import Composite, chen2016
from mpisync.planning.efficiency import Efficiency, fit_iterations
from mpisync.planning.laws import Exponential, Independent, Lognormal, Pareto, Seconds, ShiftedExponential, Weibull
from mpisync.planning.observed import observe, read_times

LAWS = [
    Exponential(2.0), ShiftedExponential(1.0, 0.3), Pareto(0.5, 3.5), Lognormal(1.45, 0.09), Lognormal(1.0, 0.8),
    Weibull(1.0, 0.7), Weibull(2.0, 5.0),
]  # fmt: skip
PAIRS = {2: (1, 2), 4: (1, 3, 4), 10: (1, 5, 9, 10), 32: (16, 30, 31, 32), 100: (50, 90, 96, 98, 100)}
TRACE = Path(__file__).parents[1] / "tests/data/bytedance_SE_dp_compute_seconds_42x32.csv"
PAPER = fit_iterations([(50, 137.5e3), (100, 76.2e3)])


def closed_forms(
    law: Independent, workers: int, ks: tuple[int, ...], steps: int, seed: int
) -> list[tuple[int, float, float]]:
    """Return (K, E[T_(K:P)], deviation of the Monte Carlo in its standard errors)."""
    rng = np.random.default_rng([seed, workers])
    total, squares, done = np.zeros(workers), np.zeros(workers), 0
    while done < steps:
        drawn = np.sort(law.sample(rng, min(2_000_000 // workers, steps - done), workers), axis=1)
        total, squares, done = total + drawn.sum(axis=0), squares + (drawn**2).sum(axis=0), done + len(drawn)
    mean = total / steps
    error = np.sqrt((squares / steps - mean**2) / steps)
    exact = law.order_statistics_s(workers)
    return [(k, float(exact[k - 1]), float((mean[k - 1] - exact[k - 1]) / error[k - 1])) for k in ks]


def study(steps: int) -> dict[str, Any]:
    """Return what the calibrated law says of the paper's study."""
    times = chen2016().sample(np.random.default_rng(1), steps, 100)
    ordered = np.sort(times, axis=1)
    cost = {n: float(ordered[:, n - 1].mean() * PAPER.relative(n)) for n in range(80, 101)}
    least = min(cost.values())
    made = {name: choices(times[:4000], PAPER, late_stop=stop) for name, stop in (("stop", True), ("finish", False))}
    return {
        "P(98th < 2 s)": float((ordered[:, 97] < 2).mean()),
        "P(100th < 2 s)": float((ordered[:, 99] < 2).mean()),
        "mean_s": {k: round(float(ordered[:, k - 1].mean()), 3) for k in (1, 50, 90, 96, 97, 98, 99, 100)},
        "longest_s": float(times.max()),
        "best N": min(cost, key=lambda n: cost[n]),
        "cost of N, % above the best": {n: round((cost[n] / least - 1) * 100, 2) for n in range(88, 99)},
        "advised N": {name: one.best.accepted for name, one in made.items()},
        "gain": {name: round(one.best.gain, 3) for name, one in made.items()},
    }


def regimes() -> dict[str, tuple[Seconds, Efficiency]]:
    """Return times of each regime, with J(N)."""
    rng = np.random.default_rng(0)
    return {
        "none: equal workers": (Lognormal(0.4, 0.003).sample(rng, 200, 16), UNKNOWN_NOISE),
        "transient, light: the trace": (read_times(TRACE).times_s, UNKNOWN_NOISE),
        "persistent: one of 16 takes 2.36": (
            Composite(0.4, sigma=0.03, slow_workers=1, slow_factor=2.36).sample(rng, 200, 16), UNKNOWN_NOISE,
        ),
        "heavy, clustered: the study": (chen2016().sample(rng, 2000, 100), PAPER),
    }  # fmt: skip


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000, help="of each Monte Carlo")
    parser.add_argument("--out", help="append the JSON line to this file")
    asked = parser.parse_args()
    result: dict[str, Any] = {"steps": asked.steps, "closed_forms": {}}

    worst, count, began = 0.0, 0, time.perf_counter()
    print(f"E[T_(K:P)] in seconds (deviation of {asked.steps:,} steps of Monte Carlo, in standard errors)")
    for seed, law in enumerate(LAWS):
        for workers, ks in PAIRS.items():
            rows = closed_forms(law, workers, ks, asked.steps, seed)
            cells = "  ".join(f"K={k}: {exact:.4f} ({z:+.1f})" for k, exact, z in rows)
            print(f"{law!s:32} P={workers:<4} {cells}", flush=True)
            result["closed_forms"][f"{law} P={workers}"] = [[k, exact, round(z, 2)] for k, exact, z in rows]
            worst, count = max(worst, *(abs(z) for *_, z in rows)), count + len(rows)
    outside = sum(abs(z) > 1.96 for rows in result["closed_forms"].values() for *_, z in rows)
    print(f"largest of {count}: {worst:.2f}; outside 95 %: {outside} of {count}, {0.05 * count:.0f} expected")
    result |= {"worst": worst, "outside": outside, "count": count, "took_s": time.perf_counter() - began}

    print("\nThe straggler study")
    result["study"] = study(min(100_000, asked.steps))
    for name, value in result["study"].items():
        print(f"{name}: {value}")

    print("\nRegimes: advised b; the best if late gradients are finished, and if stopped")
    result["regimes"] = {}
    for name, (times, efficiency) in regimes().items():
        advice = advise(observe(times), efficiency)
        stopped = choices(times, efficiency, late_stop=True)
        assert advice.choices is not None
        best = advice.choices.best
        print(
            f"{name}: {advice.verdict}, b={advice.backup} of {times.shape[1]}; finished: b={best.backup} gains "
            f"{(best.gain - 1) * 100:.2f} % ({(best.low - 1) * 100:.1f} to {(best.high - 1) * 100:.1f}); stopped: "
            f"b={stopped.best.backup} gains {(stopped.best.gain - 1) * 100:.2f} %"
        )
        print(f"  {advice.headline}")
        result["regimes"][name] = {
            "verdict": advice.verdict, "advised": advice.backup, "finished": [best.backup, best.gain],
            "stopped": [stopped.best.backup, stopped.best.gain],
        }  # fmt: skip
    line = json.dumps(result, default=lambda x: x if math.isfinite(x) else str(x))
    if asked.out:
        with open(asked.out, "a") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
