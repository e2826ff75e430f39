"""Ends a job when one of its ranks is gone without a goodbye, where the launcher does not.

Under ULFM the launcher lets a job go on whatever becomes of a rank, and the others may wait for it for ever: in
MPI_Init, in MPI_Finalize, in a collective, where no Python runs. So one small process watches the ranks of each node
from outside. Whoever comes first starts it: `mpisync run --ulfm`, or a rank that imports mpisync. Ranks tell it by
datagrams that they are there, that they have come to their end, or that they fail.

To end the job it asks the launcher. On the other nodes only a daemon of the launcher's runs, which cannot be asked
without making mpirun's exit code 0: there the ranks are killed, other nodes notice it through MPI, and only if that
does not end the job is the daemon ended, and with it the job.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from mpisync import launchers, siblings

_LOOK_S = 0.25
_SETTLE_S = 1.0  # for a job that is ending anyway, of which one rank goes first
_MISSING_S = 5.0  # ranks of one node start within it
_HEARD_S = 0.3  # until what a rank has printed is through the launcher
_ASKED_S, _KILLED_S = 2.0, 3.0  # for whoever was asked to end; for the launcher when its ranks are gone
_TOLD_S = 5.0  # a rank does not hang on a watcher that does
_CREDENTIALS = struct.Struct("3i")  # of a sender, by the kernel: process, user, group
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from mpisync import watcher; watcher.main(sys.argv[2:])"


def start(daemon: int, environ: Mapping[str, str] = os.environ) -> None:
    """Start watching the ranks that `daemon`, a launcher's process, starts on this node, unless somebody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # an abstract name has no owner
        try:
            sock.bind(_address(daemon))
        except OSError:
            return
        sock.set_inheritable(True)
        package = str(Path(__file__).parents[1])
        os.posix_spawn(
            sys.executable,
            # -S, -E: it needs the standard library alone
            [sys.executable, "-S", "-E", "-c", _PROGRAM, package, str(sock.fileno()), str(daemon)],
            launchers.without_link(environ),
            file_actions=[(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)],
            setsid=True,  # it outlives the ranks when their groups are killed
        )


def tell(daemon: int, word: str, rank: int) -> None:
    """Tell the watcher that this process, a rank, is there ("hello"), has ended ("goodbye") or fails ("failed")."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.settimeout(_TOLD_S)
        sock.sendto(f"{word} {rank} {os.getpid()}".encode(), _address(daemon))


def _address(daemon: int) -> str:
    """A name that vanishes with the watcher; containers that share a network have their own pids."""
    return f"\0mpisync-{os.getuid()}-{os.readlink('/proc/self/ns/pid')}-{daemon}"


def main(arguments: list[str]) -> None:
    """Watch until the job's end; the arguments are the socket's number and the daemon's pid."""
    with socket.socket(fileno=int(arguments[0])) as sock:
        Watcher(sock, int(arguments[1])).run()


class _Process:
    """A process, told from a later one with its pid."""

    def __init__(self, pid: int) -> None:
        self.pid, self._began = pid, siblings.stat(pid)

    def lives(self) -> bool:
        """Whether it has not ended."""
        now = siblings.stat(self.pid)
        return now is not None and self._began is not None and now.started == self._began.started

    def kill(self) -> None:
        """Kill it and, where it leads one, its process group: a rank's own children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if siblings.stat(self.pid) is None or (self.lives() and os.getpgid(self.pid) == self.pid):
                os.killpg(self.pid, signal.SIGKILL)
            elif self.lives():
                os.kill(self.pid, signal.SIGKILL)

    def ask(self) -> None:
        """Ask it to end."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.lives():
                os.kill(self.pid, signal.SIGTERM)


class Watcher:
    """Watches the ranks of one node."""

    def __init__(self, sock: socket.socket, daemon: int) -> None:
        self._sock, self._daemon = sock, _Process(daemon)
        self._started: dict[int, _Process] = {}  # by the launcher, by rank
        self._ranks: dict[int, _Process] = {}  # the same, unless the launcher started a wrapper of the user's
        self._goodbyes: set[int] = set()
        self._failed: set[int] = set()
        self._expected, self._missing_s = 0, 0.0

    def run(self) -> None:
        """Return when the job has ended, by itself or not."""
        while self._daemon.lives():
            self._look(_LOOK_S)
            gone = self._gone()
            if gone and not self._failed:
                self._wait_while(lambda: bool(self._living()) and not self._failed, _SETTLE_S)
            if gone or self._failed:
                self._end(gone)
                return
            if self._ranks and not self._living():
                return
        for process in self._started.values():  # the launcher was killed
            process.kill()

    def _look(self, limit_s: float) -> None:
        """Find the ranks, and hear what they tell, for so long at most."""
        if not self._expected or len(self._started) < self._expected:
            for rank, pid in siblings.launched_by(self._daemon.pid).items():
                self._started.setdefault(rank, _Process(pid))
                self._ranks.setdefault(rank, self._started[rank])
                if not self._expected:
                    self._expected = int(siblings.variable(pid, "OMPI_COMM_WORLD_LOCAL_SIZE") or 0)
                    self._missing_s = time.monotonic() + _MISSING_S
        while select.select([self._sock], [], [], limit_s)[0]:
            told, credentials, *_ = self._sock.recvmsg(100, socket.CMSG_SPACE(_CREDENTIALS.size))
            if any(_CREDENTIALS.unpack(data)[1] == os.getuid() for *_, data in credentials):
                word, told_rank, told_pid = told.decode().split()
                self._hear(word, int(told_rank), int(told_pid))
            limit_s = 0.0

    def _hear(self, word: str, rank: int, pid: int) -> None:
        if word == "hello":
            self._ranks[rank] = _Process(pid)
            self._goodbyes.discard(rank)
        elif rank in self._ranks and self._ranks[rank].pid == pid:
            (self._goodbyes if word == "goodbye" else self._failed).add(rank)

    def _gone(self) -> list[str]:
        """Who has left without a goodbye."""
        names = [
            f"rank {rank} (pid {process.pid})"
            for rank, process in sorted(self._ranks.items())
            if rank not in self._goodbyes and not process.lives()
        ]
        absent = self._expected - len(self._ranks)
        if absent > 0 and time.monotonic() > self._missing_s:
            names.append(f"{absent} of the {self._expected} ranks that were started here")
        return names

    def _living(self) -> list[_Process]:
        return [process for process in self._ranks.values() if process.lives()]

    def _say(self, text: str) -> None:
        """Print by a rank's stderr: the launcher reads what living ranks write, and waits for whoever holds it."""
        for process in self._living():
            with contextlib.suppress(OSError), open(f"/proc/{process.pid}/fd/2", "a") as stderr:
                print(text, file=stderr)
                return

    def _wait_while(self, condition: Callable[[], bool], limit_s: float) -> None:
        end_s = time.monotonic() + limit_s
        while condition() and time.monotonic() < end_s:
            self._look(0.05)

    def _end(self, gone: list[str]) -> None:
        """End the job: its ranks here, and wherever else it runs."""
        if self._living() and not self._failed:  # else a traceback, or a line, has said why
            self._say(f"mpisync: {', '.join(gone)} did not come to the end: the job is ended")
        if self._living():
            time.sleep(_HEARD_S)
            is_mpirun = siblings.name(self._daemon.pid) != "prted"
            for process in [self._daemon] if is_mpirun else self._living():
                process.ask()
        # mpirun may leave ranks behind
        self._wait_while(lambda: bool(self._living()) and self._daemon.lives(), _ASKED_S)
        for process in self._started.values():
            process.kill()
        self._wait_while(self._daemon.lives, _KILLED_S)
        self._daemon.ask()
        self._wait_while(self._daemon.lives, _ASKED_S)
        if self._daemon.lives():
            self._daemon.kill()
