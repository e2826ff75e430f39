"""One step against the collectives that average gradients elsewhere, alternating in one run.

    mpisync run -n 5 benchmarks/collective.py                       sizes as OMB has them
    mpisync run -n 5 benchmarks/collective.py --sizes 1024 100000000
    mpirun -n 5 python benchmarks/collective.py ...                 the same

The last rank is the root, the others are W workers; the collectives run among W ranks too, while
the root sleeps. A round of ours begins when a worker hands over the gradient in its slot and ends
when the new parameters are visible to it, the optimizer's update included; a collective's is its
call, without any update. A round takes as long as its slowest rank. Contenders alternate, after a
barrier asleep, with --burst rounds at a time. A wrong result ends the run with exit code 1. The last
line is one JSON document with the settings, the machine and all numbers, in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from contenders import Allreduce, Contender, Gloo, Ours, ReduceBcast
from measuring import COLUMNS, gloo, machine, meet, report, summary, table, versions
from mpi4py import MPI

from mpisync.kernels.dtypes import DTYPES
from mpisync.kernels.fold import Reducer, warm

METHODS = ("shared", "messages", "allreduce", "reduce_bcast", "gloo")
_SMALL_BYTES, _LARGE_BYTES = 8 << 10, 1 << 20
_KERNEL_ELEMENTS = 25_000_000


def options() -> argparse.Namespace:
    """Read the command line."""
    about, more = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--min", type=int, default=4, help="smallest message in bytes")
    parser.add_argument("--max", type=int, default=1 << 20, help="largest; sizes double between")
    parser.add_argument("--sizes", type=int, nargs="+", help="these sizes in bytes instead")
    parser.add_argument("--iterations", type=int, help="rounds measured at each size")
    parser.add_argument("--skip", type=int, help="rounds before them, to warm up")
    parser.add_argument("--burst", type=int, help="rounds of one contender at a time")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    parser.add_argument("--no-kernel", action="store_true", help="leave the kernel's bandwidth out")
    parser.add_argument("--out", help="append the JSON line to this file")
    return parser.parse_args()


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


# -- the kernel beside the machine -----------------------------------------------------------------


def on_threads(action: Callable[[slice], object], elements: int, threads: int) -> None:
    """Run `action` on equal parts, a thread each."""
    edges = np.linspace(0, elements, threads + 1).astype(int)
    parts = [slice(*edge) for edge in zip(edges, edges[1:], strict=False)]
    helpers = [threading.Thread(target=action, args=(part,)) for part in parts[1:]]
    for helper in helpers:
        helper.start()
    action(parts[0])
    for helper in helpers:
        helper.join()


def kernel(threads: int) -> dict[str, Any]:
    """Measure bytes read and written a second: folding four gradients, NumPy's copy, its add."""
    gradients = [np.ones(_KERNEL_ELEMENTS, np.float32) for _ in range(4)]
    target = np.ones(_KERNEL_ELEMENTS, np.float32)
    a, b = gradients[:2]
    warm(["float32"])
    found: dict[str, list[float]] = {"fold": [], "copy": [], "add": []}
    with Reducer(threads) as reducer:
        actions: dict[str, tuple[int, Callable[[], Any]]] = {
            "fold": (
                5,
                lambda: reducer.fold(target, gradients, DTYPES["float32"], start=True, divisor=4.0),
            ),
            "copy": (
                2,
                lambda: on_threads(lambda p: np.copyto(target[p], a[p]), a.size, threads),
            ),
            "add": (
                3,
                lambda: on_threads(lambda p: np.add(a[p], b[p], out=target[p]), a.size, threads),
            ),
        }
        for _ in range(9):
            for name, (arrays, action) in actions.items():
                begin = time.perf_counter()
                action()
                found[name].append(arrays * a.nbytes / (time.perf_counter() - begin) / 1e9)
    middle = {name: round(statistics.median(each), 2) for name, each in found.items()}
    own = max(middle["copy"], middle["add"])
    return {"threads": threads, "GB_per_s": middle, "fold_of_own": round(middle["fold"] / own, 3)}


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


def main() -> None:
    """Measure every size, then the kernel."""
    asked, comm = options(), MPI.COMM_WORLD
    if comm.size < 3:
        raise SystemExit("two workers and a root at least: mpisync run -n 3 benchmarks/collective.py")
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
    bandwidth = None
    if is_root and not asked.no_kernel:
        bandwidth = kernel(about["cores"] if about["cores"] < 8 else 8)
    meet(comm, 1e-2)
    bandwidth = comm.bcast(bandwidth, root=comm.size - 1)
    if net is not None:
        net.destroy_process_group()
    if comm.rank == 0:
        print(f"\n# the kernel beside NumPy's copy and add: {bandwidth}")
        settings = {"workers": comm.size - 1, "backup": 0, **vars(asked)}
        report(
            {
                "benchmark": "collective", "machine": about, "versions": versions(),
                "settings": settings, "sizes": results, "kernel": bandwidth,
            },
            asked.out,
        )  # fmt: skip


if __name__ == "__main__":
    main()
