"""The root's role in a torch session."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Generator, Iterable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor, nn
from torch.optim import Optimizer

from mpisync.aggregation.account import Account
from mpisync.aggregation.closed_step import ClosedStep
from mpisync.aggregation.late_work import Requeue
from mpisync.aggregation.loops import serve_loop
from mpisync.aggregation.shutdown import failure_of, leave_root
from mpisync.model.averages import initial_average
from mpisync.model.binding import Binding
from mpisync.model.copies import Values
from mpisync.model.guards import REMEDY, FrozenWatch
from mpisync.model.modes import ordinary_mode
from mpisync.model.scheduler import Schedule
from mpisync.model.signature import plain_name
from mpisync.model.structure import StructureWatch
from mpisync.model.update import Averages, Update, advice_on, left_out
from mpisync.model.write_sample import MemorySample
from mpisync.policies import Replay
from mpisync.session.distributed_model import DistributedModel
from mpisync.session.equal_batches import EqualBatches
from mpisync.session.loop import LoopOptions, pool_of
from mpisync.session.options import Options
from mpisync.session.recorder import Recorder, tell_of_no_metric
from mpisync.session.roles.base import Role
from mpisync.session.run_info import cores_of, run_info
from mpisync.session.torch_threads import torch_threads
from mpisync.session.worker_parameters import BETWEEN_LOOPS
from mpisync.transport.peers import peak_rss_bytes

_LOOKS = 10  # steps, in which buffers that differ have come to do so; later it would cost for nothing


class RootRole(Role):
    """The role of the root, which turns closed steps into updates."""

    worker = None
    makes_updates = True

    def __init__(
        self, comm: MPI.Intracomm, model: nn.Module, optimizers: Sequence[Optimizer], options: Options
    ) -> None:
        recorder, problem = None, ""
        try:
            recorder = Recorder(options)
        except ValueError as error:
            problem = str(error)  # for every rank
        self._distributed = DistributedModel(comm, model, optimizers, options, problem)
        self._participant, self._flat = self._distributed.participant, self._distributed.flat
        self.workers = comm.size - 1
        self._threads = torch_threads(self._participant.meeting)
        memory = self._participant.parameters
        parameters = self._distributed.parameters(memory)
        self._flat.store(parameters)
        home = self._flat.home  # else the script could not compute with them between loops
        self._binding = Binding(
            model, self._flat, parameters, lambda: [view.to(home, copy=True) for view in parameters.tensors]
        )
        self._binding.bind()
        self._optimizers = optimizers if parameters.tensors[0].device != home else ()
        self._move_states()
        self._sample, self._frozen = MemorySample(memory), FrozenWatch(self._flat.frozen)
        self._extras = self._participant.published.extras(memory)
        # means of buffers are made by the host
        self._host_extras = self._extras if self._participant.memory.is_host else np.zeros(self._extras.size, np.uint8)
        self._buffers = self._flat.buffers.views(self._extras)
        self._flat.buffers.pack(self._buffers)
        self._averages: tuple[Tensor, ...] = ()
        self._kept_averages: Averages | None = None
        if options.ema is not None:
            self._averages = self._distributed.averages(memory).tensors
            torch._foreach_copy_(list(self._averages), initial_average(self._flat, options.average))
        self._update = Update(
            self._flat.parameters,
            optimizers,
            self._averages,
            clip_norm=options.clip_norm,
            clip_value=options.clip_value,
            decay=options.ema,
            memory=self._participant.memory,
        )
        self._schedule = Schedule(options.schedulers, optimizers, options.metric_schedulers)
        self._structure = StructureWatch(model)
        self._late = copy.deepcopy(options.on_late)
        self._root = self._participant.root(weighted=options.weight == "samples", late=self._late)
        self._mean = self._flat.views(self._root.mean)
        self._equals = EqualBatches()
        self._told = self._has_served = self._is_in_loop = False
        assert recorder is not None  # else DistributedModel has raised the problem
        self._recorder = recorder
        self._recorder.watch(lambda worker: self._root.roster.members[worker].is_alive)
        named = zip(self._flat.names, self._flat.parameters, strict=True)
        advice = map(advice_on, optimizers) if self._participant.memory.is_host else ()
        for text in filter(None, (left_out(named, optimizers), *advice)):
            print(text, file=sys.stderr, flush=True)
        peers = self._participant.meeting.peers
        self._recorder.header(
            str(options.policy),
            [peer.host for peer in peers[:-1]],
            transports=[member.link.name for member in self._root.roster.members],
            cores=cores_of(peers, peers[-1]),
            **run_info(self._flat.parameters, optimizers, options.schedulers),
        )

    def _move_states(self) -> None:
        """Bring the optimizers' states to the device that the parameters are on now, if that is not the model's."""
        for optimizer in self._optimizers:
            if optimizer.state:
                optimizer.load_state_dict(optimizer.state_dict())

    @property
    def version(self) -> int:
        """The number of updates that the parameters have had."""
        return self._root.version

    @property
    def averages(self) -> Averages | None:
        """Each parameter with its average, at the end."""
        return self._kept_averages

    def batches(self, loader: Iterable[Any], loop: LoopOptions) -> Generator[Any, None, None]:
        """Serve until the end, and yield nothing, for the root does not train."""
        if isinstance(self._late, Requeue):
            self._late.pool = pool_of(loader, loop, self._root.policy, self.workers)
        if loop.resume is not None:
            self._root.collector.accounts = [Account(**account) for account in loop.accounts(self.workers)]
            self._late.load(loop.resume)
        last = None if loop.steps is None else self.version + loop.steps
        self._recorder.begin(last)
        self._begin()
        for closed in serve_loop(self._root, last):
            self._check_writes()
            with ordinary_mode():  # as in a loop that has set nothing, whatever the script has set here
                self._take(closed)
                self._schedule.advance(closed.loss)
                metrics = self._measure(closed.step)
            record = closed.publish()
            self._sample.take()
            self._recorder.step(record, metrics)
            self._structure.check()  # on_step= has been called
        self._binding.detach()  # until the next loop the parameters are the script's
        self._is_in_loop = False
        yield from ()

    def _begin(self) -> None:
        """Make ready for a loop: its parameters are those of the newest version, whatever was done since."""
        if self._has_served:
            if names := self._binding.written():
                raise RuntimeError(f"parameter {names[0]!r} was written to {BETWEEN_LOOPS}: {REMEDY}")
            self._binding.bind()
            self._frozen.check()
            if names := self._flat.buffers.changed(self._buffers):
                print(
                    f"mpisync: buffer {names[0]!r} was changed between two loops of the session, which does not last: "
                    "each begins with what the last update left (call model.eval() before forward passes there; change "
                    "buffers in on_step=, or keep what is not learned in a plain attribute)",
                    file=sys.stderr,
                    flush=True,
                )
                self._flat.buffers.load(self._buffers)
        self._has_served = self._is_in_loop = True
        self._sample.take()
        self._structure.examine()

    def _check_writes(self) -> None:
        """Refuse what somebody else than the update wrote to parameters since they were published."""
        names = self._binding.written() if self._binding.is_detached else []
        self._binding.bind()
        if (at := self._sample.written()) is not None:
            names.append(self._distributed.parameter_at(at))
        if names:
            raise RuntimeError(
                f"parameter {names[0]!r} of version {self.version} was written to before its update, by a worker (by "
                "p.data, .numpy() or the like, which torch does not count) or in on_step=: MPISYNC_READ_ONLY=1 shows "
                f"the line; {REMEDY}"
            )
        self._frozen.check()

    def _take(self, closed: ClosedStep) -> None:
        """Update everything that the next version publishes; nothing if the mean is not finite."""
        self._warn_of_equals(closed)
        split = self._distributed.presence_bytes
        if (spans := self._update.spans(self._flat.places)) and closed.fused_sgd_step(spans):
            for parameter in self._flat.parameters:
                parameter.grad = None  # there is no mean; an earlier step's would mislead
            self._update.move_average()
        elif not closed.finite:
            return
        elif closed.initial is not None:
            self._start_from(closed.initial)
        else:
            presence = np.bitwise_or.reduce([extras[:split] for extras in closed.extras])
            self._flat.assign_gradients(self._mean, bytes(presence[: len(self._flat.parameters)]))
            self._update.apply()
        if self._extras.size:
            buffers = [extras[split:] for extras in closed.extras]
            self._tell_of_buffers(closed.step, buffers)
            self._flat.buffers.average(self._host_extras, buffers)
            if self._host_extras is not self._extras:
                self._participant.memory.copy(self._host_extras, self._extras)
            self._flat.buffers.load(self._buffers)  # for whoever looks at the model in on_step=

    def _measure(self, step: int) -> list[tuple[int, float]]:
        """Step the schedulers that go by a metric for each that came since the step before; return them."""
        metrics, policy = self._root.inbox.take_metrics(), self._root.policy
        if isinstance(policy, Replay):
            metrics = policy.metrics(step)
        for _, metric in metrics:
            self._schedule.measure(metric)
        return metrics

    def _start_from(self, worker: int) -> None:
        """Make a worker's initial parameters, which are the mean, everyone's."""
        values = zip(self._flat.names, self._flat.parameters, self._mean.tensors, strict=True)
        names = [name for name, own, value in values if not torch.equal(own.data, value.to(own.dtype))]
        self._flat.load(self._mean)
        if self._averages:
            self._flat.store(self._distributed.averages(self._participant.parameters))
        names = names or list(self._flat.names)  # where only the sign of a 0 has changed
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(
            f"mpisync: worker {worker}'s first forward pass initialised parameter {names[0]!r}{more}: version 1 is "
            "that, and no update; to have one there, run a forward pass before Session, on every rank",
            file=sys.stderr,
            flush=True,
        )

    def _tell_of_buffers(self, step: int, buffers: list[np.ndarray[Any, Any]]) -> None:
        """Say once which buffers become a mean that may have no meaning."""
        if self._told or step >= _LOOKS or not (names := self._flat.buffers.differing(buffers)):
            return
        self._told = True
        named = ", ".join(repr(plain_name(name)) for name in names[:3])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        print(
            f"mpisync: buffer {named}{more} differs between workers: all go on with the mean of the accepted ones "
            "(integers: the first one's), which suits running statistics. A queue, a hidden state or counts that each "
            "worker has for itself belong in a plain attribute of the module, not in a buffer",
            file=sys.stderr,
            flush=True,
        )

    def _warn_of_equals(self, closed: ClosedStep) -> None:
        if isinstance(self._late, Requeue):
            return  # no two have the same batch, though it may be in a list twice or in two epochs
        workers = (worker for worker, _ in closed.accepted)
        if told := self._equals.see(zip(workers, closed.fingerprints, strict=True)):
            warnings.warn(told, stacklevel=2)

    def samples(self) -> dict[str, Any]:
        """Return every worker's account and place in the data."""
        return {**self._late.state(), "accounts": [account.settled() for account in self._root.collector.accounts]}

    def step(self, loss: float, samples: int | None, cost: float) -> NoReturn:
        """Raise RuntimeError: the root has no batches, so nothing to step from."""
        raise RuntimeError("session.step is a worker's: call it inside session.batches only")

    def stale(self) -> bool:
        """Say no: the root computes nothing that could be stale."""
        return False

    def stop(self) -> None:
        """End the training before another step closes."""
        self._root.stop()

    def measure(self, version: int, metric: float) -> None:
        """Do nothing: worker 0 evaluates."""

    def newest(self, *, average: bool) -> tuple[int, Values]:
        """Return the newest version: its number, and the values in it of the model's tensors."""
        views = (self._distributed.averages if average else self._distributed.parameters)(self._participant.parameters)
        return self.version, self._flat.paired(views.tensors, self._buffers)

    def leave(self, error: BaseException | None) -> None:
        """End the training on every rank."""
        self._recorder.close()
        absence = None
        if error is None and not self._has_served:
            error = absence = RuntimeError(
                "the root must go through session.batches too, where it makes the updates (it is given no batch): "
                "do not guard the loop by session.worker or comm.rank"
            )
        try:
            if self._is_in_loop:
                self._flat.buffers.load(self._buffers)
            if self._averages:
                pairs = zip(self._flat.parameters, self._averages, strict=True)
                self._kept_averages = [(parameter, view.clone()) for parameter, view in pairs]
            # MPI still sends from this memory until everyone has said goodbye
            leave_root(self._root, error)
        finally:
            self._binding.end()
            self._move_states()
            self._threads.restore()
            self._recorder.end(
                self.version,
                failure_of(error),
                self._root.collector.player.arrivals,
                self._root.collector.accounts,
                self._late.by_cost,
                [*(member.peak_rss_bytes for member in self._root.roster.members), peak_rss_bytes()],
                self._root.inbox.take_metrics(),
            )
        if absence is not None:
            raise absence
        if error is None:
            tell_of_no_metric(self._schedule)

