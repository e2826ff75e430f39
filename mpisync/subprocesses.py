"""Processes that a rank starts: they inherit its environment, and are no ranks.

DataLoader workers that start by "spawn" or "forkserver" import the user's script anew, and with it MPI, which would
take them for the rank and wait for ever for a launcher that knows better. So they get an environment in which MPI
starts alone, as a job of one process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from multiprocessing import util
from typing import Any

from mpisync import launchers

_VARIABLE = "_MPISYNC_RANK"  # the job and the process that is the rank


def is_below_rank(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a rank started this process, itself or through others, and no launcher did so in between."""
    job, _, pid = environ.get(_VARIABLE, "").rpartition(" ")
    return bool(pid) and pid != str(os.getpid()) and environ.get("PMIX_NAMESPACE", "") in ("", job)


def set_apart() -> None:
    """Have those that this process, a rank, starts from now on know that they are none."""
    os.environ[_VARIABLE] = f"{os.environ.get('PMIX_NAMESPACE', '')} {os.getpid()}"
    # What "spawn" and "forkserver" start their processes by; a fork has an MPI that has started already.
    spawn: Any = util
    spawn.spawnv_passfds = _without_link(spawn.spawnv_passfds)


def _without_link(start: Callable[..., int]) -> Callable[..., int]:
    lock = threading.Lock()

    def start_alone(*arguments: Any) -> int:
        with lock:
            link = {name: os.environ[name] for name in os.environ.keys() - launchers.without_link().keys()}
            try:
                for name in link:
                    del os.environ[name]
                return start(*arguments)
            finally:
                os.environ.update(link)

    return start_alone
