"""Lets every rank of a test's job be asked for its stacks, from its start (see launch.py)."""

import faulthandler
import os
import signal
import sys

_rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK")
if _rank and "MPITEST_RUN" in os.environ:
    _file = os.path.join(os.environ["MPITEST_RUN"], f"stacks.{_rank}.{os.getpid()}")
    # Launchers mix the ranks' output as it comes; whole lines, and at once, can be looked for.
    sys.stdout.reconfigure(line_buffering=True)
    # The handler is C: it writes even while the interpreter is stuck inside MPI or a kernel.
    faulthandler.register(
        signal.SIGRTMIN + 7, file=os.open(_file, os.O_WRONLY | os.O_CREAT, 0o600), all_threads=True
    )
