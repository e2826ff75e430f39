"""Step time against backup workers while one worker straggles, DDP on gloo beside it.

    mpisync run -n 6 benchmarks/straggler.py            5 workers and the root
    mpisync run -n 6 benchmarks/straggler.py --stop     the straggler is stopped by SIGSTOP instead

A worker's computation is a sleep of --compute ms with a little jitter, so that cores are no part of
what is measured; the straggler, the last worker, sleeps --slow times as long, or is stopped as the
measuring begins and continued after it. Step times are the root's, from one version to the next.
DDP is a linear model under DistributedDataParallel among the workers, with the same sleeps. Every
case runs with the straggler and, for comparison, without one: all workers there and equally fast.
"absent" leaves the straggler out altogether: the same N, one worker fewer. The last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import time
from typing import Any

import numpy as np
from mpi4py import MPI

from mpisync.commands.benching.measuring import COLUMNS, gloo, machine, meet, report, summary, table, versions
from mpisync.policies import BackupWorkers
from mpisync.session.partial_reduce import PartialReduce


def options() -> argparse.Namespace:
    """Read the command line."""
    about, more = str(__doc__).split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compute", type=float, default=20.0, help="a computation in ms")
    parser.add_argument("--slow", type=float, default=20.0, help="the straggler's, this many times as long")
    parser.add_argument("--stop", action="store_true", help="stop the straggler instead")
    parser.add_argument("--backups", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60, help="steps measured in each case")
    parser.add_argument("--skip", type=int, default=5, help="steps before them")
    parser.add_argument("--elements", type=int, default=250_000, help="of float32 in a gradient")
    parser.add_argument("--no-ddp", action="store_true", help="leave DDP out")
    parser.add_argument("--out", help="append the JSON line to this file")
    return parser.parse_args()


class Delay:
    """A worker's sleeps."""

    def __init__(self, asked: argparse.Namespace, rank: int, *, straggles: bool) -> None:
        factor = asked.slow if straggles and not asked.stop else 1.0
        self._sleep_s, self._chance = factor * asked.compute * 1e-3, random.Random(rank)

    def sleep(self) -> None:
        """Compute, so to speak."""
        time.sleep(self._sleep_s * self._chance.uniform(0.98, 1.02))


def ours(asked: argparse.Namespace, comm: MPI.Intracomm, backup: int, *, straggler: bool) -> list[float]:
    """Train with backup workers; on the root the time of every step in seconds."""
    last = comm.size - 2
    pid = comm.bcast(os.getpid(), root=last)
    like = np.zeros(asked.elements, np.float32)
    policy = BackupWorkers(backup)
    published_s: list[float] = []
    with PartialReduce(comm, like=like, policy=policy) as reduction:
        if reduction.is_root:
            for step in reduction.serve(asked.steps + asked.skip):
                if straggler and asked.stop and step.step == asked.skip:
                    os.kill(pid, signal.SIGSTOP)
                if straggler and asked.stop and step.step == asked.skip + asked.steps - 1:
                    os.kill(pid, signal.SIGCONT)  # or the end would wait for it
                reduction.parameters -= 0.125 * step.mean
                published_s.append(step.publish(reduction.parameters).published_s)
        else:
            delay = Delay(asked, comm.rank, straggles=straggler and comm.rank == last)
            reduction.gradient[:] = 1.0
            while reduction.pull(reduction.parameters):
                delay.sleep()
                reduction.push()
    return [float(x) for x in np.diff(published_s)[asked.skip :]]


def ddp(asked: argparse.Namespace, team: MPI.Intracomm, *, straggler: bool) -> list[float]:
    """Train a linear model under DDP; the time of every step on rank 0 in seconds."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(torch.nn.Linear(500, asked.elements // 500))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    batch = torch.ones(1, 500)
    delay = Delay(asked, team.rank, straggles=straggler and team.rank == team.size - 1)
    ended_s = []
    for _ in range(asked.skip + asked.steps):
        optimizer.zero_grad()
        loss = model(batch).mean()
        delay.sleep()
        loss.backward()
        optimizer.step()
        ended_s.append(time.perf_counter())
    return [float(x) for x in np.diff(ended_s)[asked.skip :]]


def main() -> None:
    """Run every case and compare."""
    asked, comm = options(), MPI.COMM_WORLD
    if comm.size < 4:
        raise SystemExit("three workers and a root at least: mpisync run -n 4 benchmarks/straggler.py")
    about, root = machine(), comm.size - 1
    workers = comm.size - 1
    without = comm.Split(int(comm.rank == root - 1), comm.rank)  # the straggler is alone in its own
    found: dict[str, dict[str, float]] = {}

    def note(name: str, times_s: list[float]) -> None:
        meet(comm, 1e-3)
        if comm.rank == root:
            found[name] = summary(times_s)
            print(f"{name}: {found[name]['p50']:.2f} ms", flush=True)

    for backup in asked.backups:
        note(f"b={backup}", ours(asked, comm, backup, straggler=False))
        if backup > 0:
            times_s: list[float] = []
            if comm.rank != root - 1 and isinstance(without, MPI.Intracomm):
                times_s = ours(asked, without, backup - 1, straggler=False)
            note(f"b={backup}, absent", times_s)
        if backup > 0 or not asked.stop:  # nobody waits for the stopped at b=0
            note(f"b={backup}, straggler", ours(asked, comm, backup, straggler=True))
    if not asked.no_ddp:
        compare_ddp(asked, comm, note)
    if comm.rank == root:
        print(table(["", *COLUMNS], [[name, *each.values()] for name, each in found.items()]))
        compared = {
            f"{name}/{base}": round(found[name]["p50"] / found[base]["p50"], 4)
            for name in found
            if name.endswith("straggler")
            for base in (name.split(",")[0], name.replace("straggler", "absent"))
            if base in found
        }
        print("  ".join(f"{name} {value:.3f}" for name, value in compared.items()))
        settings: dict[str, Any] = {"workers": workers, **vars(asked)}
        result = {"benchmark": "straggler", "machine": about, "versions": versions(), "settings": settings}
        report({**result, "ms": found, "ratios": compared}, asked.out)


def compare_ddp(asked: argparse.Namespace, comm: MPI.Intracomm, note: Any) -> None:
    """Run DDP among the workers while the root sleeps."""
    root = comm.size - 1
    split = comm.Split(MPI.UNDEFINED if comm.rank == root else 0, comm.rank)
    team = split if isinstance(split, MPI.Intracomm) and comm.rank != root else None
    net = gloo(team) if team is not None else None
    if not comm.bcast(net is not None, root=0):
        return
    for straggler in (False, True):
        if straggler and asked.stop:
            continue  # it waits as long as the worker is stopped
        times_s = ddp(asked, team, straggler=straggler) if team is not None else []
        meet(comm, 1e-3)
        note("DDP, straggler" if straggler else "DDP", comm.bcast(times_s, root=0))
    if net is not None:
        net.destroy_process_group()


if __name__ == "__main__":
    main()
