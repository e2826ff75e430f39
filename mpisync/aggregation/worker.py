"""The worker's side of the step protocol."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from mpisync.aggregation.errors import PeerFailed
from mpisync.aggregation.sample_pool import BatchId
from mpisync.aggregation.verdict import LOOP_OVER, Verdict
from mpisync.transport.base import End, WorkerLink
from mpisync.transport.peers import Peer, peak_rss_bytes
from mpisync.transport.wire import GradientInfo, Header, Kind, Reply, Status

_T = TypeVar("_T")
_SHORTEST_S, _LONGEST_S = 1e-3, 20e-3
_LOOK_AFTER_S = 0.25


class Worker:
    """A worker of a run: `pull` the parameters, fill `link.gradient`, `push`; again.

    Args:
        peers: The processes of all ranks; the last is the root's.
        link: How this worker reaches the root.
        rank: This worker's number.
        incarnation: The run's.
        stall_report_s: After how long without a word from the root to say so.
    """

    def __init__(
        self,
        peers: list[Peer],
        link: WorkerLink,
        rank: int,
        incarnation: int,
        *,
        stall_report_s: float = 10.0,
    ) -> None:
        self.link = link
        self.version = -1
        self.sequence = 0
        self.handed = 0  # samples handed to the loop
        self.metric: tuple[int, float] | None = None  # version and value, to be told with the next message
        self.again = False  # whether the newest gradient's batches are to be computed on again
        self._end: End | None = None
        self._loop = 0  # of the session: the one that this worker is in, or that comes next
        self._me, self._root = peers[rank], peers[-1]
        self._incarnation, self._ordinal = incarnation, 0
        self._stall_report_s = stall_report_s
        self._resume: int | None = None
        self._last = -1  # version of the loop, as far as the root has told
        self._pulled_s = time.monotonic()

    # -- the loop ----------------------------------------------------------------------------------

    def pull(self) -> int | None:
        """Wait for the parameters to compute on, and return their version; None when training has ended.

        Raises:
            PeerFailed: Another rank failed.
        """
        if self._resume is None or (self.link.newest() >= self._resume and self.link.has_unsent_version()):
            reply = self._ask(Kind.READY)
            self._resume = None if reply is None else reply.resume
        version = self._wait(self._newest_or_end, "the parameters")
        if version < 0:
            return None
        self.version, self._pulled_s = version, time.monotonic()
        return version

    def _newest_or_end(self) -> int | None:
        if self._is_over():
            return -1
        newest = self.link.newest()
        # nobody computes on a loop's last version: its end is about to be told
        return newest if self._resume is not None and newest >= self._resume and newest != self._last else None

    def _is_over(self) -> bool:
        """Say whether the loop that this worker is in is over, as it is when the training has ended."""
        return self._ended() is not None or self._is_paused()

    def _is_paused(self) -> bool:
        return self.link.loops() > self._loop

    def end_loop(self, target: np.ndarray) -> None:
        """Copy the parameters at which the loop has ended into `target`, and go on to the next loop.

        Where it has not ended yet this worker contributes nothing more to it, and waits.
        """
        if not self._is_over():
            self._loop += 1  # the root is told of the next
            self._ask(Kind.READY)
            self._loop -= 1
            self._wait(lambda: self._is_over() or None, "the end of the loop")
        if self._end is not None:
            self.finish()
            self.read(target)
        else:
            self.version = self._wait(lambda: _or_none(self.link.take_final(target)), "the parameters")
        self._loop, self._resume = self._loop + 1, None

    def read(self, target: np.ndarray) -> None:
        """Copy the newest parameters whole into `target`, as many bytes as it has."""
        self.version = self._wait(lambda: _or_none(self.link.read(target)), "the parameters")

    def copy_newest(self, target: np.ndarray) -> int:
        """Copy the newest parameters like `read`, keep `version` as it is, and return theirs."""
        version = self.version
        self.read(target)
        newest, self.version = self.version, version
        return newest

    def push(self, info: GradientInfo) -> Verdict:
        """Send the gradient in `link.gradient` and wait for its verdict; `again` then tells if its batches come again.

        Where the loop is over, it is late, and the root may be too busy to say so.

        Args:
            info: What is to be known of it; how long it was computed is filled in here.

        Raises:
            PeerFailed: Another rank failed.
        """
        now_s = time.monotonic()
        compute_s = now_s - self._pulled_s - info.data_s
        info = GradientInfo._make((*info[:2], compute_s, *info[3:]))
        reply = self._ask(Kind.GRADIENT, info, now_s)
        self.sequence += 1
        if reply is None:
            self.again, last = False, self.link.pause().version
            return Verdict(last, False, max(0, last - self.version), last, LOOP_OVER, time.monotonic() - now_s)
        self._resume, self.again = reply.resume, bool(reply.again)
        return Verdict(
            reply.step,
            reply.status == Status.ACCEPTED,
            reply.late_by,
            reply.newest,
            reply.text,
            reply.waited_s,
        )

    def claim(self, batches: int) -> BatchId | None:
        """Claim the next batch of the pool; None where there is none left, or the loop is over.

        Args:
            batches: How many an epoch has, by this worker's loader.
        """
        reply = self._ask(Kind.CLAIM, GradientInfo(batches=batches))
        return None if reply is None or reply.batch < 0 else BatchId(reply.epoch, reply.batch)

    def pass_over(self, *, samples: int, batches: int) -> None:
        """Tell the root that batches left no gradient; `again` then tells whether they come once more."""
        reply = self._ask(Kind.PASS, GradientInfo(samples=samples, batches=batches))
        self.again = reply is not None and bool(reply.again)

    def is_stale(self, *, by_end: bool = False) -> bool:
        """Say whether the version being computed on is superseded already.

        Args:
            by_end: Whether only the end of the loop counts.
        """
        return (not by_end and self.link.is_behind(self.version)) or self._is_over()

    def stop(self) -> None:
        """Ask the root to end the training everywhere."""
        self._ask(Kind.STOP)

    # -- the end -----------------------------------------------------------------------------------

    def finish(self) -> None:
        """Contribute nothing more, wait for the end of the training and its final parameters."""
        end = self._ended()
        if end is None or self.link.newest() != end.version:
            # also where the end overtook older parameters: ask for the last
            self._ask(Kind.LEAVE)
            end = self._wait(self._ended, "the end of the training")
        final = end.version
        self._wait(lambda: self.link.newest() >= final or None, "the final parameters")
        self.version = final

    def fail(self, text: str) -> None:
        """Tell the root that this worker's loop ended with an exception."""
        if self._end is None:
            self._send(Kind.FAIL, text=text)

    def say_goodbye(self, timeout_s: float) -> None:
        """Send the last message and complete all sends, for at most `timeout_s` if the root hangs."""
        ordinal = self._send(Kind.BYE)
        give_up_s = time.monotonic() + timeout_s
        while self.link.reply(ordinal) is None and self._root_lives():
            if time.monotonic() > give_up_s:
                return
            self.link.wait(_SHORTEST_S)
        self.link.close()

    # -- restoring ---------------------------------------------------------------------------------

    def state(self) -> dict[str, int]:
        """Return what a later run of this worker needs to go on."""
        return {"sequence": self.sequence, "handed": self.handed}

    def load(self, state: Mapping[str, int]) -> None:
        """Go on where `state` was taken; before the first `pull`."""
        self.sequence, self.handed = state["sequence"], state["handed"]

    # -- messages ----------------------------------------------------------------------------------

    def _send(
        self, kind: Kind, info: GradientInfo | None = None, stamp_s: float | None = None, *, text: str = ""
    ) -> int:
        self._ordinal += 1
        is_last = kind in (Kind.LEAVE, Kind.BYE)
        info = GradientInfo() if info is None else info
        if self.metric is not None:
            (version, value), self.metric = self.metric, None
            info = info._replace(metric=value, metric_version=version)
        header = Header(
            self._incarnation,
            kind,
            self._me.rank,
            self._ordinal,
            self.sequence,
            self.version,
            self.handed,
            time.monotonic() if stamp_s is None else stamp_s,
            info,
            peak_rss_bytes() if is_last else 0,
            self._loop,
            text,
        )
        self.link.send(header)
        return self._ordinal

    def _ask(self, kind: Kind, info: GradientInfo | None = None, stamp_s: float | None = None) -> Reply | None:
        """Send a header and return its answer; None where the loop is over: the root may come back to it much later."""
        ordinal = self._send(kind, info, stamp_s)
        answers: list[Reply] = []

        def is_settled() -> bool | None:
            over = self._is_paused()  # first: what was answered before the end counts
            if (reply := self.link.reply(ordinal)) is not None:
                answers.append(reply)
            return bool(answers) or over or None

        self._wait(is_settled, "the root's reply")
        if not answers:
            return None
        self._last = answers[0].last
        return answers[0]

    def _ended(self) -> End | None:
        """Return the training's end, once the root has told it; raise PeerFailed at once where it is a failure."""
        end = self.link.end()
        if end is not None:
            self._end = end
            if end.failure:
                raise PeerFailed(end.failure)
        return end

    def _wait(self, ready: Callable[[], _T | None], what: str) -> _T:
        """Sleep until `ready` returns something, looking after the root meanwhile."""
        idle_s, began_s = _SHORTEST_S, time.monotonic()
        look_s, report_s = began_s + _LOOK_AFTER_S, began_s + self._stall_report_s
        while True:
            result = ready()
            if result is not None:
                return result
            end = self.link.end()
            if end is not None and end.failure:
                self._end = end
                raise PeerFailed(end.failure)
            now_s = time.monotonic()
            if now_s >= look_s:
                look_s = now_s + _LOOK_AFTER_S
                if not self._root_lives():
                    raise PeerFailed(f"the root, {self._root}, ended without a word")
                if now_s >= report_s:
                    report_s = now_s + 2 * (now_s - began_s)
                    self._report(what, now_s - began_s)
            self.link.wait(idle_s)
            idle_s = min(2 * idle_s, _LONGEST_S)

    def _root_lives(self) -> bool:
        return not self._me.sees(self._root) or self._root.state() is not None

    def _report(self, what: str, waited_s: float) -> None:
        state = self._root.state() if self._me.sees(self._root) else None
        hint = ", which is stopped by a signal" if state == "T" else ""
        print(
            f"mpisync: {self._me} waits for {waited_s:.0f} s for {what} from {self._root}{hint}; "
            f"it has version {self.version} and has sent {self.sequence} gradients "
            f"(pid {os.getpid()})",
            file=sys.stderr,
            flush=True,
        )


def _or_none(version: int) -> int | None:
    return None if version < 0 else version
