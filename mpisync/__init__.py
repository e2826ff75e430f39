"""Synchronous SGD with backup workers over MPI.

Names are imported when they are first used (PEP 562), so that `import mpisync` needs neither MPI,
torch nor numba, and a `--help` works where MPI cannot start.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from mpisync import ending
from mpisync.version import __version__

if TYPE_CHECKING:  # what type checkers and editors see in place of __getattr__
    from mpisync.aggregation.errors import PeerFailed as PeerFailed
    from mpisync.aggregation.late_work import Carry as Carry
    from mpisync.aggregation.late_work import Discard as Discard
    from mpisync.aggregation.late_work import Requeue as Requeue
    from mpisync.aggregation.late_work import Retry as Retry
    from mpisync.aggregation.verdict import Verdict as Verdict
    from mpisync.policies import Adaptive as Adaptive
    from mpisync.policies import Async as Async
    from mpisync.policies import BackupWorkers as BackupWorkers
    from mpisync.policies import Deadline as Deadline
    from mpisync.policies import Replay as Replay
    from mpisync.records import StepRecord as StepRecord
    from mpisync.session.partial_reduce import PartialReduce as PartialReduce
    from mpisync.session.session import Session as Session

# An exception on one rank, before any session, must not leave the others waiting for it: the one
# thing done at import, and only in processes that an MPI launcher started.
ending.install()

_HOMES: dict[str, str] = {
    "Adaptive": "mpisync.policies",
    "Async": "mpisync.policies",
    "BackupWorkers": "mpisync.policies",
    "Carry": "mpisync.aggregation.late_work",
    "Deadline": "mpisync.policies",
    "Discard": "mpisync.aggregation.late_work",
    "PartialReduce": "mpisync.session.partial_reduce",
    "PeerFailed": "mpisync.aggregation.errors",
    "Replay": "mpisync.policies",
    "Requeue": "mpisync.aggregation.late_work",
    "Retry": "mpisync.aggregation.late_work",
    "Session": "mpisync.session.session",
    "StepRecord": "mpisync.records",
    "Verdict": "mpisync.aggregation.verdict",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    """Import a public name from the module that defines it."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'mpisync' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
