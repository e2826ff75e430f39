"""A worker's role in a torch session."""

from __future__ import annotations

import math
import sys
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI
from torch import nn
from torch.optim import Optimizer

from mpisync import settings
from mpisync.aggregation.late_work import Carry, Requeue, Retry
from mpisync.aggregation.shutdown import leave_worker
from mpisync.aggregation.verdict import Verdict
from mpisync.data.batches import Batches
from mpisync.data.continued import ContinuedBatches
from mpisync.data.retry import RetriedBatches
from mpisync.model.carry import CarriedGradient
from mpisync.model.copies import Values
from mpisync.model.flat import Packed
from mpisync.model.gradients import peak_of
from mpisync.model.guards import REMEDY
from mpisync.model.scheduler import Schedule
from mpisync.model.update import Averages
from mpisync.model.write_fault import FaultNotice
from mpisync.session.accumulation import AccumulatedBatches, Accumulation
from mpisync.session.distributed_model import DistributedModel
from mpisync.session.loop import LoopOptions
from mpisync.session.loop_guards import LoopGuards
from mpisync.session.options import Options
from mpisync.session.roles.base import Role
from mpisync.session.torch_threads import torch_threads
from mpisync.session.worker_parameters import WorkerParameters
from mpisync.transport.wire import GradientInfo


class WorkerRole(Role):
    """The role of a worker, which draws batches, sends gradients and takes parameters."""

    worker: int
    makes_updates = False

    def __init__(
        self, comm: MPI.Intracomm, model: nn.Module, optimizers: Sequence[Optimizer], options: Options
    ) -> None:
        self._distributed = DistributedModel(comm, model, optimizers, options, "")
        self._participant, self._flat = self._distributed.participant, self._distributed.flat
        self._seed = options.seed
        self._worker = self._participant.worker()
        self.worker, self.workers = comm.rank, comm.size - 1
        self._threads = torch_threads(self._participant.meeting)
        link = self._worker.link
        memory = self._participant.memory
        # where the link's memory is not the model's, a gradient is made beside the model and moves there whole
        self._gradient = link.gradient if link.memory is memory else memory.allocate(link.layout.size_bytes)
        self._slot = self._flat.views(link.layout.arrays(self._gradient))
        extras = link.layout.extras(self._gradient)
        self._sent_presence = extras[: len(self._flat.parameters)]
        self._presence = self._sent_presence if memory.is_host else np.zeros(len(self._flat.parameters), np.uint8)
        self._buffers = self._flat.buffers.views(extras[self._distributed.presence_bytes :])
        # A gradient that is late and counts all the same needs parameters that stay as they are while it is computed.
        needs_copy = options.own_copy or (isinstance(options.on_late, Carry) and link.shares_parameters)
        in_place = self._participant.reads_in_place and not needs_copy and memory.is_host
        self._schedule = Schedule(options.schedulers, optimizers, options.metric_schedulers)
        self._guards = LoopGuards(model, optimizers, options.schedulers, tells=self.worker == 0)
        read_only = bool(settings.read("MPISYNC_READ_ONLY"))
        self._notice = self._make_read_only(in_place) if read_only else None
        self._parameters = WorkerParameters(
            model,
            self._distributed,
            self._worker,
            own_copy=options.own_copy,
            in_place=in_place,
            read_only=self._notice is not None,
        )
        self._accumulation = Accumulation(self._flat.parameters, optimizers, weighted=options.weight == "samples")
        self._data = ContinuedBatches(self.worker, self.workers, options.seed)
        self._is_in_loop = False
        self._late = options.on_late
        self._retried: RetriedBatches | None = None
        self._carried: CarriedGradient | None = None
        if isinstance(options.on_late, Carry):
            weighted, limit = options.weight == "samples", options.on_late.max_staleness
            self._carried = CarriedGradient(self._slot, self._presence, limit, weighted=weighted)
        self._kept_averages: Averages | None = None
        self._has_average = options.ema is not None

    def _make_read_only(self, in_place: bool) -> FaultNotice | None:
        """Make the shared parameters read-only, and have a write to them explained before it ends the process."""
        link = self._worker.link
        if in_place and link.protect():
            return FaultNotice(link.parameters, f"mpisync: worker {self.worker} wrote to a parameter: {REMEDY}")
        if self.worker == 0:
            print(
                "mpisync: MPISYNC_READ_ONLY has no effect: workers have copies of their own, not shared memory",
                file=sys.stderr,
                flush=True,
            )
        return None

    @property
    def version(self) -> int:
        """The version of the parameters that this worker has."""
        return self._worker.version

    @property
    def averages(self) -> Averages | None:
        """Each parameter with its average, at the end."""
        return self._kept_averages

    def batches(self, loader: Iterable[Any], loop: LoopOptions) -> Generator[Any, None, None]:
        """Yield batches until the root ends the loop."""
        self._begin()
        data = self._open(loader, loop)
        self._pull()
        try:
            while self._is_in_loop and (drawn := next(data, None)) is not None:
                self._worker.handed += data.batch_samples
                self._accumulation.add(data, drawn[0])
                yield drawn[0]
                if self._is_in_loop and (passed := self._accumulation.passed()):
                    self._pass_over(passed)
                # a gradient is of one version: only the end comes between its batches
                if self._is_in_loop and self._worker.is_stale(by_end=self._accumulation.goes_on()):
                    self._pull()
            self._accumulation.drop()
        finally:
            if self._is_in_loop:  # it was left before its end
                self._data.close()

    def _begin(self) -> None:
        """Make ready for a loop: what was done since the one before has no effect on it."""
        if self._is_in_loop:  # that one was left by `break`
            self._accumulation.drop()
            self._end_loop()
        self._is_in_loop = True
        if self._carried is not None:
            self._carried.drop()
        self._guards.begin(is_first=self._worker.version < 0)
        self._parameters.begin()

    def _open(self, loader: Iterable[Any], loop: LoopOptions) -> Batches | RetriedBatches:
        """Return this worker's batches, from where the loop before, or a resumed run, left off."""
        if loop.resume is not None:
            self._worker.handed = loop.handed(self.worker, self.workers)
        batches = self._data.of(
            loader,
            claim=self._worker.claim if isinstance(self._late, Requeue) else None,
            start=loop.batches(self.worker),
        )
        if not isinstance(self._late, Retry):
            return batches
        if self._retried is None or self._retried.batches is not batches:
            self._retried = RetriedBatches(batches, worker=self.worker, seed=self._seed)
        return self._retried

    def _pass_over(self, passed: AccumulatedBatches) -> None:
        """Tell the root of batches that left no gradient; they come back if that was for being late."""
        self._worker.pass_over(samples=passed.samples, batches=passed.batches)
        if self._retried is not None:
            self._retried.judged(again=self._worker.again)

    def step(self, loss: float, samples: int | None, cost: float) -> Verdict:
        """Send the gradient, learn its verdict, take the newest parameters."""
        initialised = self._parameters.check()  # first: a hook that steps in backward leaves no gradient either
        self._guards.check(has_gradient=self._accumulation.has_gradient())
        basis = self._accumulation.take(samples, is_vain=self._is_late)
        packed = self._flat.pack_gradients(self._slot)
        self._guards.check_structure(packed.presence)
        if initialised:  # these parameters go where the gradient would
            self._flat.store(self._slot)
            packed = Packed(packed.presence, max(peak_of(segment) for segment in self._slot.segments))
        self._presence[:] = np.frombuffer(packed.presence, np.uint8)
        self._flat.buffers.pack(self._buffers)
        self._worker.handed += basis.samples - basis.drawn
        total, peak, added = basis.samples, packed.peak, None
        if self._carried is not None and not initialised:
            if not any(packed.presence):
                peak = math.inf  # given up before there was a gradient: not to be carried
            elif (added := self._carried.add_in(self._worker.version, total)) is not None:
                total, peak = added
        self._move()
        version, carries = self._worker.version, added is not None
        verdict = self._worker.push(
            GradientInfo(
                total,
                loss,
                data_s=basis.data_s,
                fingerprint=basis.fingerprint,
                peak=peak,
                batches=basis.batches,
                carries=carries,
                cost=cost,
                initial=bool(initialised),
            )
        )
        is_late = not verdict.accepted and math.isfinite(peak) and not initialised
        if self._retried is not None:
            self._retried.judged(again=self._worker.again)
        if self._carried is not None:
            self._carried.judged(version, total, is_late=is_late, carries=carries)
        self._pull()
        return verdict

    def _move(self) -> None:
        """Bring what was packed to where the root reads it, if it is not there yet."""
        memory, link = self._participant.memory, self._worker.link
        if not memory.is_host:
            memory.copy(self._presence, self._sent_presence)
        if self._gradient is not link.gradient:
            memory.copy(self._gradient, link.gradient)

    def _pull(self) -> None:
        """Take the newest parameters and module buffers, or leave the loop with its last where that is over."""
        while self._worker.pull() is not None:
            if self._parameters.take():
                self._follow()
                return
        self._end_loop()

    def _end_loop(self) -> None:
        self._is_in_loop = False
        self._parameters.pause()
        self._follow()

    def _follow(self) -> None:
        """Step the schedulers here as often as the root's."""
        if self._schedule.lags(self.version):
            self._guards.check_groups()
            self._schedule.follow(self.version)
            self._guards.allow_groups()

    def samples(self) -> dict[str, Any]:
        """Return nothing: the root keeps the accounts."""
        return {}

    def _is_late(self) -> bool:
        return self._participant.policy.staleness == 0 and self._worker.is_stale()

    def stale(self) -> bool:
        """Say whether the step that this worker computes for has closed."""
        return self._worker.is_stale()

    def stop(self) -> None:
        """Ask the root to end the training."""
        self._worker.stop()

    def measure(self, version: int, metric: float) -> None:
        """Tell the root, with the next message to it."""
        self._worker.metric = version, metric

    def newest(self, *, average: bool) -> tuple[int, Values]:
        """Return the newest version, whole: its number, and the values in it of the model's tensors."""
        memory = self._participant.memory.allocate(self._participant.published.size_bytes)
        version = self._worker.copy_newest(memory)
        views = (self._distributed.averages if average else self._distributed.parameters)(memory)
        return version, self._flat.paired(
            views.tensors, self._flat.buffers.views(self._participant.published.extras(memory))
        )

    def leave(self, error: BaseException | None) -> None:
        """Leave the run; without an error this rank has the final parameters."""
        self._guards.undo()
        self._accumulation.close()
        self._data.close()
        has_final = False
        try:
            if error is None:
                self._worker.finish()
                has_final = True
                if self._schedule.lags(self.version):
                    self._schedule.follow(self.version)
                if self._has_average:
                    views = self._distributed.averages(self._worker.link.parameters)
                    pairs = zip(self._flat.parameters, views.tensors, strict=True)
                    self._kept_averages = [(parameter, view.clone()) for parameter, view in pairs]
        finally:
            if self._notice is not None:
                self._notice.undo()
            self._parameters.end(final=has_final)
            self._threads.restore()
            # the root frees a device's memory when this worker has said goodbye
            self._carried = None
            del self._gradient, self._slot, self._sent_presence, self._presence, self._buffers
            leave_worker(self._worker, error)
