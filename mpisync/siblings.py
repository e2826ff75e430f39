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
from typing import NamedTuple

WAITS, ENDED = "mpisync:waits", "mpisync:ended"
_RANKS = (b"OMPI_COMM_WORLD_RANK=", b"PMI_RANK=", b"SLURM_PROCID=")
_PR_SET_NAME = 15


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


class Stat(NamedTuple):
    """The state of a process, as the kernel tells it."""

    state: str  # one letter: "R", "S", "T" stopped, "Z" ended, …
    parent: int
    started: int  # clock ticks: a pid that was used again is another process


def stat(pid: int) -> Stat | None:
    """Read a process's /proc/PID/stat; None where there is none."""
    fields = _read(str(pid), "stat").decode(errors="replace").rpartition(")")[2].split()
    return Stat(fields[0], int(fields[1]), int(fields[19])) if fields else None


def mark(word: str) -> None:
    """Show `word` to the other ranks, in place of the main thread's name."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, word.encode(), 0, 0, 0)


@contextlib.contextmanager
def marked(word: str) -> Iterator[None]:
    """Show `word` for a while."""
    before = _read("self", "comm").decode().strip()
    mark(word)
    try:
        yield
    finally:
        if before:
            mark(before)


def find() -> list[Sibling]:
    """Return every process of this job on this node, by rank; this one too."""
    daemon = _daemon(os.getpid())
    found = []
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if entry.isdigit() and daemon is not None:
            rank = _rank(entry)
            if rank is not None and _daemon(int(entry)) == daemon:
                now = stat(int(entry))
                if now and now.state not in "ZX":
                    name = _read(entry, "comm").decode().strip()
                    found.append(Sibling(rank, int(entry), name, now.state))
    return sorted(found, key=lambda sibling: (sibling.rank, sibling.pid))


def first_of_each(found: Iterable[Sibling], word: str) -> list[Sibling]:
    """Return one process a rank, by rank: the one that shows `word`, if any does."""
    return sorted(
        {s.rank: s for s in sorted(found, key=lambda s: (s.mark == word, -s.pid))}.values(),
        key=lambda sibling: sibling.rank,
    )


def _daemon(pid: int) -> int | None:
    """Return the nearest ancestor that is no rank: the launcher's daemon on this node."""
    if _rank(str(pid)) is None:
        return None
    while _rank(str(pid)) is not None:
        now = stat(pid)
        if now is None:
            return None
        pid = now.parent
    return pid


def _rank(pid: str) -> int | None:
    environ = _read(pid, "environ").split(b"\0")
    for name in _RANKS:
        for entry in environ:
            if entry.startswith(name) and entry[len(name) :].isdigit():
                return int(entry[len(name) :])
    return None


def _read(pid: str, name: str) -> bytes:
    try:
        return Path("/proc", pid, name).read_bytes()
    except OSError:
        return b""
