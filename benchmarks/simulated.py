"""Simulated against real: the same sleeps under every policy, and the time of a step in each.

    mpisync run -n 6 benchmarks/simulated.py                5 workers and the root
    mpisync run -n 6 benchmarks/simulated.py --only backup:1 async:k=1

A worker's computation is a sleep, so that cores are no part of what is measured; how long follows
from the worker and the number of its gradient: a lognormal body around --compute ms with rare slow
ones, and the last worker slower throughout. Each policy really runs, with those sleeps; what
messages and the root cost is taken from one run before, in which all sleep equally long, and the
simulation gets it, the sleeps and the policy. Then one worker becomes slower half-way, and Adaptive
is set against every number of backup workers by accepted gradients a second. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from typing import Any

import numpy as np
from mpi4py import MPI

from mpisync.commands.benching.measuring import machine, meet, report, table, versions
from mpisync.planning.calibration import costs_from_records
from mpisync.planning.costs import Costs
from mpisync.planning.simulation import simulate
from mpisync.policies import BackupWorkers, Policy, Replay, parse_policy
from mpisync.records import StepRecord
from mpisync.session.partial_reduce import PartialReduce

POLICIES = (
    "backup:0", "backup:1", "backup:2", "deadline:{2x}", "deadline:{x},at_least=3,grace={x/4}", "deadline:{2x},mads=4",
    "async:k=1", "async:k=3", "async:k=2,max_staleness=2", "async:k=3,max_staleness=0", "adaptive:noise_scale=inf",
    "replay",
)  # fmt: skip


def options() -> argparse.Namespace:
    """Read the command line."""
    about, more = str(__doc__).split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compute", type=float, default=40.0, help="a computation in ms")
    parser.add_argument("--slow", type=float, default=2.36, help="the last worker's, this many times as long")
    parser.add_argument("--steps", type=int, default=100, help="steps of each run")
    parser.add_argument("--elements", type=int, default=25_000, help="of float32 in a gradient")
    parser.add_argument("--only", nargs="+", help="these policies")
    parser.add_argument("--no-change", action="store_true", help="leave the change half-way out")
    parser.add_argument("--out", help="append the JSON line to this file")
    return parser.parse_args()


def sleeps(compute_s: float, workers: int, slow: float, seed: int = 0) -> np.ndarray:
    """Return seconds of sleep, (sequence, worker); they repeat."""
    random = np.random.default_rng(seed)
    times_s = compute_s * random.lognormal(0.0, 0.2, (1000, workers))
    times_s *= np.where(random.random(times_s.shape) < 0.03, 4.0, 1.0)
    times_s[:, -1] *= slow
    return times_s


def changing(compute_s: float, workers: int, slow: float, steps: int) -> np.ndarray:
    """Return sleeps that are alike at first; half-way the last worker becomes slower."""
    times_s = compute_s * np.random.default_rng(1).lognormal(0.0, 0.02, (steps, workers))
    times_s[steps // 2 :, -1] *= slow
    return times_s


def run(
    comm: MPI.Intracomm, policy: Policy, times_s: np.ndarray, asked: argparse.Namespace, steps: int, *, by_version: bool
) -> list[StepRecord]:
    """Really run; on the root the records. A sleep is that of the gradient's number, or of its version."""
    records: list[StepRecord] = []
    with PartialReduce(comm, like=np.zeros(asked.elements, np.float32), policy=policy) as reduction:
        if reduction.is_root:
            for step in reduction.serve(steps):
                reduction.parameters.flat[0] = step.step + 1  # the version
                records.append(step.publish(reduction.parameters))
        else:
            reduction.gradient[:] = 1.0
            sequence = 0
            while reduction.pull(reduction.parameters):
                row = int(reduction.parameters.flat[0]) if by_version else sequence
                time.sleep(times_s[row % len(times_s), comm.rank])
                reduction.push()
                sequence += 1
    return records


def mean_step_s(records: list[StepRecord]) -> float:
    """Return the time of a step, but for the first few."""
    skip = min(5, len(records) // 2)
    return (records[-1].published_s - records[skip].published_s) / (len(records) - 1 - skip)


def pace(records: list[StepRecord]) -> float:
    """Return accepted gradients a second."""
    return sum(len(record.accepted) for record in records) / (records[-1].published_s - records[0].opened_s)


def compare(asked: argparse.Namespace, comm: MPI.Intracomm, costs: Costs | None) -> dict[str, dict[str, float]]:
    """Run and simulate every policy."""
    is_root, workers = comm.rank == comm.size - 1, comm.size - 1
    compute_s = asked.compute * 1e-3
    times_s = sleeps(compute_s, workers, asked.slow)
    found: dict[str, dict[str, float]] = {}
    recorded: list[StepRecord] = []
    for form in asked.only or POLICIES:
        values = {"x": f"{compute_s:g}", "2x": f"{2 * compute_s:g}", "x/4": f"{compute_s / 4:g}"}
        for name, value in values.items():
            form = form.replace("{" + name + "}", value)
        if form == "replay":
            recorded = comm.bcast(recorded, root=comm.size - 1)
        policy = Replay(recorded) if form == "replay" else parse_policy(form)
        meet(comm, 1e-3)
        records = run(comm, policy, times_s, asked, asked.steps, by_version=False)
        if form == "backup:1":
            recorded = records
        if is_root and costs is not None:
            played = simulate(
                policy, lambda worker, sequence: float(times_s[sequence % len(times_s), worker]),
                workers=workers, steps=asked.steps, costs=costs,
            )  # fmt: skip
            real_s, simulated_s = mean_step_s(records), mean_step_s(list(played))
            found[form] = {
                "real_ms": round(1e3 * real_s, 3), "simulated_ms": round(1e3 * simulated_s, 3),
                "ratio": round(simulated_s / real_s, 4),
            }  # fmt: skip
            print(f"{form}: {found[form]}", flush=True)
    return found


def change(asked: argparse.Namespace, comm: MPI.Intracomm) -> dict[str, float]:
    """Let one worker become slower half-way; accepted gradients a second."""
    workers, steps = comm.size - 1, 2 * asked.steps
    times_s = changing(asked.compute * 1e-3, workers, asked.slow, steps)
    found = {}
    for policy in (*map(BackupWorkers, range((workers + 1) // 2)), parse_policy("adaptive:noise_scale=inf")):
        meet(comm, 1e-3)
        records = run(comm, policy, times_s, asked, steps, by_version=True)
        if records:
            found[str(policy)] = round(pace(records), 2)
            print(f"{policy}: {found[str(policy)]} gradients a second", flush=True)
            for record in records:
                if record.why and " instead of " in record.why:
                    print(f"  step {record.step}: {record.why}", flush=True)
    return found


def main() -> None:
    """Calibrate, compare, report."""
    asked, comm = options(), MPI.COMM_WORLD
    about, is_root, workers = machine(), comm.rank == comm.size - 1, comm.size - 1
    alike = asked.compute * 1e-3 * np.random.default_rng(2).uniform(0.9, 1.1, (1000, workers))
    records = run(comm, BackupWorkers(0), alike, asked, 50, by_version=False)
    costs = costs_from_records(records) if is_root else None
    if costs is not None:
        overshoot_s = [
            arrival.compute_s - alike[arrival.sequence, arrival.worker]
            for record in records
            for arrival in record.arrivals
            if arrival.compute_s is not None
        ]
        costs = dataclasses.replace(costs, wake_s=costs.wake_s + float(np.median(overshoot_s)) / 2)
        print(costs, flush=True)
    found = compare(asked, comm, costs)
    changed = {} if asked.no_change else change(asked, comm)
    if costs is not None:
        rows = [[name, *each.values()] for name, each in found.items()]
        print(table(["", "real ms", "simulated ms", "simulated/real"], rows))
        settings: dict[str, Any] = {"workers": workers, **vars(asked)}
        worst = max((abs(each["ratio"] - 1) for each in found.values()), default=0.0)
        result = {"benchmark": "simulated", "machine": about, "versions": versions(), "settings": settings}
        free = {name: value for name, value in dataclasses.asdict(costs).items() if value != math.inf}
        result |= {"costs": free, "policies": found, "worst": round(worst, 4)}
        report({**result, "gradients_per_s": changed}, asked.out)


if __name__ == "__main__":
    main()
