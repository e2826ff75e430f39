"""Run as a program: start MPI and tell what came of it, together with what the other ranks were told.

Only rank 0 prints: one line of JSON, [[told, start], ...] in the order of ranks.
"""

import ctypes
import json
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

if __name__ == "__mp_main__":  # in processes that start anew, as scripts import it at their top
    from mpi4py import MPI  # noqa: F401

MARK = "mpisync-doctor:"
_CHILD_LIMIT_S = 15.0


def main() -> None:
    """Start MPI; sys.argv holds what to pass on (JSON with "addresses" of shared memory), and libmpi's path."""
    told, library = json.loads(sys.argv[1]), sys.argv[2]
    began_s = time.monotonic()
    from mpi4py import MPI

    took_s = time.monotonic() - began_s
    comm = MPI.COMM_WORLD
    root = comm.bcast(told["addresses"], root=comm.size - 1)
    levels = {
        MPI.THREAD_SINGLE: "single",
        MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized",
        MPI.THREAD_MULTIPLE: "multiple",
    }
    start = {
        "rank": comm.rank,
        "size": comm.size,
        "took_s": round(took_s, 3),
        "thread_level": levels[MPI.Query_thread()],
        "ulfm": os.environ.get("OMPI_MCA_mpi_ft_enable", "").lower() in ("1", "true", "yes", "enabled"),
        "sharing": next((kind for kind, address in root.items() if opens(address)), ""),
        "children": {method: child_problem(method) for method in multiprocessing.get_all_start_methods()},
        "cuda_aware": cuda_aware(library),
    }
    comm.Barrier()  # the memory stays until all have looked
    gathered = comm.gather([told["probe"], start])
    if gathered is not None:
        print(MARK + json.dumps(gathered), flush=True)


def opens(address: str) -> bool:
    """Say whether SharedMemory's `address` leads to its memory from here."""
    where, _, rest = address.rpartition("?")[0].rpartition("?")
    try:
        with open(where, "rb") as file:
            return file.read(16) == bytes.fromhex(rest)
    except OSError:
        return False


def child_problem(method: str) -> str:
    """Start a process as a DataLoader does, and say what it came to; "" if all was well."""
    sys.path.append(str(Path(__file__).parents[3]))
    from mpisync import subprocesses

    subprocesses.set_apart()
    process: Any = multiprocessing.get_context(method).Process(target=nothing, daemon=True)  # type: ignore[attr-defined]

    def live() -> None:
        process.start()
        process.join()

    life = threading.Thread(target=live, daemon=True)  # to start may hang as well
    life.start()
    life.join(_CHILD_LIMIT_S)
    if life.is_alive():
        return f"did not end within {_CHILD_LIMIT_S:.0f} s"
    return f"ended with status {process.exitcode}" if process.exitcode else ""


def nothing() -> None:
    """What such a process does."""


def cuda_aware(library: str) -> Any:
    """Ask the library whether it takes GPU memory; None where it does not say."""
    try:
        return bool(ctypes.CDLL(library or None).MPIX_Query_cuda_support())
    except (OSError, AttributeError):
        return None


if __name__ == "__main__":
    main()
