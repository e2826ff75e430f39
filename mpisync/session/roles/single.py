"""The role of a process that trains alone: the same loop and the same rules, without anyone to wait for."""

from __future__ import annotations

import copy
import math
import os
import socket
import sys
import time
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from mpisync.aggregation.account import Account
from mpisync.aggregation.collector import Collector
from mpisync.aggregation.late_work import Requeue
from mpisync.aggregation.sample_pool import BatchId
from mpisync.aggregation.shutdown import failure_of
from mpisync.aggregation.verdict import Verdict
from mpisync.data.continued import ContinuedBatches
from mpisync.device.host import aligned_bytes
from mpisync.model.averages import initial_average
from mpisync.model.copies import Values
from mpisync.model.flat import FlatModel
from mpisync.model.guards import StepTrap
from mpisync.model.loss_scaling import ScaleWatch
from mpisync.model.scheduler import Schedule, check_schedulers
from mpisync.model.structure import StructureWatch
from mpisync.model.update import Averages, Update, left_out
from mpisync.model.validation import check_model_and_optimizers
from mpisync.policies import Arrival, BackupWorkers
from mpisync.session.accumulation import Accumulation
from mpisync.session.loop import LoopOptions, pool_of
from mpisync.session.options import Options
from mpisync.session.recorder import Recorder, tell_of_no_metric
from mpisync.session.roles.base import Role
from mpisync.session.run_info import run_info
from mpisync.transport.peers import peak_rss_bytes
from mpisync.transport.wire import GradientInfo

_POLICY = BackupWorkers(0)  # whatever the script's: every step is the gradient of the only worker


class _Here:
    """The payloads of a process that trains alone: each gradient is here, and whole."""

    def is_whole(self, worker: int) -> bool:
        """Say yes: every byte of a gradient is here."""
        return True

    def want(self, worker: int) -> None:
        """Do nothing: there is nothing to fetch."""

    def drop(self, worker: int) -> None:
        """Do nothing: no gradient is on its way."""


class SingleProcessRole(Role):
    """The role of a process that trains alone: worker 0, which makes the updates too."""

    worker = 0
    workers = 1
    makes_updates = True

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], options: Options) -> None:
        check_model_and_optimizers(model, optimizers)
        check_schedulers(options.schedulers, optimizers, options.metric_schedulers)
        self._flat = FlatModel(model)
        self._averages = [value.clone() for value in initial_average(self._flat, options.average)]
        self._recorder = Recorder(options)
        print(
            f"mpisync: one process trains alone, so the policy {options.policy} is ignored; start "
            "it with `mpisync run -n 5 ...` or mpirun for workers and a root",
            file=sys.stderr,
            flush=True,
        )
        if text := left_out(zip(self._flat.names, self._flat.parameters, strict=True), optimizers):
            print(text, file=sys.stderr, flush=True)
        self._options = options
        self._update = Update(
            self._flat.parameters,
            optimizers,
            self._averages,
            clip_norm=options.clip_norm,
            clip_value=options.clip_value,
            decay=options.ema,
        )
        self._schedule = Schedule(options.schedulers, optimizers, options.metric_schedulers)
        self._buffers = self._flat.buffers.views(aligned_bytes(self._flat.buffers.size_bytes))  # of this version
        self._stepped = (*optimizers, *options.schedulers)
        self._trap = StepTrap(*self._stepped)
        self._scaling = [ScaleWatch(optimizer) for optimizer in optimizers]
        self._structure = StructureWatch(model)
        self._accumulation = Accumulation(self._flat.parameters, optimizers, weighted=options.weight == "samples")
        self._data = ContinuedBatches(0, 1, options.seed)
        self._stopped = False
        self._metrics: list[tuple[int, float]] = []  # since the newest step
        self._began_s = time.monotonic()  # the computation
        self._late = copy.deepcopy(options.on_late)
        self._collector = Collector(
            _POLICY,
            1,
            self._late,
            payloads=_Here(),
            clock=time.monotonic,
        )
        self._recorder.header(
            str(_POLICY),
            [socket.gethostname()],
            cores=len(os.sched_getaffinity(0)),
            **run_info(self._flat.parameters, optimizers, options.schedulers),
        )

    @property
    def version(self) -> int:
        """The number of updates that the parameters have had."""
        return self._collector.player.step.step

    @property
    def _account(self) -> Account:
        return self._collector.accounts[0]

    def batches(self, loader: Iterable[Any], loop: LoopOptions) -> Generator[Any, None, None]:
        """Yield batches until there were `steps` updates, or the pool is empty."""
        late, last = self._late, None if loop.steps is None else self.version + loop.steps
        if isinstance(late, Requeue):
            late.pool = pool_of(loader, loop, _POLICY, 1)
        if loop.resume is not None:
            self._collector.accounts = [Account(**account) for account in loop.accounts(1)]
            late.load(loop.resume)
        data = self._data.of(loader, claim=self._claim if isinstance(late, Requeue) else None, start=loop.batches(0))
        self._recorder.begin(last)
        self._structure.examine()
        self._accumulation.drop()  # of a loop that was left by `break`
        self._flat.buffers.pack(self._buffers)
        self._began_s = self._collector.player.step.opened_s = time.monotonic()
        is_over = False
        try:
            while not self._stopped and (last is None or self.version < last):
                drawn = next(data, None)
                if drawn is None:
                    break
                self._accumulation.add(data, drawn[0])
                self._account.handed += data.batch_samples
                yield drawn[0]
                if passed := self._accumulation.passed():
                    info = GradientInfo(passed.samples, batches=passed.batches)
                    self._collector.pass_over(0, info, may_return=False)
                self._accumulation.goes_on()
            is_over = True
            self._accumulation.drop()
        finally:
            if not is_over:
                self._data.close()

    def _claim(self, batches: int) -> BatchId | None:
        """Claim the pool's next batch; this process claims none ahead that it does not come to."""
        return self._late.claim(0, (), batches)

    def samples(self) -> dict[str, Any]:
        """Return the account and the place in the data."""
        return {**self._late.state(), "accounts": [self._account.settled()]}

    def step(self, loss: float, samples: int | None, cost: float) -> Verdict:
        """Update from the gradient, unless it has NaN or Inf."""
        self._flat.refuse_thawed()
        self._structure.check(bytes(parameter.grad is not None for parameter in self._flat.parameters))
        for watch in self._scaling:
            watch.check()
        basis, came_s, step = self._accumulation.take(samples), time.monotonic(), self.version
        info = GradientInfo(
            basis.samples,
            loss,
            compute_s=came_s - self._began_s - basis.data_s,
            data_s=basis.data_s,
            peak=self._peak(),
            batches=basis.batches,
            cost=cost,
        )
        handed = self._account.handed + basis.samples - basis.drawn
        collector = self._collector
        collector.register(Arrival(0, collector.next_sequence(0), step, came_s), info, handed)
        collector.player.judge(0)
        ((_, refusal, *_),) = collector.decided()
        if refusal is None:
            self._make_update(loss)
            self._publish(basis.samples, came_s)
        else:
            self._flat.buffers.load(self._buffers)  # it leaves no trace
        for parameter in self._flat.parameters:
            parameter.grad = None
        if reason := collector.divergence:
            raise RuntimeError(reason)
        self._began_s = time.monotonic()
        return Verdict(step, refusal is None, 0, self.version, refusal.reason if refusal else "", 0.0)

    def _peak(self) -> float:
        """Return infinity where an element is not finite, else 0: the magnitude itself is not needed."""
        gradients = (p.grad for p in self._flat.parameters if p.grad is not None)
        return 0.0 if all(bool(torch.isfinite(gradient).all()) for gradient in gradients) else math.inf

    def _make_update(self, loss: float) -> None:
        """Update the parameters from the gradient, which is the mean."""
        self._trap.undo()
        self._update.apply()
        self._schedule.advance(loss)
        for _, metric in self._metrics:
            self._schedule.measure(metric)
        self._flat.buffers.pack(self._buffers)
        self._trap = StepTrap(*self._stepped)

    def _publish(self, samples: int, came_s: float) -> None:
        """Record the step that the newest gradient has closed, and open the next."""
        now_s = time.monotonic()
        record = self._collector.close(
            {0}, closed_s=came_s, published_s=now_s, samples_used=samples, update_s=now_s - came_s
        )
        metrics, self._metrics = self._metrics, []
        self._recorder.step(record, metrics)

    def stale(self) -> bool:
        """Say no: nobody else makes newer parameters."""
        return False

    def stop(self) -> None:
        """End the loop."""
        self._stopped = True

    def measure(self, version: int, metric: float) -> None:
        """Keep it for the next step's record and schedulers."""
        self._metrics.append((version, metric))

    def newest(self, *, average: bool) -> tuple[int, Values]:
        """Return the version and the averages, where they are asked for: the model is right otherwise."""
        return self.version, list(zip(self._flat.parameters, self._averages, strict=True)) if average else ()

    @property
    def averages(self) -> Averages | None:
        """Each parameter with its average."""
        if self._options.ema is None:
            return None
        return list(zip(self._flat.parameters, self._averages, strict=True))

    def leave(self, error: BaseException | None) -> None:
        """End the run here: let the optimizer's own step() work again, and close the record."""
        self._trap.undo()
        for watch in self._scaling:
            watch.undo()
        self._accumulation.close()
        self._data.close()
        self._recorder.close()
        self._collector.lose(0)
        self._recorder.end(
            self.version,
            failure_of(error),
            self._collector.player.arrivals,
            self._collector.accounts,
            self._late.by_cost,
            [0, peak_rss_bytes()],
            self._metrics,
        )
        if error is None:
            tell_of_no_metric(self._schedule)
