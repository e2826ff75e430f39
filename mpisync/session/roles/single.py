"""A session of one process: the same loop, without anyone to wait for."""

from __future__ import annotations

import math
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from mpisync.aggregation.members import Account, Fate
from mpisync.aggregation.root import REJECTIONS_PER_WORKER
from mpisync.aggregation.sample_pool import BatchId, SamplePool
from mpisync.aggregation.shutdown import failure_of
from mpisync.aggregation.verdict import Verdict
from mpisync.data.batches import Batches
from mpisync.model.flat import FlatModel
from mpisync.model.guards import forbid_steps
from mpisync.model.scheduler import Schedule, check_scheduler
from mpisync.model.update import Update
from mpisync.model.validation import check_model_and_optimizer
from mpisync.policies import BackupWorkers
from mpisync.records import ArrivalRecord, StepRecord
from mpisync.session.accumulation import AccumulatedBatches, Accumulation
from mpisync.session.loop import LoopOptions
from mpisync.session.options import Options
from mpisync.session.pooling import pool_of
from mpisync.session.recorder import Recorder
from mpisync.session.roles.ended import Averages
from mpisync.session.run_info import run_info
from mpisync.transport.layout import aligned_bytes
from mpisync.transport.peers import peak_rss_bytes


class SingleProcessRole:
    """Trains in this process, which is worker 0 and makes the updates too."""

    worker = 0
    workers = 1
    makes_updates = True

    def __init__(self, model: nn.Module, optimizer: Optimizer, options: Options) -> None:
        check_model_and_optimizer(model, optimizer)
        check_scheduler(options.scheduler, optimizer)
        self._reports = Recorder(options)
        print(
            f"mpisync: one process trains alone, so the policy {options.policy} is ignored; start "
            "it with `mpisync run -n 5 ...` or mpirun for workers and a root",
            file=sys.stderr,
            flush=True,
        )
        self.version = 0
        self._options, self._optimizer = options, optimizer
        self._flat = FlatModel(model)
        self._averages = [p.detach().clone() for p in self._flat.parameters]
        self._update = Update(
            self._flat.parameters, optimizer, options.clip_norm, options.ema, self._averages
        )
        self._schedule = Schedule(options.scheduler, optimizer)
        self._buffers = self._flat.buffers.views(aligned_bytes(self._flat.buffers.size_bytes))  # of this version
        self._trap = forbid_steps(optimizer, options.scheduler)
        self._drawn = Accumulation(self._flat.parameters)
        self._stopped = False
        self._opened_s = self._began_s = time.monotonic()  # of the step, and of the computation
        self._arrivals: list[ArrivalRecord] = []  # of the open step
        self._account = Account()
        self._by_cost: dict[int, Account] = {}  # by class of costs
        self._pool: SamplePool | None = None
        self._sequence = self._rejected = self._rejected_in_a_row = 0
        # what it does, whatever the policy: every step is the gradient of the only worker
        self._reports.header(
            str(BackupWorkers(0)),
            [socket.gethostname()],
            cores=len(os.sched_getaffinity(0)),
            **run_info(self._flat.parameters, optimizer, options.scheduler),
        )

    def batches(self, loader: Iterable[Any], extent: LoopOptions) -> Iterator[Any]:
        """Yield batches until there were `steps` updates, or the pool is empty."""
        steps = extent.steps
        for account in extent.accounts(1):
            self._account = Account(**account)
        if self._options.on_late == "requeue":
            self._pool = pool_of(loader, extent, BackupWorkers(0), 1)
        data = Batches(
            loader,
            worker=0,
            workers=1,
            seed=self._options.seed,
            claim=None if self._pool is None else self._claim,
            start=extent.batches(0),
        )
        self._reports.begin(steps)
        self._flat.buffers.pack(self._buffers)
        self._opened_s = self._began_s = time.monotonic()
        try:
            while not self._stopped and (steps is None or self.version < steps):
                drawn = next(data, None)
                if drawn is None:
                    break
                self._drawn.add(data)
                self._account.handed += data.batch_samples
                yield drawn[0]
                if passed := self._drawn.passed():
                    self._settle(passed, "discarded")
                self._drawn.goes_on()
            self._drawn.drop()
        finally:
            data.close()

    def _claim(self, batches: int) -> BatchId | None:
        """The pool's next batch; this process claims none ahead that it does not come to."""
        assert self._pool is not None
        return self._pool.claim(0)

    def _settle(self, basis: AccumulatedBatches, fate: Fate) -> None:
        """Enter what became of a gradient's samples."""
        self._account.tally(fate, basis.samples)
        self._account.batches += basis.batches
        if self._pool is not None:
            lots = self._pool.take(0, basis.batches)
            self._pool.use(lots)
            self._pool.settle(lots)

    def samples(self) -> dict[str, Any]:
        """The account and the place in the data."""
        account = self._account
        state: dict[str, Any] = {"accounts": [{**vars(account), "handed": account.handed - account.in_flight}]}
        return state if self._pool is None else {**state, "pool": self._pool.state}

    def step(self, loss: float, samples: int | None, cost: float) -> Verdict:
        """Update from the gradient, unless it has NaN or Inf."""
        basis = self._drawn.take(samples)
        came_s = time.monotonic()
        gradients = [p.grad for p in self._flat.parameters if p.grad is not None]
        step = self.version
        finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        reason = "" if finite else "the gradient has NaN or Inf"
        self._enter(basis, loss, cost, came_s, reason)
        if finite:
            self._rejected_in_a_row = 0
            self._trap.undo()
            self._update.apply()
            self._schedule.advance(loss)
            self._flat.buffers.pack(self._buffers)
            self.version += 1
            self._report(basis, came_s)
            self._trap = forbid_steps(self._optimizer, self._options.scheduler)
        else:
            self._flat.buffers.load(self._buffers)  # it leaves no trace
            self._count_rejection()
        for parameter in self._flat.parameters:
            parameter.grad = None
        self._began_s = time.monotonic()
        return Verdict(step, finite, 0, self.version, reason, 0.0)

    def _enter(self, basis: AccumulatedBatches, loss: float, cost: float, came_s: float, reason: str) -> None:
        """Enter the verdict on a gradient."""
        self._account.handed += basis.samples - basis.drawn
        self._account.judge("rejected" if reason else "accepted")
        if not math.isnan(cost):
            dear = self._by_cost.setdefault(math.frexp(cost)[1] - 1, Account())
            dear.judge("rejected" if reason else "accepted")
        self._settle(basis, "discarded" if reason else "used")
        self._arrivals.append(
            ArrivalRecord(
                worker=0,
                sequence=self._sequence,
                version=self.version,
                verdict="rejected" if reason else "accepted",
                offset_s=came_s - self._opened_s,
                reason=reason or None,
                compute_s=came_s - self._began_s - basis.data_s,
                data_s=basis.data_s,
                samples=basis.samples,
                loss=None if math.isnan(loss) else loss,
                cost=None if math.isnan(cost) else cost,
            )
        )
        self._sequence += 1

    def _report(self, basis: AccumulatedBatches, came_s: float) -> None:
        """Report the step that was closed by the newest gradient, and open the next."""
        now_s = time.monotonic()
        record = StepRecord(
            step=self.version - 1,
            opened_s=self._opened_s,
            closed_s=came_s,
            published_s=now_s,
            target=1,
            alive=1,
            accepted=[(0, self._sequence - 1, self.version - 1)],
            arrivals=self._arrivals,
            samples_used=basis.samples,
            update_s=now_s - came_s,
            counts={"accepted": self.version, "late": 0, "rejected": self._rejected},
        )
        self._opened_s, self._arrivals = now_s, []
        self._reports.step(record)

    def _count_rejection(self) -> None:
        self._rejected += 1
        self._rejected_in_a_row += 1
        if self._rejected_in_a_row >= REJECTIONS_PER_WORKER:
            raise RuntimeError(
                f"the last {self._rejected_in_a_row} gradients all had NaN or Inf: training has diverged at version "
                f"{self.version}; lower the learning rate or clip the gradient"
            )

    def stale(self) -> bool:
        """Nobody makes newer parameters."""
        return False

    def stop(self) -> None:
        """End the loop."""
        self._stopped = True

    def fill(self, twin: FlatModel, *, average: bool) -> int:
        """Write the parameters, or their average, into a copy of the model; their version."""
        if average:
            for own, value in zip(twin.parameters, self._averages, strict=True):
                own.data.copy_(value)
        return self.version

    @property
    def averages(self) -> Averages | None:
        """Each parameter with its average."""
        if self._options.ema is None:
            return None
        return list(zip(self._flat.parameters, self._averages, strict=True))

    def leave(self, error: BaseException | None) -> None:
        """Give the optimizer its step back."""
        self._trap.undo()
        self._reports.close()
        self._account.lost += self._account.in_flight
        memory = [0, peak_rss_bytes()]
        self._reports.end(self.version, failure_of(error), self._arrivals, [self._account], self._by_cost, memory)
