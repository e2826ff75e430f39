"""What both faces share: the policy that holds, and how a rank leaves."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from functools import partial

from mpi4py import MPI

from mpisync import ending, settings
from mpisync.aggregation.errors import PeerFailed
from mpisync.aggregation.root import Root
from mpisync.aggregation.shutdown import farewell
from mpisync.aggregation.worker import Worker
from mpisync.policies import BackupWorkers, Policy, parse_policy

_STOPPED_GRACE_S = 3.0  # for ranks that are stopped by a signal
_FAILED_GRACE_S = 3.0  # for ranks that still compute when another has failed
_GOODBYE_S = 5.0


def chosen_policy(code: object) -> Policy:
    """The policy that the environment names, else the one that the script gives.

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
    """Raise TypeError for what is no intracommunicator."""
    if not isinstance(comm, MPI.Intracomm):
        raise TypeError(f"comm must be an intracommunicator such as MPI.COMM_WORLD, not {comm!r}")


def problem_of(check: Callable[[], object]) -> str:
    """The text of the error that `check` raises, for the other ranks; "" if it raises none."""
    try:
        check()
    except (ValueError, TypeError) as error:
        return str(error)
    return ""


def failure_of(error: BaseException | None) -> str:
    """What the other ranks are told about an exception; "" where it is no failure."""
    if error is None or isinstance(error, GeneratorExit):
        return ""
    if isinstance(error, SystemExit):
        return f"it exits with {error.code}" if error.code else ""
    return f"{type(error).__name__}: {error}"


def leave_root(root: Root, error: BaseException | None) -> None:
    """End the training as the root, wait for the workers, and see to those that never come."""
    failure = failure_of(error)
    if failure and not isinstance(error, PeerFailed):
        failure = f"the root, {root.me}, failed: {failure}"
    failed = bool(failure)
    grace_s = _FAILED_GRACE_S if failed else settings.seconds_of("MPISYNC_GRACE_S")
    left = farewell(
        root, grace_s=grace_s, stopped_grace_s=min(grace_s, _STOPPED_GRACE_S), failure=failure
    )
    for member in left:
        peer = member.peer
        print(
            f"mpisync: {peer} did not come to the end of the training at version {root.version}",
            file=sys.stderr,
            flush=True,
        )
        if root.me.sees(peer):
            ending.kill_at_exit(peer.pid, str(peer), partial(peer.signal, signal.SIGKILL))
    root.close()


def leave_worker(worker: Worker, error: BaseException | None) -> bool:
    """End this worker's part; whether it has the final parameters."""
    has_final = False
    try:
        if error is None:
            worker.finish()
            has_final = True
        elif failure := failure_of(error):
            worker.fail(failure)
    finally:  # also where another rank has failed meanwhile: else the root waits for this one
        worker.say_goodbye(_GOODBYE_S)
    return has_final
