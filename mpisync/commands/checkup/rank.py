"""Run as a program: start MPI and tell what came of it, together with what the other ranks were told.

It imports nothing of mpisync, whose care for how ranks end would wait for doctor's own processes. Only
rank 0 prints: one line of JSON, [[told, start], ...] in the order of ranks.
"""

import ctypes
import json
import os
import sys
import time
from typing import Any

MARK = "mpisync-doctor:"
_FORK_LIMIT_S = 5.0


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
        "fork": fork_problem(),
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


def fork_problem() -> str:
    """Fork, and say what the child came to."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    end_s = time.monotonic() + _FORK_LIMIT_S
    while time.monotonic() < end_s:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return f"ended with status {status}" if status else ""
        time.sleep(1e-3)
    os.kill(pid, 9)
    return f"did not end within {_FORK_LIMIT_S:.0f} s"


def cuda_aware(library: str) -> Any:
    """Ask the library whether it takes GPU memory; None where it does not say."""
    try:
        return bool(ctypes.CDLL(library or None).MPIX_Query_cuda_support())
    except (OSError, AttributeError):
        return None


if __name__ == "__main__":
    main()
