"""The process behind a rank, and whether it lives."""

from __future__ import annotations

import os
import resource
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpisync.siblings import stat


@dataclass(frozen=True)
class Peer:
    """A process of the job, known to all ranks after the session has begun."""

    rank: int
    host: str
    boot: str  # identifies the running kernel: hosts that share a name are still told apart
    namespace: str  # of pids
    pid: int
    started: int  # clock ticks: a pid that was used again is another process

    @classmethod
    def here(cls, rank: int) -> Peer:
        """Describe the calling process."""
        boot = Path("/proc/sys/kernel/random/boot_id")
        namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
        kernel = boot.read_text().strip() if boot.exists() else socket.gethostname()
        now = stat(os.getpid())
        started = now.started if now else 0
        return cls(rank, socket.gethostname(), kernel, namespace, os.getpid(), started)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Peer:
        """Make a peer from the fields that `vars(peer)` gave."""
        return cls(**fields)

    def shares_kernel(self, other: Peer) -> bool:
        """Say whether both run under one kernel: their monotonic clocks agree."""
        return self.boot == other.boot

    def sees(self, other: Peer) -> bool:
        """Say whether the other's pid means the same process here."""
        return self.shares_kernel(other) and self.namespace == other.namespace

    def state(self) -> str | None:
        """Return the kernel's one-letter state ("R", "S", "T" stopped, …); None when the process is gone.

        Meaningful only for a peer that this process `sees`.
        """
        now = stat(self.pid)
        if now is None or now.started != self.started:
            return None
        return now.state

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process is gone."""
        if self.state() is not None:
            os.kill(self.pid, number)

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


def peak_rss_bytes() -> int:
    """Return the largest memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
