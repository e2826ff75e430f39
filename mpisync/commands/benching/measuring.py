"""What the benchmarks share: the machine's description, quantiles, tables, and where results go."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

COLUMNS = ("avg", "p50", "p95", "p99")


def machine() -> dict[str, Any]:
    """Describe the machine this process runs on."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:  # not a Linux
        pass
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": model,
        "system": platform.platform(),
        "load_before": round(os.getloadavg()[0], 2),  # of whatever else runs here
    }


def versions() -> dict[str, str]:
    """Name the versions of everything that is measured."""
    found = {"python": platform.python_version(), "mpi": MPI.Get_library_version().split("\0")[0]}
    found["mpi"] = found["mpi"].splitlines()[0].split(",")[0]
    for package in ("mpisync", "mpi4py", "numpy", "numba", "torch"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def summary(times_s: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Return average and quantiles in milliseconds."""
    times_ms = np.asarray(times_s) * 1e3
    quantiles = np.percentile(times_ms, [50, 95, 99])
    values = (times_ms.mean(), *quantiles)
    return {column: round(float(x), 4) for column, x in zip(COLUMNS, values, strict=True)}


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lay out rows under their heads, numbers to the right."""
    cells = [list(head)] + [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def report(result: dict[str, Any], out: str | None) -> None:
    """Print the result as one line of JSON, the last, and append it to a file if one is named."""
    line = json.dumps(result)
    if out:
        with open(out, "a") as file:
            file.write(line + "\n")
    print(line, flush=True)


def meet(comm: MPI.Intracomm, nap_s: float = 1e-4) -> None:
    """Wait for all ranks asleep: whoever is not measured must leave the cores to those who are."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(nap_s)


def gloo(comm: MPI.Intracomm) -> Any | None:
    """Start torch.distributed with gloo over loopback among `comm`; None without torch. Collective."""
    distributed: Any = None
    if importlib.util.find_spec("torch"):
        import torch.distributed as distributed
    if not comm.allreduce(distributed is not None, MPI.LAND):
        return None
    port = 0
    if comm.rank == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    port = comm.bcast(port)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=comm.rank, world_size=comm.size)
    return distributed
