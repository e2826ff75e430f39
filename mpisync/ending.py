"""How a rank ends, so that no other waits for it for ever.

MPI_Finalize waits for every rank, and spins. So an exception that nobody catches must not just end its process: its
traceback is shown and the job aborted; so is a `sys.exit` with an error that leaves others behind. A rank that merely
ends is marked as ending and says, after a while, for whom its exit waits; one that hangs when all others have ended is
killed. Under ULFM, where the launcher and MPI_Abort end no job, our own watcher does. `install` sets this up in
processes that an MPI launcher started as ranks; elsewhere nothing is touched.
"""

from __future__ import annotations

import array
import atexit
import fcntl
import functools
import os
import stat
import sys
import termios
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NoReturn

from mpisync import launchers, siblings, subprocesses, watcher

_ECHO_S = 1.0  # the rank where it began is given so long to show its traceback first
_READ_S = 1.0  # the launcher is given so long to read what was written before an abort
_FAILED_S, _ENDED_S = 3.0, 10.0  # how long others are given to end too, behind an error and without
_WATCHER_S = 10.0  # the watcher is given so long to end a job of which a rank is gone
_rank: launchers.Placement | None = None  # of this process; None where it is none, or not set up
_watched_by: int | None = None  # the launcher's daemon, where our watcher ends the job in its stead
_last_exit: tuple[object, FrameType, int] | None = None  # of `sys.exit`: its code, the script, and where that was
_hung: dict[int, tuple[str, Callable[[], object]]] = {}


def install() -> None:
    """Hook the ends of this process, once, if a launcher started several of it as ranks."""
    global _rank, _watched_by
    placement = launchers.placement()
    if _rank is not None or placement is None or placement.size < 2 or subprocesses.is_below_rank():
        return
    _rank = placement
    subprocesses.set_apart()
    if launchers.has_ulfm() and (daemon := siblings.daemon_of(os.getpid())) is not None:
        watcher.start(daemon)
        watcher.tell(daemon, "hello", placement.rank)
        _watched_by = daemon
    os.register_at_fork(after_in_child=_forget)
    sys.excepthook = _abort_on(sys.excepthook)
    sys.exit = _remembering(sys.exit)
    atexit.register(_at_exit)


def kill_at_exit(pid: int, name: str, kill: Callable[[], object]) -> None:
    """Have a hanging process killed once this rank and all others on the node have ended."""
    _hung[pid] = name, kill


def _forget() -> None:
    """A process that was forked from a rank is none."""
    global _rank
    _rank = None


def _abort_on(show: Callable[..., Any]) -> Callable[..., None]:
    def hook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if _rank is not None and getattr(error, "is_echo", False):  # another rank's traceback says more
            print(f"mpisync: {kind.__name__}: {error}", file=sys.stderr, flush=True)
            time.sleep(_ECHO_S)
        else:
            show(kind, error, trace)
            if _rank is not None and (_watched_by is not None or _running_mpi() is not None):
                # the traceback does not say it, and the others may not come to do so
                print(f"mpisync: rank {_rank.rank} failed: the job is aborted", file=sys.stderr, flush=True)
        _abort(1)

    return hook


def _abort(code: int) -> None:
    """End the job, if this is a rank of one that others wait in."""
    if _rank is None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    _let_the_launcher_read()
    if _watched_by is not None:  # MPI_Abort would end this rank alone, or hang
        watcher.tell(_watched_by, "failed", _rank.rank)
        os._exit(code)
    if (MPI := _running_mpi()) is not None:
        MPI.COMM_WORLD.Abort(code)


def _let_the_launcher_read() -> None:
    """Wait until the launcher has read what this rank wrote: behind an abort MPICH's leaves the pipe unread."""
    end_s = time.monotonic() + _READ_S
    for descriptor in (1, 2):
        while _unread_bytes(descriptor) and time.monotonic() < end_s:
            time.sleep(1e-3)


def _unread_bytes(descriptor: int) -> int:
    """What a pipe of this process holds that nobody has read yet; 0 for anything but a pipe."""
    unread = array.array("i", [0])
    try:
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            fcntl.ioctl(descriptor, termios.FIONREAD, unread)
    except OSError:  # it is closed
        pass
    return unread[0]


def _remembering(leave: Callable[..., NoReturn]) -> Callable[..., NoReturn]:
    @functools.wraps(leave)
    def remember(status: object = None, /) -> NoReturn:
        global _last_exit
        try:
            leave(status)
        except SystemExit as error:
            if threading.current_thread() is threading.main_thread():
                bottom = sys._getframe()
                while bottom.f_back is not None:
                    bottom = bottom.f_back
                _last_exit = error.code, bottom, bottom.f_lasti
            raise

    return remember


def _exit_code() -> int:
    """The code with which a `sys.exit` ends this process; 0 where none does."""
    if _last_exit is None:
        return 0
    code, bottom, place = _last_exit
    if bottom.f_lasti != place:  # somebody caught it, and the script went on to its end
        return 0
    return code if isinstance(code, int) else int(code is not None)


def _running_mpi() -> Any | None:
    module = sys.modules.get("mpi4py.MPI")
    if module is None or not module.Is_initialized() or module.Is_finalized():
        return None
    return module if module.COMM_WORLD.size > 1 else None


def _at_exit() -> None:
    if _rank is None:
        return
    siblings.mark(siblings.ENDED)
    code = _exit_code()
    if not _hung and (_running_mpi() is not None or (code and _watched_by is not None)):
        _wait_for_others(code)
    if _hung:
        _kill_hung()
    if _watched_by is not None:
        watcher.tell(_watched_by, "goodbye", _rank.rank)


def _kill_hung() -> None:
    """Kill the hanging once all others are at their end."""
    hung = {sibling.rank for sibling in siblings.find() if sibling.pid in _hung}
    while any(s.rank not in hung for s in _running()):
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
    if late:
        # everyone on the node is at the end; under ULFM the launcher forgives the kill, and MPI_Finalize may hang on it
        _abort(1)


def _wait_for_others(code: int) -> None:
    """Sleep while others run, for a while: MPI_Finalize would spin. Behind an error, end them."""
    assert _rank is not None
    end_s = time.monotonic() + (_FAILED_S if code else _ENDED_S)
    idle_s = 1e-3
    while (others := _running()) and time.monotonic() < end_s:
        time.sleep(idle_s)
        idle_s = min(2 * idle_s, 0.2)
    names = ", ".join(map(str, others))
    if others and not code:
        print(f"mpisync: rank {_rank.rank} has ended; its exit waits for {names}", file=sys.stderr, flush=True)
    elif others:
        print(
            f"mpisync: rank {_rank.rank} exits with {code} and {names} would wait for it: the job is aborted",
            file=sys.stderr,
            flush=True,
        )
        _abort(code)
    if _watched_by is not None:
        _leave_a_death_to_the_watcher()


def _leave_a_death_to_the_watcher() -> None:
    """Stay out of MPI_Finalize where a rank of this node died: under ULFM it succeeds, and the job would end with 0."""
    started = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "0"))
    end_s = time.monotonic() + _WATCHER_S
    while len({sibling.rank for sibling in siblings.find()}) < started and time.monotonic() < end_s:
        time.sleep(0.1)


def _running() -> list[siblings.Sibling]:
    """Other ranks of this node that are not at their end yet."""
    firsts = siblings.first_of_each(siblings.find(), siblings.ENDED)
    return [sibling for sibling in firsts if sibling.mark != siblings.ENDED]
