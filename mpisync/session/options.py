"""The options of a session, and the checks that both faces share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from mpi4py import MPI

from mpisync import settings
from mpisync.aggregation.late_work import LateWork
from mpisync.policies import BackupWorkers, Policy, parse_policy
from mpisync.records import StepRecord

_T = TypeVar("_T")


@dataclass(frozen=True)
class Options:
    """The options that the script gave; see `Session`."""

    policy: Policy
    schedulers: tuple[Any, ...]
    metric_schedulers: tuple[Any, ...]  # which of them go by the metric
    seed: int
    weight: Literal["equal", "samples"]
    clip_norm: float | None
    clip_value: float | None
    ema: float | None
    average: Mapping[str, Any] | None
    own_copy: bool
    record: str | None
    on_step: Callable[[StepRecord], object] | None
    progress: bool
    on_late: LateWork


def chosen_policy(code: object) -> Policy:
    """Return the policy that the environment names, else the one that the script gives.

    Raises:
        ValueError: The environment's is no policy.
        TypeError: The script's is none.
    """
    if code is not None and not isinstance(code, Policy):
        example = f"; for {code!r} write mpisync.policies.parse_policy({code!r})" if isinstance(code, str) else ""
        raise TypeError(f"policy must be one of mpisync's, such as BackupWorkers(1), not {code!r}{example}")
    named = settings.read("MPISYNC_POLICY")
    if named is not None:
        return parse_policy(str(named))
    return BackupWorkers(0) if code is None else code


def check_communicator(comm: object) -> None:
    """Raise TypeError unless `comm` is an intracommunicator."""
    if isinstance(comm, MPI.Comm) and comm == MPI.COMM_NULL:
        raise TypeError(
            "comm must be an intracommunicator that this rank is in, not MPI.COMM_NULL: a rank that a Split or Create "
            "has left out makes no session (if comm != MPI.COMM_NULL: ...)"
        )
    if not isinstance(comm, MPI.Intracomm):
        raise TypeError(f"comm must be an intracommunicator such as MPI.COMM_WORLD, not {comm!r}")


def problem_of(check: Callable[[], object]) -> str:
    """Return the text of the error that `check` raises, for the other ranks; "" if it raises none."""
    return made_or_problem(check)[1]


def made_or_problem(make: Callable[[], _T]) -> tuple[_T | None, str]:
    """Return what `make` makes and "", or None and the text of the error that it raises, for the other ranks."""
    try:
        return make(), ""
    except (ValueError, TypeError) as error:
        return None, str(error)
