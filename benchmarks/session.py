"""A step of a 25M-parameter model, from forward to next forward: Session beside DDP on gloo.

    mpisync run -n 3 benchmarks/session.py          2 workers and the root; DDP with 2 ranks

The model is a stack of square linear layers on a small batch, so that moving gradients is what
costs. Both run SGD with as many training ranks, in turns in one run; whoever has no part sleeps. A
step's time is that of its slowest rank. A copy is counted for a model's worth of memory that a
worker's parameters or gradients occupy beside the memory it shares with the root. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch.nn.parallel import DistributedDataParallel

from mpisync.commands.benching.measuring import COLUMNS, gloo, machine, meet, report, summary, table, versions
from mpisync.policies import BackupWorkers
from mpisync.session.session import Session


def options() -> argparse.Namespace:
    """Read the command line."""
    about, more = str(__doc__).split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=2236, help="of a layer")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="steps of one at a time")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--skip", type=int, default=3, help="steps of every turn that are not counted")
    parser.add_argument("--out", help="append the JSON line to this file")
    return parser.parse_args()


def model_of(asked: argparse.Namespace) -> torch.nn.Module:
    """Make the model."""
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(asked.width, asked.width) for _ in range(asked.layers)))


def is_shared(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in memory that mpisync shares between processes."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "mpisync" in line:
            begin, end = (int(edge, 16) for edge in line.split(" ", 1)[0].split("-"))
            if begin <= tensor.data_ptr() < end:
                return True
    return False


def by_session(asked: argparse.Namespace, comm: MPI.Intracomm) -> tuple[list[float], dict[str, int]]:
    """Train by Session; the times between forwards on this worker, and the copies of both."""
    model = model_of(asked)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batches = [torch.randn(asked.batch, asked.width) for _ in range(16)]
    began_s, copies = [], {}
    with Session(comm, model, optimizer, policy=BackupWorkers(0)) as session:
        for x in session.batches(batches, steps=asked.skip + asked.steps + 1):
            began_s.append(time.perf_counter())
            loss = model(x).square().mean()
            loss.backward()
            first = next(model.parameters())
            if first.grad is not None:
                copies = {"parameters": int(not is_shared(first)), "gradients": int(not is_shared(first.grad))}
            session.step(loss)
    return [float(took_s) for took_s in np.diff(began_s)[asked.skip :]], copies


def by_ddp(asked: argparse.Namespace) -> list[float]:
    """Train under DDP; the times between forwards on this rank."""
    model = DistributedDataParallel(model_of(asked))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(asked.batch, asked.width)
    began_s = []
    for _ in range(asked.skip + asked.steps + 1):
        began_s.append(time.perf_counter())
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [float(took_s) for took_s in np.diff(began_s)[asked.skip :]]


def slowest(comm: MPI.Intracomm, mine: list[float], count: int) -> list[float]:
    """Return the slowest rank's time of every step, on rank 0."""
    meet(comm, 1e-3)
    times = np.zeros(count)
    comm.Reduce(np.array(mine or [0.0] * count), times, MPI.MAX, root=0)
    return [float(time_s) for time_s in times]


def main() -> None:
    """Take turns and compare."""
    asked, comm = options(), MPI.COMM_WORLD
    if comm.size < 2:
        raise SystemExit("a worker and a root at least: mpisync run -n 3 benchmarks/session.py")
    about = machine()
    is_root = comm.rank == comm.size - 1
    split = comm.Split(MPI.UNDEFINED if is_root else 0, comm.rank)
    if not is_root and isinstance(split, MPI.Intracomm):
        gloo(split)
    times: dict[str, list[float]] = {"Session": [], "DDP gloo": []}
    copies: dict[str, int] = {}
    for _ in range(asked.turns):
        meet(comm, 1e-3)
        mine, copies = by_session(asked, comm)
        times["Session"] += slowest(comm, mine, asked.steps)
        mine = [] if is_root else by_ddp(asked)
        times["DDP gloo"] += slowest(comm, mine, asked.steps)
    if comm.rank == 0:
        found: dict[str, dict[str, float]] = {name: summary(each) for name, each in times.items()}
        ratio = round(found["Session"]["p50"] / found["DDP gloo"]["p50"], 4)
        print(table(["", *COLUMNS], [[name, *each.values()] for name, each in found.items()]))
        print(f"Session/DDP {ratio:.3f}  extra copies {copies}")
        settings: dict[str, Any] = {"workers": comm.size - 1, **vars(asked)}
        result = {"benchmark": "session", "machine": about, "versions": versions(), "settings": settings}
        report({**result, "ms": found, "ratios": {"Session/DDP": ratio}, "extra_copies": copies}, asked.out)


if __name__ == "__main__":
    main()
