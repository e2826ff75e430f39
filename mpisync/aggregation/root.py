"""The root aggregator: one event loop that accepts the first gradients of each step and discards late ones.

The loop owns all state and runs in one thread. A step goes through

    open → (judge headers, ask for payloads, accept whole gradients, fold) → closed → updated → published = next open

and from *closed* to *published* nothing is judged: what arrives then meets the next step. The collector decides, the
roster knows the workers, payloads are on their way to the running sum; here they are put together.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mpisync.aggregation.closed_step import ClosedStep
from mpisync.aggregation.collector import Collector
from mpisync.aggregation.errors import PeerFailed
from mpisync.aggregation.inbox import Inbox
from mpisync.aggregation.late_work import Discard, LateWork
from mpisync.aggregation.members import Member, State
from mpisync.aggregation.payloads import PayloadQueue
from mpisync.aggregation.roster import Roster
from mpisync.aggregation.running_sum import RunningSum
from mpisync.aggregation.stalls import StallReport
from mpisync.aggregation.verdict import LOOP_OVER
from mpisync.aggregation.work import Gradient
from mpisync.device.base import Array, Memory
from mpisync.policies import Arrival, Policy
from mpisync.records import StepRecord
from mpisync.transport.base import RootLink
from mpisync.transport.layout import Layout
from mpisync.transport.peers import Peer
from mpisync.transport.wire import Header, Kind, Status

_LOOK_AFTER_S = 0.25  # how often an idle root looks whether its workers' processes live
_FOLD_BYTES_PER_S = 10e9  # how fast a fold is at least; decides when an early one pays
_SMALL_BYTES = 256 << 10  # to wake up for one costs more than to fold it
_FOLD_AFTER_S = 1e-3  # a small one costs more by being a call of its own than it saves


class Root:
    """The root aggregator, which serves steps to workers.

    Args:
        peers: The processes of all ranks; the last is this one.
        links: One a transport; together they reach every worker once.
        layout: Of a gradient.
        parameters: Bytes of the parameters as they are to be published, filled already.
        policy: When a step closes and what counts.
        memory: Where gradients and their sum lie.
        weighted: Weight gradients by their samples instead of equally.
        late: What becomes of late gradients' samples; they are discarded unless given.
        clock: Monotonic seconds; that of the workers on this node.
        stall_report_s: After how long an open step is reported.
        state: What `state` of an earlier root returned, to go on from there.

    Attributes:
        collector: The open step, and everybody's accounts.
        roster: The workers.
        inbox: What they said and was not handled yet.
        parameters: As given.
        clock: As given.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        links: Sequence[RootLink],
        layout: Layout,
        parameters: Array,
        policy: Policy,
        memory: Memory,
        *,
        weighted: bool = False,
        late: LateWork | None = None,
        clock: Callable[[], float] = time.monotonic,
        stall_report_s: float = 10.0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.parameters, self.clock = parameters, clock
        self.roster = Roster(peers, links, clock)
        self._payloads = PayloadQueue(self.roster.members)
        self._ties = random.Random(0)
        self.collector = Collector(
            policy,
            len(self.roster.members),
            Discard() if late is None else late,
            payloads=self._payloads,
            clock=clock,
            ties=self._ties,
            gradient_bytes=layout.size_bytes,
        )
        if state is not None:
            self.collector.load(state["collector"])
            version, words, gauss = state["ties"]
            self._ties.setstate((version, tuple(words), gauss))
        self.inbox = Inbox(links, self.roster.members, self.roster.me, clock, self._ties)
        self._sum = RunningSum(layout, memory, links, weighted=weighted, norms=policy.wants_norms)
        self._initial: Gradient | None = None  # of the open step: what its worker's first forward pass initialised
        self._layout, self._segments, self._folds_early = layout, layout.arrays(parameters), memory.folds_early
        self._stop_asked = False
        self._loops = 0  # that have ended
        self._is_paused = self._has_ended = False
        self._look_after_s = 0.0
        self._stalls = StallReport(stall_report_s, self.roster.me)
        self.roster.publish(self.collector.player.step.step, parameters)
        self.roster.flush()

    @property
    def version(self) -> int:
        """The newest version of the parameters."""
        return self.roster.version

    @property
    def policy(self) -> Policy:
        """The rules of the open step: when it closes and what counts in it."""
        return self.collector.player.policy

    @property
    def mean(self) -> list[Array]:
        """The memory of every step's mean, one array a segment."""
        return self._sum.mean

    def state(self) -> dict[str, Any]:
        """Return what a later root needs, beside the parameters, to go on from the newest version."""
        version, words, gauss = self._ties.getstate()
        return {"collector": self.collector.state(), "ties": [version, list(words), gauss]}

    # -- from a header to the update: collect, fold, publish ---------------------------------------

    def serve(self, steps: int | None = None) -> Iterator[ClosedStep]:
        """Yield each closed step, until version `steps` or until nobody is left to contribute.

        Raises:
            PeerFailed: A worker's loop ended with an exception, no worker is left alive, or every
                gradient is rejected.
            RuntimeError: A closed step was not published.
        """
        stopped_at = self.version if self._stop_asked else None  # in the loop before
        limits = [limit for limit in (steps, self.policy.steps, stopped_at) if limit is not None]
        last = self.roster.last = min(limits, default=-1)
        while last < 0 or self.version < last:
            closed = self._run_until_closed()
            if closed is None:
                return
            yield closed
            if self.version == closed.step:
                raise RuntimeError(
                    f"step {closed.step} was closed but not published: call step.publish() before "
                    "the next one"
                )

    def stop(self) -> None:
        """End the training before another step closes."""
        self._stop_asked = True

    def _run_until_closed(self) -> ClosedStep | None:
        """Run until the open step closes, and return it; None when there will be no further one."""
        player = self.collector.player
        while True:
            self._hear()
            self._take_whole(self._payloads.progress())
            if self._payloads.queue and not player.is_closing:
                self._payloads.ask(player.lacking, self.clock(), self._make_room)
            if self._stop_asked or self.collector.has_no_samples():
                return None
            now_s = self.clock()
            if player.closes(now_s):
                return self._close(now_s)
            if not player.step.alive:  # asked last: what was accepted of those who have left counts
                return None
            self._idle(now_s)

    def _hear(self) -> None:
        """Judge the gradients that workers announced, and answer what else they say."""
        heard = self.inbox.take()
        times = Counter(at_s for at_s, *_ in heard) if heard else {}
        while heard and not self.collector.player.is_closing:
            at_s, _, header = heard.popleft()
            member = self.roster.members[header.worker]
            if header.kind != Kind.GRADIENT:
                self.tell()  # a worker may have left while its gradient was on its way
                self.answer(member, header)
            elif header.loop < self._loops:
                self.register(header, at_s)
                self.collector.give_up(header.worker, LOOP_OVER, may_return=False)
            else:
                self.register(header, at_s, is_tie=times[at_s] > 1)
                self.collector.player.judge(header.worker)
        self.tell()

    def register(self, header: Header, at_s: float, *, is_tie: bool = False) -> None:
        """Take note of a gradient's header."""
        arrival = Arrival(header.worker, header.sequence, header.version, at_s)
        self.collector.register(arrival, header.info, header.handed, is_tie=is_tie)
        member = self.roster.members[header.worker]
        member.state, member.pending_header = State.ANNOUNCED, header

    def _take_whole(self, workers: list[int]) -> None:
        """Judge the asked-for gradients whose last bytes are in: now is when they arrived."""
        if not workers:
            return
        now_s = self.clock()
        for worker in self._ties.sample(workers, len(workers)):  # no rank goes before another
            if self.roster.members[worker].state is State.WANTED:
                self.collector.whole(worker, now_s, is_tie=len(workers) > 1)
                self.tell()

    def tell(self) -> None:
        """Carry out the collector's decisions: add accepted gradients to the sum, tell other workers their verdicts."""
        reason = ""
        for gradient, refusal, late_by, again in self.collector.decided():
            member = self.roster.members[gradient.worker]
            if refusal is None:
                member.state = State.ACCEPTED
                self._add(member, gradient)
                continue
            status = Status.LATE if refusal.verdict == "late" else Status.REJECTED
            text = refusal.reason or "late"
            self._answer_gradient(member, status, gradient, late_by=late_by, text=text, again=int(again))
            if status is Status.REJECTED:
                reason = self.collector.divergence
        if reason:
            self._fail(reason)

    def _add(self, member: Member, gradient: Gradient) -> None:
        """Add an accepted gradient to the sum; where one holds initial parameters, the first such is all of it."""
        if self._initial is not None:
            return
        info = gradient.info
        if info.initial:
            self._sum.forget()
            self._initial, info = gradient, info._replace(samples=1)
        self._sum.add(member.link, gradient.worker, info)

    def _make_room(self) -> bool:
        """Fold the accepted gradients, so that their memory is free again; say whether there were any."""
        workers = self._sum.pending
        if workers:
            self._sum.fold()
            for worker in workers:
                self._payloads.release(worker)
        return bool(workers)

    def _close(self, now_s: float) -> ClosedStep:
        """Hand out the closed step for its update."""
        self.roster.begin(self.version + 1)
        initial, self._initial = self._initial, None
        return ClosedStep(
            self.version,
            self.collector.gradients,
            self._sum,
            self._segments,
            now_s,
            self.clock,
            self._publish,
            initial=None if initial is None else initial.worker,
        )

    def _publish(self, closed: ClosedStep) -> StepRecord:
        """Publish the next version, give the verdicts, open the next step."""
        if closed.step != self.version:
            raise RuntimeError(f"step {closed.step} was published already")
        sums, updated_s, roster = closed.fold(), self.clock(), self.roster
        roster.publish(self.version + 1, self.parameters)
        self._answer_accepted()
        roster.serve_waiting()
        roster.flush()
        published_s = self.clock()
        record = self.collector.close(
            roster.living,
            closed_s=closed.closed_s,
            published_s=published_s,
            samples_used=closed.samples,
            reduce_s=closed.reduced_s - closed.closed_s,
            update_s=updated_s - closed.reduced_s,
            publish_s=published_s - updated_s,
            updated=sums.finite,
            norms=None if closed.initial is not None else (sums.gradient_squares, sums.sum_squares),
        )
        if self.version != roster.last:  # else no step follows: whoever ends the loop gives the last verdicts
            self.collector.player.judge_again()
            self.tell()
        return record

    # -- verdicts and other answers ----------------------------------------------------------------

    def _answer_accepted(self) -> None:
        for gradient in self.collector.gradients:
            member = self.roster.members[gradient.worker]
            if member.state is State.ACCEPTED:
                self._answer_gradient(member, Status.ACCEPTED, gradient)
            elif not member.is_alive:  # nobody is left to be answered
                self._payloads.release(gradient.worker)

    def _answer_gradient(self, member: Member, status: Status, gradient: Gradient, **more: Any) -> None:  # noqa: ANN401
        """Tell a worker its verdict: it has its buffer back and may go on."""
        header = member.pending_header
        if header is None:
            raise RuntimeError(f"worker {member.worker} has no gradient to be judged: the protocol is broken")
        resume = self._resumes_at(member.worker, header.sequence + 1)
        self._payloads.release(member.worker)
        waited_s = self.clock() - gradient.arrival.at_s
        step = self.collector.player.step.step
        self.roster.reply(member, header, status, step, resume, waited_s=waited_s, **more)
        member.state, member.pending_header = State.COMPUTING, None
        if header.loop == self._loops:  # else its worker takes the version at which that loop ended
            self.roster.resume(member, resume)

    def answer(self, member: Member, header: Header) -> None:
        """Take note of a header that announces no gradient, and answer it.

        Raises:
            PeerFailed: The worker says that it failed.
            ValueError: It claims a batch of other data than the root's.
        """
        collector, worker = self.collector, member.worker
        collector.accounts[worker].handed = header.handed
        if header.kind == Kind.FAIL:
            self._fail(f"{member.peer} failed: {header.text}")
        if header.kind == Kind.STOP:
            self.stop()
        if header.kind in (Kind.LEAVE, Kind.BYE):
            member.peak_rss_bytes = header.peak_rss_bytes
            self.lose(member, State.LEFT if header.kind == Kind.LEAVE else State.GONE)
        if header.kind == Kind.CLAIM:
            self.acknowledge(member, header, batch=collector.late.claim(worker, self._behind(), header.info.batches))
        elif header.kind == Kind.PASS:
            # batches left no gradient: given up as late or at the end, or for reasons of the loop's own
            may_return = collector.player.would_be_late(header.version) or self._is_paused or self._has_ended
            again = collector.pass_over(worker, header.info, may_return=may_return)
            self.acknowledge(member, header, again=again)
        else:
            resume = self.acknowledge(member, header)
            if header.kind == Kind.READY and header.loop > self._loops:  # it has left this loop, for the next
                self.lose(member, State.LEFT)
                member.returns = True
            elif header.kind == Kind.READY and header.loop == self._loops:
                self.roster.resume(member, resume)

    def acknowledge(self, member: Member, header: Header, **more: Any) -> int:  # noqa: ANN401 (as in Roster.acknowledge)
        """Answer a header on which there is no verdict; return the version of the worker's next computation."""
        step, sequence = self.collector.player.step.step, self.collector.next_sequence(member.worker)
        resume = self._resumes_at(member.worker, sequence)
        self.roster.acknowledge(member, header, step, resume, **more)
        return resume

    def _resumes_at(self, worker: int, sequence: int) -> int:
        """Return the version at which a worker's next computation begins; nobody computes on a loop's last."""
        is_last = self.version == self.roster.last
        return self.version + 1 if is_last else self.policy.resumes_at(worker, sequence, self.version)

    def _behind(self) -> list[int]:
        """Return the workers whose gradients will be late for sure, whatever they do."""
        # What a worker was let have may have been superseded before it looked, so it may be a version ahead of that.
        would_be_late = self.collector.player.would_be_late
        return [
            member.worker
            for member in self.roster.members
            if member.state is State.COMPUTING and member.waits_for < 0 and would_be_late(member.served + 1)
        ]

    # -- waiting -----------------------------------------------------------------------------------

    def _idle(self, now_s: float) -> None:
        """Use the time until something comes: answer, fold early if that pays, look for ended workers, sleep."""
        player = self.collector.player
        if player.policy.staleness != 0:  # workers need not wait for the next version
            self._make_room()
            self._answer_accepted()
        self.roster.flush()
        wake_s = min(player.policy.wakes_at(player.step), now_s + _LOOK_AFTER_S)
        if self._folds_early and self._sum.pending:
            # a fuller pass is worth waiting for as long as the pass itself takes
            pass_s = self._layout.size_bytes / _FOLD_BYTES_PER_S
            fold_s = player.accepted_s + max(pass_s, _FOLD_AFTER_S)
            if now_s >= fold_s:
                self._make_room()
                return
            wake_s = min(wake_s, fold_s)
        if now_s >= self._look_after_s:
            self._look_after_s = now_s + _LOOK_AFTER_S
            self._look_for_ended()
            self._stalls.look(now_s, player.step, self.roster.members, player.policy.target(player.step))
        # of large gradients each is worth a look, for what is folded early delays no step's end
        is_small = self._layout.size_bytes <= _SMALL_BYTES
        self.roster.wait(wake_s - now_s, player.policy.lacks(player.step) if is_small else 1)

    def _look_for_ended(self) -> None:
        """Lose the workers whose processes have ended without a word.

        Raises:
            PeerFailed: No worker is left.
        """
        for member in self.roster.ended():
            self.lose(member, State.LOST)
            if not self.collector.player.step.alive:
                self._fail(f"{member.peer} ended, and no worker is left")

    # -- ends --------------------------------------------------------------------------------------

    def go_on(self) -> None:
        """Begin another loop, where one has ended."""
        if self._is_paused:
            self._is_paused, self.collector.late.goes_on = False, True
            self.roster.go_on()
            self.collector.player.step.alive = self.roster.living

    def pause(self) -> None:
        """Tell every worker that the loop has ended at the newest version."""
        self._loops, self._is_paused = self._loops + 1, True
        self.roster.pause(self._loops)
        self.roster.flush()

    def lose(self, member: Member, state: State) -> None:
        """Expect no further gradient of a worker; an accepted one counts all the same."""
        if member.state in (State.ANNOUNCED, State.WANTED):
            self._payloads.release(member.worker)
        self.collector.lose(member.worker)
        member.state, member.waits_for = state, -1
        self.collector.player.step.alive = self.roster.living

    def end(self, failure: str) -> None:
        """Tell every worker, once, that the training has ended at the newest version."""
        if not self._has_ended:
            self._has_ended, self.collector.late.goes_on = True, False
            self.roster.end(failure)

    def _fail(self, reason: str) -> None:
        """End the training on every rank.

        Raises:
            PeerFailed: Always.
        """
        self.end(reason)
        self.roster.flush()
        raise PeerFailed(reason)

    def abandon(self) -> None:
        """Give up the open step: what was accepted into it will not be used."""
        waiting = {member.worker for member in self.roster.members if member.state is State.ACCEPTED}
        self.collector.abandon(waiting)
        self._sum.forget()
        self._initial = None
