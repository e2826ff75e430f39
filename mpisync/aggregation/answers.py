"""What the root does about a worker's headers that are no gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpisync.aggregation.members import Member, State
from mpisync.transport.wire import Header, Kind, Status

if TYPE_CHECKING:
    from mpisync.aggregation.root import Root


def answer(root: Root, member: Member, header: Header) -> None:
    """Take note of a header and answer it.

    Raises:
        PeerFailed: The worker says that it failed.
        ValueError: It claims a batch of other data than the root's.
    """
    member.account.handed = header.handed
    if header.kind == Kind.FAIL:
        root.fail(f"{member.peer} failed: {header.text}")
    if header.kind == Kind.STOP:
        root.stop()
    if header.kind in (Kind.LEAVE, Kind.BYE):
        member.peak_rss_bytes = header.peak_rss_bytes
        root.lose(member, State.LEFT if header.kind == Kind.LEAVE else State.GONE)
    if header.kind == Kind.CLAIM:
        root.note(member, header, lot=root.late.claim(member, _behind(root), header.batches))
    elif header.kind == Kind.PASS:
        _pass_over(root, member, header)
    else:
        resume = root.note(member, header)
        if header.kind == Kind.READY:
            root.resume(member, resume)


def _behind(root: Root) -> list[int]:
    """Workers whose gradients will be late for sure, whatever they do."""
    # What a worker was let have may have been superseded before it looked, so it may be one version ahead of that.
    return [
        member.worker
        for member in root.members
        if member.state is State.COMPUTING and member.waits_for < 0 and root.is_past(member.served + 1)
    ]


def _pass_over(root: Root, member: Member, header: Header) -> None:
    """Enter batches that left no gradient: given up as late or at the end, or for reasons of the loop's own."""
    may_return = root.is_past(header.version) or root.has_ended
    root.late.pass_over(member, header, may_return=may_return)
    root.note(member, header, status=Status.LATE if may_return else Status.NOTED)
