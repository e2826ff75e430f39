"""How a rank ends, so that no other waits for it for ever.

MPI_Finalize waits for every rank. So an exception that nobody catches must not just end its process: its traceback is
shown and the job aborted. A rank that merely ends is marked as ending, and one that hangs when all others have ended is
killed. `install` sets this up in processes that an MPI launcher started; elsewhere nothing is touched.
"""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from mpisync import launchers, siblings

_ECHO_S = 1.0  # the rank where it began is given so long to show its traceback first
_installed = False
_hung: dict[int, tuple[str, Callable[[], object]]] = {}


def install() -> None:
    """Hook the ends of this process, once, if a launcher started several of it."""
    global _installed
    placement = launchers.placement()
    if _installed or placement is None or placement.size < 2:
        return
    _installed = True
    sys.excepthook = _abort_on(sys.excepthook)
    atexit.register(_at_exit)


def kill_at_exit(pid: int, name: str, kill: Callable[[], object]) -> None:
    """Have a hanging process killed once this rank and all others on the node have ended."""
    _hung[pid] = name, kill


def _abort_on(show: Callable[..., Any]) -> Callable[..., None]:
    def hook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        MPI = _running_mpi()
        if getattr(error, "is_echo", False):  # another rank's traceback says more
            print(f"mpisync: {kind.__name__}: {error}", file=sys.stderr, flush=True)
            time.sleep(_ECHO_S)
        else:
            show(kind, error, trace)
        sys.stdout.flush()
        sys.stderr.flush()
        if MPI is not None:
            MPI.COMM_WORLD.Abort(1)

    return hook


def _running_mpi() -> Any | None:
    module = sys.modules.get("mpi4py.MPI")
    if module is None or not module.Is_initialized() or module.Is_finalized():
        return None
    return module if module.COMM_WORLD.size > 1 else None


def _at_exit() -> None:
    siblings.mark(siblings.ENDED)
    if not _hung:
        return
    hung = {sibling.rank for sibling in siblings.find() if sibling.pid in _hung}
    while any(s.mark != siblings.ENDED and s.rank not in hung for s in _firsts()):
        time.sleep(0.1)
    late = [s.pid for s in siblings.find() if s.pid in _hung and s.mark != siblings.ENDED]
    for pid in late:
        name, kill = _hung[pid]
        print(
            f"mpisync: killing {name}: it did not come to the end, and MPI would wait for it",
            file=sys.stderr,
            flush=True,
        )
        kill()
    MPI = _running_mpi()
    if late and MPI is not None:
        # everyone on the node is at the end; under ULFM the launcher forgives the kill, and MPI_Finalize may hang on it
        MPI.COMM_WORLD.Abort(1)


def _firsts() -> list[siblings.Sibling]:
    """One process a rank: the one that ends, if any does."""
    return list({s.rank: s for s in sorted(siblings.find(), key=lambda s: s.mark == siblings.ENDED)}.values())
