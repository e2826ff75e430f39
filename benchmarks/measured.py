"""Measure the mpisync that PYTHONPATH names: what benchmarks/paired.py runs, again and again.

    python benchmarks/measured.py fold
    mpisync run -n 5 benchmarks/measured.py step-1kb
    mpisync run -n 3 benchmarks/measured.py session

The last line is JSON: where the package lies, and medians in milliseconds. A measure uses names that last from
revision to revision, no others, so that two revisions are measured by the same code.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

import mpisync
from mpisync.kernels.dtypes import DTYPES
from mpisync.kernels.fold import Reducer

LR = 0.125


def fold(elements: int = 25_000_000, repeats: int = 30, skip: int = 3) -> dict[str, float]:
    """Fold four float32 gradients into their mean, on as many threads as there are cores."""
    gradients = [np.ones(elements, np.float32) for _ in range(4)]
    mean, times_s = np.ones(elements, np.float32), []
    with Reducer(min(len(os.sched_getaffinity(0)), 8)) as reducer:
        for _ in range(skip + repeats):
            began_s = time.perf_counter()
            reducer.fold(mean, gradients, DTYPES["float32"], start=True, divisor=4.0)
            times_s.append(time.perf_counter() - began_s)
    return {"fold": _median_ms(times_s[skip:])}


def step(name: str, elements: int, steps: int, skip: int) -> dict[str, float]:
    """Train float32 gradients that lie ready by SGD; the time from version to version, at the root."""
    os.environ["MPISYNC_TRANSPORT"] = "shared"
    published_s: list[float] = []
    like = np.zeros(elements, np.float32)
    with mpisync.PartialReduce(MPI.COMM_WORLD, like=like, policy=mpisync.BackupWorkers(0)) as reduction:
        if reduction.is_root:
            import torch  # workers start sooner without

            parameters = torch.from_numpy(reduction.parameters)
            for closed in reduction.serve(skip + steps + 1):
                parameters.add_(torch.from_numpy(closed.mean), alpha=-LR)
                published_s.append(closed.publish(reduction.parameters).published_s)
        else:
            reduction.gradient[:] = MPI.COMM_WORLD.rank + 1
            while reduction.pull(reduction.parameters):
                reduction.push()
    return {name: _median_ms(np.diff(published_s)[skip:])}


def train(name: str, model: Any, width: int, steps: int, skip: int) -> dict[str, float]:
    """Train a torch model by Session; the time from version to version, at the root."""
    import torch

    published_s: list[float] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batches = [torch.randn(4, width) for _ in range(16)]
    with mpisync.Session(
        MPI.COMM_WORLD, model, optimizer, policy=mpisync.BackupWorkers(0), progress=False,
        on_step=lambda record: published_s.append(record.published_s),
    ) as session:  # fmt: skip
        for x in session.batches(batches, steps=skip + steps + 1):
            loss = model(x).square().mean()
            loss.backward()
            session.step(loss)
    return {name: _median_ms(np.diff(published_s)[skip:])}


def session() -> dict[str, float]:
    """Train a small model, where what is done once a step counts, and one of 25M parameters, where bytes do."""
    import torch

    torch.manual_seed(0)
    small = torch.nn.Linear(20, 20)
    large = torch.nn.Sequential(*(torch.nn.Linear(2236, 2236) for _ in range(5)))
    return {
        **train("session-small", small, 20, steps=1000, skip=100),
        **train("session-25m", large, 2236, steps=15, skip=3),
    }


def _median_ms(times_s: Sequence[float] | np.ndarray) -> float:
    """Return the median in milliseconds; NaN on a rank that has measured nothing."""
    return round(1e3 * statistics.median(times_s), 5) if len(times_s) else float("nan")


MEASURES: dict[str, Callable[[], dict[str, float]]] = {
    "fold": fold,
    "step-100mb": lambda: step("step-100mb", 25_000_000, steps=20, skip=3),
    "step-1kb": lambda: step("step-1kb", 256, steps=2000, skip=200),
    "session": session,
}


def main() -> None:
    """Measure what the command line names; the last rank, the root, says what was found."""
    about, more = str(__doc__).split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measure", choices=MEASURES)
    found = MEASURES[parser.parse_args().measure]()
    if MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1:
        print(json.dumps({"file": mpisync.__file__, "ms": found}), flush=True)


if __name__ == "__main__":
    main()
