"""Measure one step against the collectives that average gradients elsewhere, on this machine.

  mpisync bench                                        four workers; sizes as the OSU benchmarks have them
  mpisync bench --sizes 1024 100000000 --workers 8
  mpirun -n 5 python -m mpisync bench ...              the same, on the ranks of this job
  mpisync bench --tensorflow PYTHON                    TensorFlow's SyncReplicasOptimizer beside ours instead

The last rank is the root, the others are W workers; the collectives run among W ranks too, while the root
sleeps. A round of ours begins when a worker hands over the gradient in its slot and ends when the new
parameters are visible to it, the optimizer's update included; a collective's is its call, without any
update. A round takes as long as its slowest rank. Contenders alternate, after a barrier asleep, with --burst
rounds at a time. A wrong result ends the run with exit code 1. The last line is one JSON document with the
settings, the machine and all numbers, in milliseconds.

With --tensorflow, TensorFlow (a parameter server and W workers, gRPC over loopback) and mpisync take turns, and a step
lasts from one version to the next: with all workers, with one of them as a backup, and with one that straggles besides.
Marks in the gradients show of which of them each update is the mean, so what became of every gradient is counted: used,
dropped, told. PYTHON is an interpreter that has tensorflow-cpu; 100 MB take some three minutes on two cores, meanwhile
TensorFlow's servers listen on all network interfaces, as they always do.
"""

from __future__ import annotations

import argparse
import os
import sys

from mpisync import launchers
from mpisync.commands.benching import cluster, marks

NAME = "bench"
METHODS = ("shared", "messages", "allreduce", "reduce_bcast", "gloo")
_WORKERS = 4
_MOST_BYTES = 4 << 31  # of numbers that take four each: MPI counts them in 32 bits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mpisync bench`."""
    parser.add_argument("--workers", type=int, help=f"workers to start, where no launcher did (default {_WORKERS})")
    parser.add_argument(
        "--tensorflow", metavar="PYTHON",
        help="compare with TensorFlow, which this interpreter has; takes --workers, --sizes (default 100000000), "
        "--iterations, --skip and --out",
    )  # fmt: skip
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare what the comparison itself takes."""
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


def main(options: argparse.Namespace) -> int:
    """Become `mpisync run` of this command; as a rank of its job, or of another launcher's, measure."""
    check(options)
    placed = launchers.placement()
    workers = placed.size - 1 if placed else _WORKERS if options.workers is None else options.workers
    if placed is None and workers < 2:
        raise ValueError(f"the comparison needs at least 2 workers, not {workers}")
    if options.tensorflow:
        check_tensorflow(options, workers)
    if placed is None:
        if options.tensorflow:  # ranks that are started already leave it to the first of them
            cluster.check_python(options.tensorflow)
        start = [sys.executable, "-m", "mpisync", "run", "-n", str(workers + 1), "-m", "mpisync", NAME]
        sys.stdout.flush()
        os.execv(sys.executable, [*start, *words(options)])
    from mpi4py import MPI

    from mpisync.commands.benching import collective, tensorflow
    from mpisync.transport.rendezvous import check_launcher

    check_launcher(MPI.COMM_WORLD)
    (tensorflow if options.tensorflow else collective).compare(options, MPI.COMM_WORLD)
    return 0


def check(options: argparse.Namespace) -> None:
    """Refuse what cannot be measured.

    Raises:
        ValueError: A number is too small, or there is no size between --min and --max.
    """
    for name, least in (("min", 1), ("iterations", 1), ("skip", 0), ("burst", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, not {value}")
    if options.sizes and min(options.sizes) < 1:
        raise ValueError(f"--sizes must be at least 1, not {min(options.sizes)}")
    if (largest := max(options.sizes or [options.max])) >= _MOST_BYTES:
        raise ValueError(
            f"sizes must be below {_MOST_BYTES} bytes, not {largest}: MPI's own sums, which it is compared with, take "
            "at most 2^31 - 1 numbers"
        )
    if not options.sizes and options.max < 1 << (options.min - 1).bit_length():
        raise ValueError(f"there is no power of two from --min {options.min} to --max {options.max}")


def check_tensorflow(options: argparse.Namespace, workers: int) -> None:
    """Refuse what the comparison with TensorFlow has no use for.

    Raises:
        ValueError: There is such an option, or a size too small for the marks.
    """
    used = ("--tensorflow", "--workers", "--sizes", "--iterations", "--skip", "--out")
    unused = [word for word in words(options) if word.startswith("--") and word not in used]
    if unused:
        raise ValueError(f"--tensorflow takes {', '.join(used[1:])} and not {unused[0]}")
    least_bytes = 4 * marks.count(workers)
    if options.sizes and min(options.sizes) < least_bytes:
        raise ValueError(
            f"--sizes must be at least {least_bytes} for the marks of {workers} workers, not {min(options.sizes)}"
        )


def words(options: argparse.Namespace) -> list[str]:
    """Return the comparison's options as they are typed."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    typed = []
    for name, default in vars(parser.parse_args([])).items():
        value, option = getattr(options, name), "--" + name.replace("_", "-")
        if value == default or name == "workers":  # the ranks know how many they are
            continue
        typed += [option, *(() if value is True else map(str, value) if isinstance(value, list) else (str(value),))]
    return typed
