"""One step against the collectives that average gradients elsewhere, alternating in one run.

The last rank is the root, the others are W workers; the collectives run among W ranks too, while the root sleeps.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from mpisync.commands.benching.bandwidth import bandwidth
from mpisync.commands.benching.contenders import Allreduce, Contender, Gloo, Ours, ReduceBcast
from mpisync.commands.benching.measuring import COLUMNS, gloo, machine, meet, report, summary, table, versions

_SMALL_BYTES, _LARGE_BYTES = 8 << 10, 1 << 20


def rounds(asked: argparse.Namespace, size_bytes: int) -> tuple[int, int, int]:
    """Return (rounds, rounds to skip, rounds at a time) for a size, OMB's way: fewer of the large."""
    if size_bytes <= _SMALL_BYTES:
        usual = (500, 100, 50)
    elif size_bytes <= _LARGE_BYTES:
        usual = (100, 20, 10)
    else:
        usual = (15, 2, 1)
    given = (asked.iterations, asked.skip, asked.burst)
    iterations, skip, burst = (u if g is None else g for u, g in zip(usual, given, strict=True))
    return iterations, skip, max(1, min(burst, iterations))


def contenders(
    asked: argparse.Namespace, comm: MPI.Intracomm, team: MPI.Intracomm | None, size: int, net: Any
) -> list[Contender]:
    """Make those that were asked for."""
    makers: dict[str, Callable[[], Contender]] = {
        "shared": lambda: Ours(comm, team, size, "shared", asked.optimizer),
        "messages": lambda: Ours(comm, team, size, "messages", asked.optimizer),
        "allreduce": lambda: Allreduce(comm, team, size),
        "reduce_bcast": lambda: ReduceBcast(comm, team, size),
        "gloo": lambda: Gloo(comm, team, size, net),
    }
    return [makers[name]() for name in asked.methods if name != "gloo" or net]


def visit(contender: Contender, count: int) -> list[float]:
    """Do some rounds of one contender while nobody does anything else."""
    meet(contender.comm)
    if contender.team is None:
        contender.serve(count)
        return []
    contender.team.Barrier()
    return contender.work(count)


def agree(contender: Contender, *, whole: bool) -> None:
    """Stop everything if a worker has a wrong result. Collective."""
    right = contender.team is None or contender.is_right(whole)
    if not contender.comm.allreduce(right, MPI.LAND):
        if not right:
            print(f"rank {contender.comm.rank}: {contender.name} gave a wrong result", flush=True)
        contender.comm.Barrier()
        contender.comm.Abort(1)


def measure(
    asked: argparse.Namespace, comm: MPI.Intracomm, team: MPI.Intracomm | None, size_bytes: int, net: Any
) -> dict[str, Any]:
    """Let the contenders alternate at one size; the times of each, which count on rank 0."""
    iterations, skip, burst = rounds(asked, size_bytes)
    running = contenders(asked, comm, team, max(1, size_bytes // 4), net)
    for contender in running:
        visit(contender, max(1, skip))
        agree(contender, whole=True)
    times: dict[str, list[float]] = {contender.name: [] for contender in running}
    for _ in range(-(-iterations // burst)):
        for contender in running:
            mine = np.array(visit(contender, burst) or [0.0] * burst)
            slowest = np.zeros(burst)
            meet(comm)
            comm.Reduce(mine, slowest, MPI.MAX, root=0)
            times[contender.name] += slowest.tolist()
            agree(contender, whole=False)
    for contender in running:
        agree(contender, whole=True)
    parts = {c.name: c.spent_s for c in running if isinstance(c, Ours) and team is None}
    parts = comm.bcast(parts, root=comm.size - 1)
    for contender in running:
        contender.close()
    found: dict[str, Any] = {name: summary(each) for name, each in times.items()}
    for name, each in parts.items():
        found[name]["root"] = {
            part: round(1e3 * statistics.median(spent_s), 4) for part, spent_s in each.items() if spent_s
        }
    return found


# -- the report ------------------------------------------------------------------------------------


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Return ours against the collectives, by their medians."""
    against = {
        "shared/allreduce": ("mpisync shared", "MPI_Allreduce"),
        "shared/gloo": ("mpisync shared", "gloo all_reduce"),
        "messages/reduce_bcast": ("mpisync messages", "Reduce+Bcast"),
    }
    return {
        name: round(found[ours]["p50"] / found[theirs]["p50"], 4)
        for name, (ours, theirs) in against.items()
        if ours in found and theirs in found
    }


def show(size_bytes: int, found: dict[str, Any], compared: dict[str, float]) -> None:
    """Print the table of one size."""
    rows = [[name, *(float(each[column]) for column in COLUMNS)] for name, each in found.items()]
    print(f"\n# {size_bytes} bytes, ms")
    print(table(["", *COLUMNS], rows))
    for name, each in found.items():
        if "root" in each:
            print(f"  {name}, at the root: {each['root']}")
    print("  " + "  ".join(f"{name} {value:.3f}" for name, value in compared.items()), flush=True)


def compare(asked: argparse.Namespace, comm: MPI.Intracomm) -> None:
    """Measure every size, then the kernel, and print the tables and the line of JSON. Collective.

    Args:
        asked: The options of `mpisync bench`.
        comm: The ranks; the last one is the root.
    """
    if comm.size < 3:
        raise ValueError(f"the comparison needs two workers and a root at least, and this is {comm.size} of 3 ranks")
    is_root = comm.rank == comm.size - 1
    split = comm.Split(MPI.UNDEFINED if is_root else 0, comm.rank)
    team = split if isinstance(split, MPI.Intracomm) and not is_root else None
    about = machine()
    wanted = "gloo" in asked.methods
    net = gloo(team) if wanted and team is not None else None
    has_gloo = comm.bcast(net is not None, root=0)
    sizes = asked.sizes or [1 << power for power in range(40) if asked.min <= 1 << power <= asked.max]
    results = {}
    for size_bytes in sizes:
        found = measure(asked, comm, team, size_bytes, net or has_gloo)
        if comm.rank == 0:
            compared = ratios(found)
            results[size_bytes] = {"ms": found, "ratios": compared}
            show(size_bytes, found, compared)
    kernel = bandwidth(min(about["cores"], 8)) if is_root and not asked.no_kernel else None
    meet(comm, 1e-2)
    kernel = comm.bcast(kernel, root=comm.size - 1)
    if net is not None:
        net.destroy_process_group()
    if comm.rank == 0:
        print(f"\n# the kernel beside NumPy's copy and add: {kernel}")
        report(
            {
                "benchmark": "collective", "machine": about, "versions": versions(),
                "settings": settings(asked, comm.size - 1), "sizes": results, "kernel": kernel,
            },
            asked.out,
        )  # fmt: skip


def settings(asked: argparse.Namespace, workers: int) -> dict[str, Any]:
    """Return what was asked for, without what a command line adds for itself."""
    names = ("min", "max", "sizes", "iterations", "skip", "burst", "methods", "optimizer", "no_kernel", "out")
    return {"workers": workers, "backup": 0, **{name: getattr(asked, name) for name in names}}
