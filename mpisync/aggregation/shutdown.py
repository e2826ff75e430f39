"""The end of the training: every worker gets the final parameters and says goodbye, or is reported and killed."""

from __future__ import annotations

import signal
import sys
from functools import partial

from mpisync import ending, settings
from mpisync.aggregation.errors import PeerFailed
from mpisync.aggregation.loops import give_up, wind_up
from mpisync.aggregation.members import Member, State
from mpisync.aggregation.root import Root
from mpisync.aggregation.worker import Worker
from mpisync.transport.wire import Header, Kind

ENDED = "the training has ended"
_LOOK_S = 0.05
_STOPPED_GRACE_S = 3.0  # for ranks that are stopped by a signal
_FAILED_GRACE_S = 3.0  # for ranks that still compute when another has failed
_GOODBYE_S = 5.0


def farewell(root: Root, *, grace_s: float, stopped_grace_s: float, failure: str = "") -> list[Member]:
    """End the training on every worker and wait for their goodbyes.

    A worker that still computes is merely late: it learns its verdict, has the final parameters and
    goes on behind the loop.

    Args:
        root: The aggregator; it serves no further step.
        grace_s: How long to wait for workers that run.
        stopped_grace_s: How long to wait when all that are left are stopped by a signal.
        failure: Why the training failed; "" if it did not.

    Returns:
        The workers that never came.
    """
    began_s, roster = root.clock(), root.roster
    root.end(failure)
    wind_up(root, ENDED)
    while True:
        heard = root.inbox.take()
        while heard:
            _, _, header = heard.popleft()
            _hear(root, roster.members[header.worker], header)
        roster.flush()
        for member in roster.ended():
            root.lose(member, State.LOST)
        waited_s = root.clock() - began_s
        left = [member for member in roster.members if member.state not in (State.GONE, State.LOST)]
        if not left or waited_s > grace_s:
            return left
        if waited_s > stopped_grace_s and all(map(roster.is_stopped, left)):
            return left
        roster.wait(_LOOK_S)


def _hear(root: Root, member: Member, header: Header) -> None:
    if header.kind == Kind.GRADIENT:
        root.register(header, root.clock())
        give_up(root, member, ENDED)
    elif header.kind != Kind.FAIL:
        root.answer(member, header)
    else:  # one failure has ended it already, or it fails after a good end: its own exit tells
        root.acknowledge(member, header)
    if member.state is not State.GONE:
        root.roster.serve_parameters(member)


def failure_of(error: BaseException | None) -> str:
    """Return what the other ranks are told about an exception; "" where it is no failure."""
    if error is None or isinstance(error, GeneratorExit):
        return ""
    if isinstance(error, SystemExit):
        return f"it exits with {error.code}" if error.code else ""
    return f"{type(error).__name__}: {error}"


def leave_root(root: Root, error: BaseException | None) -> None:
    """End the training as the root, wait for the workers, and report those that never come, to be killed at exit."""
    failure = failure_of(error)
    if failure and not isinstance(error, PeerFailed):
        failure = f"the root, {root.roster.me}, failed: {failure}"
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
        if root.roster.me.sees(peer):
            ending.kill_at_exit(peer.pid, str(peer), partial(peer.signal, signal.SIGKILL))
    root.roster.close()


def leave_worker(worker: Worker, error: BaseException | None) -> bool:
    """End this worker's part, and say whether it has the final parameters."""
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
