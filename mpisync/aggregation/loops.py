"""The loops of a session, as the root serves them: all workers leave each at one version, and late ones hold up nobody.

Between two of them the root may be anywhere in the script, also in a collective that waits for a worker. So no worker
needs an answer then: the end of a loop is told, with its last version, before the root leaves it.
"""

from __future__ import annotations

from collections.abc import Iterator

from mpisync.aggregation.closed_step import ClosedStep
from mpisync.aggregation.members import Member, State
from mpisync.aggregation.root import Root
from mpisync.aggregation.verdict import LOOP_OVER

_SEND_S = 1.0  # how long the last version may take to be with those who wait for it
_LOOK_S = 1e-4


def serve_loop(root: Root, steps: int | None = None) -> Iterator[ClosedStep]:
    """Yield each closed step like `Root.serve`, then end the loop on every worker.

    Args:
        root: The aggregator.
        steps: The version at which the loop ends; None for no limit.
    """
    root.go_on()
    yield from root.serve(steps)
    wind_up(root, LOOP_OVER)
    root.pause()  # when all that are in time have been answered: to others the end of the loop is the answer
    _send_final(root)


def wind_up(root: Root, reason: str) -> None:
    """Give up the open step, and all gradients in it; let whoever waits for the newest parameters have them.

    Args:
        root: The aggregator.
        reason: What the gradients' workers are told.
    """
    root.collector.late.goes_on = False
    root.abandon()
    for member in root.roster.members:
        if member.pending_header is not None and member.is_alive:
            give_up(root, member, reason)
        elif member.waits_for >= 0 or member.state is State.LEFT:
            root.roster.serve_parameters(member)
    root.roster.flush()


def give_up(root: Root, member: Member, reason: str) -> None:
    """Refuse a worker's announced gradient, since no step follows, and let it have the newest parameters."""
    root.collector.give_up(member.worker, reason)
    root.tell()
    root.roster.serve_parameters(member)


def _send_final(root: Root) -> None:
    """Stay until the parameters are with all who wait for them: the script may not come by here again for long."""
    waiting = [member for member in root.roster.members if member.is_alive and member.served == root.version]
    give_up_s = root.clock() + _SEND_S
    while any(m.link.has_unsent(m.worker) for m in waiting) and root.clock() < give_up_s:
        root.inbox.take()
        root.roster.wait(_LOOK_S)
