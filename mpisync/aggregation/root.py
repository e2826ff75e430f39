"""The root aggregator: one event loop that accepts the first gradients of each step and discards late ones.

The loop owns all state and runs in one thread. A step goes through

    open → (judge headers, ask for payloads, accept whole gradients, fold) → closed → updated → published = next open

and from *closed* to *published* nothing is judged: what arrives then meets the next step.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from mpisync.aggregation.answers import answer
from mpisync.aggregation.closed_step import AcceptedGradient, ClosedStep
from mpisync.aggregation.errors import PeerFailed
from mpisync.aggregation.inbox import Inbox
from mpisync.aggregation.late_work import Discard
from mpisync.aggregation.ledger import Ledger
from mpisync.aggregation.members import Member, Outcome, State
from mpisync.aggregation.payloads import PayloadQueue
from mpisync.aggregation.running_sum import RunningSum, Sums
from mpisync.aggregation.sample_pool import BatchId
from mpisync.aggregation.stalls import StallReport
from mpisync.kernels.fold import Reducer
from mpisync.policies import Arrival, Decision, OpenStep, Policy
from mpisync.records import StepRecord
from mpisync.transport.base import End, RootLink
from mpisync.transport.layout import Layout, SgdSpan
from mpisync.transport.peers import Peer
from mpisync.transport.wire import Header, Kind, Reply, ReplyKind, Status

_LOOK_AFTER_S = 0.25  # how often an idle root looks whether its workers' processes live
_FOLD_BYTES_PER_S = 10e9  # how fast a fold is at least; decides when an early one pays
_SMALL_BYTES = 256 << 10  # to wake up for one costs more than to fold it
_FOLD_AFTER_S = 1e-3  # a small one costs more by being a call of its own than it saves
TAKEN_OVER = "its samples were given to another worker too, who was first"
REJECTIONS_PER_WORKER = 20  # in a row, without one accepted, before training is given up


class Root:
    """Serves steps to workers.

    Args:
        peers: The processes of all ranks; the last is this one.
        links: One a transport; together they reach every worker once.
        layout: Of a gradient.
        parameters: Bytes of the parameters as they are to be published, filled already.
        policy: When a step closes and what counts.
        reducer: Folds gradients.
        weighted: Weight gradients by their samples instead of equally.
        norms: Compute squared norms with the mean.
        late: What becomes of late gradients' samples; they are discarded unless given.
        clock: Monotonic seconds; that of the workers on this node.
        stall_report_s: After how long an open step is reported.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        links: Sequence[RootLink],
        layout: Layout,
        parameters: np.ndarray,
        policy: Policy,
        reducer: Reducer,
        *,
        weighted: bool = False,
        norms: bool = False,
        late: Discard | None = None,
        clock: Callable[[], float] = time.monotonic,
        stall_report_s: float = 10.0,
    ) -> None:
        self.policy, self.parameters, self.version = policy, parameters, 0
        self.links, self.clock, self.me = list(links), clock, peers[-1]
        self.members = [
            Member(worker, peers[worker], link) for link in links for worker in link.workers
        ]
        self.members.sort(key=lambda member: member.worker)
        for member in self.members:
            member.since_s = clock()
        policy.check(len(self.members))
        norms = norms or policy.wants_norms
        self.ledger = Ledger(layout.size_bytes)
        self.late = Discard() if late is None else late
        blocks = layout.wholes if all(link.is_contiguous for link in links) else layout.blocks
        self._sum = RunningSum(layout, reducer, blocks, norms=norms)
        self._layout, self._weighted, self._norms = layout, weighted, norms
        self._lots = random.Random(0)
        self.inbox = Inbox(self.links, self.members, self.me, clock, self._lots)
        self._asking = PayloadQueue(self.members)
        self._rejected_in_a_row = 0
        self._stop_asked = False
        self._last: int | None = None  # the version at which the training ends
        self.has_ended = False
        self._look_after_s = 0.0
        self._stalls = StallReport(stall_report_s, self.me)
        self._taken: list[AcceptedGradient] = []  # the accepted gradients of the open step
        self._folded = 0  # how many of them are in the sum
        self._extras: list[np.ndarray] = []
        self._segments = layout.arrays(parameters)
        self._reduced_s = 0.0
        for link in self.links:
            link.publish(0, parameters)
            link.flush()
        self._open([])

    # -- the loop ----------------------------------------------------------------------------------

    def serve(self, steps: int | None = None) -> Iterator[ClosedStep]:
        """Yield each closed step, until version `steps` or until nobody is left to contribute.

        Raises:
            PeerFailed: A worker's loop ended with an exception, no worker is left alive, or every
                gradient is rejected.
            RuntimeError: A closed step was not published.
        """
        limits = [limit for limit in (steps, self.policy.steps) if limit is not None]
        self._last = min(limits, default=None)
        while self._last is None or self.version < self._last:
            closed = self._gather()
            if closed is None:
                return
            yield closed
            if self.version == closed.step:
                raise RuntimeError(
                    f"step {closed.step} was closed but not published: call step.publish() before "
                    "the next one"
                )

    @property
    def mean(self) -> list[np.ndarray]:
        """Where every step's mean will be, one array a segment."""
        return self._sum.mean

    def stop(self) -> None:
        """End the training before another step closes."""
        self._stop_asked = True

    def _gather(self) -> ClosedStep | None:
        """Run until the open step closes; None when there will be no further one."""
        while True:
            self._hear()
            self._take_whole(self._asking.progress())
            if self._asking.queue and not self._is_closing:
                lacking = self.policy.target(self._step) - len(self._step.accepted)
                self._asking.ask(lacking, self.clock(), self._make_room)
            if self._stop_asked or self._has_no_samples():
                return None
            now_s = self.clock()
            if self._is_closing or self.policy.closes(self._step, now_s):
                return self._close(now_s)
            if not self._step.alive:  # asked last: what was accepted of those who have left counts
                return None
            self._idle(now_s)

    def _has_no_samples(self) -> bool:
        """Whether all samples are used, so that no further step can be."""
        self._step.remaining = self.late.remaining
        return self._step.remaining == 0 and not self._step.accepted

    def _hear(self) -> None:
        heard = self.inbox.take()
        times = Counter(at_s for at_s, *_ in heard) if heard else {}
        while heard and not self._is_closing:
            at_s, _, header = heard.popleft()
            member = self.members[header.worker]
            if header.kind != Kind.GRADIENT:
                answer(self, member, header)
                continue
            self.announced(member, header, at_s, is_tie=times[at_s] > 1)
            self._judge(member)

    def note(
        self, member: Member, header: Header, *, status: Status = Status.NOTED, lot: BatchId | None = None
    ) -> int:
        """Answer a header that is no gradient's; the version at which the worker's next computation begins."""
        resume = self.policy.resumes_at(member.worker, member.next_sequence, self.version)
        self._reply(member, header, status, resume=resume, lot=lot)
        return resume

    def is_past(self, version: int) -> bool:
        """Whether a gradient of this version would be late."""
        staleness = self.policy.staleness
        return staleness is not None and version + staleness < self.version

    def announced(self, member: Member, header: Header, at_s: float, *, is_tie: bool) -> None:
        """Take note of a gradient's header."""
        if header.sequence != member.next_sequence or not 0 <= header.version <= self.version:
            raise RuntimeError(
                f"worker {member.worker} sent gradient {header.sequence} of version "
                f"{header.version}, but its gradient {member.next_sequence} of a version up to "
                f"{self.version} is due: the protocol is broken"
            )
        member.next_sequence += 1
        member.account.handed = header.handed
        member.work = self.late.begin(member, header)
        member.state, member.header, member.is_tie = State.ANNOUNCED, header, is_tie
        member.arrival = Arrival(member.worker, header.sequence, header.version, at_s)
        member.compute_s.append(header.compute_s)

    def _judge(self, member: Member) -> None:
        """Decide about an announced gradient; lateness comes before anything else."""
        arrival, step = member.came, self._step
        decision = self.policy.judge(arrival, step)
        if decision is Decision.LATE:
            self.refuse(member, Status.LATE)
        elif decision is Decision.HOLD:
            self._unhold(member)
            step.held.append(arrival)
        elif member.said.peak == math.inf:
            self.refuse(member, Status.REJECTED, "the gradient has NaN or Inf")
            self._count_rejection()
        elif self.late.is_used(member.done):
            self.refuse(member, Status.LATE, TAKEN_OVER)
        elif self._asking.is_whole(member):
            self._accept(member)
        else:
            self._asking.add(member)

    def _accept(self, member: Member) -> None:
        """Count a whole gradient; nothing of it has entered the sum before."""
        step, weight = self._step, float(member.said.samples) if self._weighted else None
        self._unhold(member)
        step.accepted.append(member.came)
        member.state = State.ACCEPTED
        self._sum.add(member.link, member.worker, weight, member.said.peak)
        self._taken.append(AcceptedGradient(member, member.said, member.came, member.done, member.is_tie))
        self.late.accept(member, member.done)
        self._rejected_in_a_row = 0
        self._accepted_s = self.clock()
        self._is_closing = self.policy.closes(step, self._accepted_s)
        for arrival in list(step.held):
            if arrival in step.held and not self._is_closing:
                self._judge(self.members[arrival.worker])

    def _take_whole(self, workers: list[int]) -> None:
        """The last bytes of asked-for gradients are in: now is when they arrived."""
        now_s = self.clock()
        for worker in self._lots.sample(workers, len(workers)) if workers else ():  # no rank goes before another
            member = self.members[worker]
            if member.state is State.WANTED:
                member.arrival = replace(member.came, at_s=now_s)
                member.is_tie = len(workers) > 1
                if not self._is_closing:  # else it is judged when the next step opens
                    self._judge(member)

    def _make_room(self) -> bool:
        has_pending = self._sum.has_pending
        if has_pending:
            self._fold_now()
        return has_pending

    # -- verdicts ----------------------------------------------------------------------------------

    def refuse(self, member: Member, status: Status, reason: str = "") -> None:
        """Give a verdict that is not acceptance."""
        self._forget(member)
        late_by = self.version - member.said.version if status == Status.LATE else 0
        outcome: Outcome = "late" if status == Status.LATE else "rejected"
        may_return = outcome == "late" and member.said.peak < math.inf
        self.late.refuse(member, member.done, outcome, may_return=may_return)
        self.ledger.enter(
            outcome,
            member,
            member.said,
            member.came,
            member.done,
            self._step.opened_s,
            late_by=late_by,
            reason=reason or None,
            travelled=self._asking.is_whole(member),
        )
        self._answer(member, status, late_by, reason or "late")

    def _forget(self, member: Member) -> None:
        self._asking.drop(member)
        self._unhold(member)

    def _unhold(self, member: Member) -> None:
        self._step.held[:] = [a for a in self._step.held if a.worker != member.worker]

    def _answer(
        self, member: Member, status: Status, late_by: int = 0, reason: str = ""
    ) -> None:
        """Tell the verdict: the worker has its buffer back and may go on."""
        header = member.said
        resume = self.policy.resumes_at(member.worker, header.sequence + 1, self.version)
        self._asking.release(member)
        self._reply(member, header, status, resume=resume, late_by=late_by, reason=reason)
        member.state, member.header, member.arrival, member.work = State.COMPUTING, None, None, None
        self.resume(member, resume)

    def _reply(
        self,
        member: Member,
        header: Header,
        status: Status,
        *,
        resume: int,
        late_by: int = 0,
        reason: str = "",
        lot: BatchId | None = None,
    ) -> None:
        epoch, batch = (-1, -1) if lot is None else lot
        reply = Reply(
            header.incarnation,
            ReplyKind.VERDICT,
            status,
            member.worker,
            header.ordinal,
            step=self._step.step,
            newest=self.version,
            late_by=late_by,
            resume=resume,
            waited_s=self.clock() - member.arrival.at_s if member.arrival else 0.0,
            epoch=epoch,
            batch=batch,
            text=reason,
        )
        member.link.reply(member.worker, reply)

    def resume(self, member: Member, version: int) -> None:
        """Let a worker have `version`, now or when it is there."""
        member.waits_for = version
        if version <= self.version:
            self.serve_parameters(member)

    def serve_parameters(self, member: Member) -> None:
        """Let a worker that waits for them have the newest parameters."""
        member.waits_for, member.served, member.since_s = -1, self.version, self.clock()
        member.link.serve(member.worker)

    def _count_rejection(self) -> None:
        self._rejected_in_a_row += 1
        limit = REJECTIONS_PER_WORKER * len(self._step.alive)
        if self._rejected_in_a_row >= limit:
            self.fail(
                f"the last {limit} gradients all had NaN or Inf: training has diverged at version "
                f"{self.version}; lower the learning rate or clip the gradient"
            )

    def fail(self, reason: str) -> None:
        """End the training on every rank.

        Raises:
            PeerFailed: Always.
        """
        self.end(reason)
        for link in self.links:
            link.flush()
        raise PeerFailed(reason)

    def end(self, failure: str) -> None:
        """Tell every worker, once, that the training has ended at the newest version."""
        if not self.has_ended:
            self.has_ended, self.late.goes_on = True, False
            for link in self.links:
                link.end(End(self.version, failure))

    def abandon(self) -> None:
        """Give up the open step: what was accepted into it will not be used."""
        for taken in self._taken:
            is_open = taken.member.is_alive and taken.header is taken.member.header  # it will be refused
            self.late.abandon(taken.member, taken.work, is_told=not is_open)
        self._taken.clear()
        self._step.accepted.clear()
        self._sum.forget()

    # -- folding, closing, opening -----------------------------------------------------------------

    def _fold_now(self) -> None:
        """Fold what is pending, so that its memory is free again."""
        self._take_extras()
        self._sum.fold(weighted=self._weighted)
        for taken in self._taken[self._folded :]:
            self._asking.release(taken.member)
        self._folded = len(self._taken)

    def _take_extras(self) -> None:
        if self._layout.extras_bytes:
            block = self._layout.blocks[-1]
            for taken in self._taken[self._folded :]:
                self._extras.append(taken.member.link.gradient(taken.member.worker, block).copy())

    def _answer_early(self) -> None:
        """Where workers need not wait for the next version: go on once the gradient is in the sum."""
        if self.policy.staleness == 0:
            return
        if self._sum.has_pending:
            self._fold_now()
        self._answer_accepted()

    def _answer_accepted(self) -> None:
        for taken in self._taken:
            if taken.member.state is State.ACCEPTED:
                self._answer(taken.member, Status.ACCEPTED)

    def _close(self, now_s: float) -> ClosedStep:
        step, headers = self._step, [taken.header for taken in self._taken]
        samples = sum(header.samples for header in headers)
        divisor = float(samples if self._weighted else len(headers))
        self._take_extras()
        for link in self.links:
            link.begin(self.version + 1)

        def fold() -> Sums:
            sums = self._sum.fold(divisor, weighted=self._weighted)
            self._reduced()
            return sums

        def fused_sgd_step(spans: Sequence[SgdSpan]) -> bool:
            if not self._sum.fused_sgd_step(self._segments, spans, divisor, weighted=self._weighted):
                return False
            self._reduced()
            return True

        return ClosedStep(
            step=step.step,
            accepted=[(arrival.worker, arrival.sequence) for arrival in step.accepted],
            extras=self._extras,
            samples=samples,
            loss=sum(header.loss for header in headers) / len(headers),
            fingerprints=[header.fingerprint for header in headers],
            closed_s=now_s,
            _fold=fold,
            _fused_sgd_step=fused_sgd_step,
            _publish=self._publish,
            _mean=self._sum.mean,
        )

    def _reduced(self) -> None:
        """The gradients are in the sum, or in the parameters."""
        for taken in self._taken[self._folded :]:
            if not taken.member.is_alive:  # nobody is left to be answered
                self._asking.release(taken.member)
        self._reduced_s = self.clock()

    def _publish(self, closed: ClosedStep) -> StepRecord:
        """Turn the version, give the verdicts, open the next step."""
        if closed.step != self.version:
            raise RuntimeError(f"step {closed.step} was published already")
        sums = closed.sums
        updated_s = self.clock()
        self.version += 1
        for link in self.links:
            link.publish(self.version, self.parameters)
        if self.version == self._last:
            self.end("")  # with the last version, so that nobody computes on it
        self._answer_accepted()
        for member in self.members:
            if 0 <= member.waits_for <= self.version:
                self.serve_parameters(member)
        for link in self.links:
            link.flush()
        record = self._recorded(closed, sums, updated_s)
        self.policy = self.policy.after(record)
        self._open(self._step.held)
        return record

    def _recorded(self, closed: ClosedStep, sums: Sums, updated_s: float) -> StepRecord:
        step, ledger, published_s = self._step, self.ledger, self.clock()
        for t in self._taken:
            self.late.use(t.member, t.work)
            ledger.enter("accepted", t.member, t.header, t.arrival, t.work, step.opened_s, tie=t.is_tie)
        return StepRecord(
            step=step.step,
            opened_s=step.opened_s,
            closed_s=closed.closed_s,
            published_s=published_s,
            target=self.policy.target(step),
            alive=len(step.alive),
            accepted=[(a.worker, a.sequence, a.version) for a in step.accepted],
            arrivals=ledger.arrivals,
            samples_used=closed.samples,
            reduce_s=self._reduced_s - closed.closed_s,
            update_s=updated_s - self._reduced_s,
            publish_s=published_s - updated_s,
            updated=sums.finite,
            counts=dict(ledger.counts),
            norms=(sums.gradient_squares, sums.sum_squares) if self._norms else None,
            why=self.policy.why,
        )

    def _open(self, held: list[Arrival]) -> None:
        """Open the step of the newest version and judge again what is already there."""
        self._step = OpenStep(self.version, self.clock(), len(self.members), set(), held=held)
        self._step.remaining = self.late.remaining
        self._count_living()
        self.ledger.arrivals = []
        self._taken, self._folded, self._extras = [], 0, []
        self._is_closing = False
        self._accepted_s = self._step.opened_s
        if self.has_ended:
            return  # no step follows; `farewell` gives the last verdicts
        known = [m for m in self.members if m.state in (State.ANNOUNCED, State.WANTED)]
        for member in sorted(known, key=lambda member: (member.came.at_s, self._lots.random())):
            if not self._is_closing and member.state in (State.ANNOUNCED, State.WANTED):
                self._judge(member)

    def _count_living(self) -> None:
        self._step.alive = {member.worker for member in self.members if member.is_alive}

    # -- waiting -----------------------------------------------------------------------------------

    def _idle(self, now_s: float) -> None:
        """Nothing can be done at once: answer, fold early if that pays, look around, sleep."""
        self._answer_early()
        for link in self.links:
            link.flush()
        wake_s = min(self.policy.wakes_at(self._step), now_s + _LOOK_AFTER_S)
        if self._sum.has_pending:
            # a fuller pass is worth waiting for as long as the pass itself takes
            pass_s = self._layout.size_bytes / _FOLD_BYTES_PER_S
            fold_s = self._accepted_s + max(pass_s, _FOLD_AFTER_S)
            if now_s >= fold_s:
                self._fold_now()
                return
            wake_s = min(wake_s, fold_s)
        if now_s >= self._look_after_s:
            self._look_after_s = now_s + _LOOK_AFTER_S
            self.look_for_lost()
            self._stalls.look(now_s, self._step, self.members, self.policy.target(self._step))
        # of large gradients each is worth a look, for what is folded early delays no step's end
        is_small = self._layout.size_bytes <= _SMALL_BYTES
        self.wait(wake_s - now_s, self.policy.lacks(self._step) if is_small else 1)

    def wait(self, timeout_s: float, headers: int = 1) -> None:
        """Sleep until something may have come.

        Only memory can wake a sleeper: with messages too, theirs, the last link, is the one that
        sleeps, and never long.
        """
        self.links[-1].wait(max(0.0, timeout_s), headers)

    def look_for_lost(self) -> None:
        """A worker whose process has ended without a word is late for ever.

        Raises:
            PeerFailed: No worker is left.
        """
        for member in self.members:
            if member.state in (State.LOST, State.GONE) or not self.me.sees(member.peer):
                continue
            if member.peer.state() is None:
                self.lose(member, State.LOST)
                if not self._step.alive:
                    self.fail(f"{member.peer} ended, and no worker is left")

    def lose(self, member: Member, state: State) -> None:
        """Expect no further gradient of a worker; one that was accepted counts all the same."""
        if member.state in (State.ANNOUNCED, State.WANTED):
            self._forget(member)
            self._asking.release(member)
            self.late.withdraw(member, member.done)
        self.late.lose(member, sum(taken.header.samples for taken in self._taken if taken.member is member))
        member.state, member.waits_for = state, -1
        self._count_living()

    def close(self) -> None:
        """Give back receives and memory."""
        for link in self.links:
            link.close()
