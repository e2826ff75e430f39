"""The other ranks of this job on this node, found in /proc, and what each of them is doing.

MPI cannot say who is missing from a collective, nor that a rank has left for good and sits in its exit. The kernel can:
the ranks of a job are the processes below one launcher daemon that carry a rank in their environment, and each shows a
word of its own (`mark`) as its thread name. Where there is no /proc, nothing is known and nothing is claimed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

WAITS, ENDED = "mpisync:waits", "mpisync:ended"
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
_PR_SET_NAME = 15


@dataclass(frozen=True)
class Stat:
    """What the kernel says of a process; `started` tells it from a later one with its pid."""

    state: str
    parent: int
    started: int


@dataclass(frozen=True)
class Sibling:
    """A process of this job."""

    rank: int
    pid: int
    mark: str
    state: str

    def __str__(self) -> str:
        stopped = ", stopped by a signal" if self.state in "Tt" else ""
        return f"rank {self.rank} (pid {self.pid}{stopped})"


def mark(word: str) -> None:
    """Show `word` to the other ranks, in place of the main thread's name."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, word.encode(), 0, 0, 0)


@contextlib.contextmanager
def marked(word: str) -> Iterator[None]:
    """Show `word` for a while."""
    before = name("self")
    mark(word)
    try:
        yield
    finally:
        if before:
            mark(before)


def find() -> list[Sibling]:
    """Every process of this job on this node, by rank; this one's too."""
    daemon = daemon_of(os.getpid())
    found = []
    for pid in _pids() if daemon is not None else []:
        rank = _rank(pid)
        if rank is not None and daemon_of(pid) == daemon:
            now = stat(pid)
            if now is not None:
                found.append(Sibling(rank, pid, name(pid), now.state))
    return sorted(found, key=lambda sibling: (sibling.rank, sibling.pid))


def launched_by(daemon: int) -> dict[int, int]:
    """The processes that a launcher's daemon started as ranks, by rank."""
    children = [pid for pid in _pids() if (now := stat(pid)) is not None and now.parent == daemon]
    return {rank: pid for pid in children if (rank := _rank(pid)) is not None}


def first_of_each(found: Iterable[Sibling], word: str) -> list[Sibling]:
    """One process a rank, by rank: the one that shows `word`, if any does."""
    return sorted(
        {s.rank: s for s in sorted(found, key=lambda s: (s.mark == word, -s.pid))}.values(),
        key=lambda sibling: sibling.rank,
    )


def daemon_of(pid: int) -> int | None:
    """The nearest ancestor that is no rank: the launcher's daemon on this node."""
    if _rank(pid) is None:
        return None
    while _rank(pid) is not None:
        now = stat(pid)
        if now is None:
            return None
        pid = now.parent
    return pid


def stat(pid: int) -> Stat | None:
    """What the kernel says of a process; None where it has ended."""
    fields = _read(pid, "stat").decode(errors="replace").rpartition(")")[2].split()
    if not fields or fields[0] in "ZX":
        return None
    return Stat(fields[0], int(fields[1]), int(fields[19]))


def name(pid: int | str) -> str:
    """The name of a process's main thread."""
    return _read(pid, "comm").decode(errors="replace").strip()


def variable(pid: int, name: str) -> str | None:
    """An environment variable that a process was started with."""
    for entry in _read(pid, "environ").split(b"\0"):
        if entry.startswith(f"{name}=".encode()):
            return entry.decode(errors="replace").partition("=")[2]
    return None


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()] if os.path.isdir("/proc") else []


def _rank(pid: int) -> int | None:
    return next((int(text) for name in _RANKS if (text := variable(pid, name)) and text.isdigit()), None)


def _read(pid: int | str, name: str) -> bytes:
    try:
        return Path("/proc", str(pid), name).read_bytes()
    except OSError:
        return b""
