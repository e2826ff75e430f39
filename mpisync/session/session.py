"""The torch face: a training loop whose gradients are averaged over the first workers of each step."""

from __future__ import annotations

import math
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
from mpi4py import MPI
from torch import Tensor, nn
from torch.optim import Optimizer

from mpisync.aggregation.late_work import LateWork, late_work_of
from mpisync.aggregation.verdict import Verdict
from mpisync.model.copies import copy_of, state_of
from mpisync.model.loss_scaling import refuse_scaled
from mpisync.model.modes import ordinary_mode
from mpisync.policies import Policy
from mpisync.records import StepRecord
from mpisync.session.arguments import number, optional_number, whole
from mpisync.session.iteration import DrawWatch, SessionLoop, left_by_next
from mpisync.session.loop import LoopOptions
from mpisync.session.options import Options, check_communicator, chosen_policy
from mpisync.session.roles.base import Role
from mpisync.session.roles.ended import EndedRole
from mpisync.session.roles.root import RootRole
from mpisync.session.roles.single import SingleProcessRole
from mpisync.session.roles.worker import WorkerRole
from mpisync.transport.rendezvous import check_launcher

_T = TypeVar("_T")
_NEVER_SET = (
    "mpisync: rank {rank} is the root, which never runs the loop's body ({error}): what the body sets, set before the "
    "loop as well, or use on workers only (`if session.worker is not None:`)"
)


class Session:
    """The training of a torch model with backup workers; every rank runs the same script.

    The last rank of `comm` becomes the root aggregator: its loop body never runs. The others are
    workers. Started as a single process the script trains alone, and the policy is ignored.

    Args:
        comm: The communicator; a private duplicate is used.
        model: Has the same parameters on every rank; the root's initial values hold for all.
        optimizer: Any torch optimizer without a closure, or a list of them, which are stepped in order, each with
            parameters of its own (``[muon, adamw]``); only the root's are stepped.
        policy: When a step closes and which gradients count: `BackupWorkers(b)`, `Deadline`,
            `Async`, `Adaptive`, `Replay`. MPISYNC_POLICY goes before it. Default: full synchronous SGD.
        scheduler: A learning-rate scheduler of `optimizer`, or of one of them, stepped once a version; one that goes
            by the loss (ReduceLROnPlateau) gets the mean loss of the accepted gradients. Or a list of schedulers.
        metric_scheduler: A scheduler, or several, stepped by what ``evaluate(..., metric=True)`` finds, whenever it
            comes, and not once a version: ReduceLROnPlateau by a validation metric.
        seed: What batches and random numbers follow from, with worker and sequence.
        weight: "equal", or "samples" to weight each gradient by its samples.
        clip_norm: The largest global norm of the mean gradient. What a loop clips itself, by
            ``torch.nn.utils.clip_grad_norm_``, is its worker's own gradient, before the mean is taken.
        clip_value: The largest magnitude of the mean gradient's elements; with `clip_norm` too, this comes first.
        ema: Decay of an exponential moving average of the parameters, 0.9999 in the paper.
        average: Where the moving average goes on: ``state_dict()["average"]`` of an earlier run's root. Without it the
            average begins with the parameters' initial values.
        own_copy: Give each worker its own copy of the parameters, which it may then write to; what it
            writes lasts until the next version. What is to last belongs in an optimizer's step hook.
        record: A file for one JSON line a step; `Replay` reads it.
        on_step: Called at the root with every step's `StepRecord`. Under plain SGD, which updates while it
            averages, parameters have no ``.grad`` there.
        progress: Whether the root prints a progress line, and at the end what became of the samples.
        on_late: What becomes of late gradients' samples: `Discard`, `Retry`, `Carry` or `Requeue`, or their short
            forms. "discard": nothing more. "retry": the loop is given the same batches again, to compute on the newest
            parameters. "carry": the late gradient is added to the worker's next one, so that updates have stale parts;
            workers keep their own copy of the parameters. "requeue": the batches go back to a pool that deals out each
            epoch to all workers, so that every sample is used once in each, whoever is slow. Gradients with NaN or Inf
            are discarded in any case.

    Attributes:
        average: After the `with`, the moving average for ``model.load_state_dict``: the model's
            state_dict with the averages in place of its parameters; None without `ema`.

    Raises:
        ValueError: Ranks disagree, or the model, optimizer or policy cannot be used; on every rank.

    Example:
        >>> import torch, mpisync
        >>> from mpi4py import MPI
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> data = [(torch.ones(4, 2), torch.ones(4, 1))]
        >>> with mpisync.Session(MPI.COMM_SELF, model, optimizer) as session:
        ...     for x, y in session.batches(data, steps=3):
        ...         loss = torch.nn.functional.mse_loss(model(x), y)
        ...         loss.backward()
        ...         verdict = session.step(loss)
        >>> session.version
        3
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        policy: Policy | None = None,
        scheduler: Any | Sequence[Any] | None = None,  # noqa: ANN401 (torch has no common class for schedulers)
        metric_scheduler: Any | Sequence[Any] | None = None,  # noqa: ANN401 (nor one for these)
        seed: int = 0,
        weight: Literal["equal", "samples"] = "equal",
        clip_norm: float | None = None,
        clip_value: float | None = None,
        ema: float | None = None,
        average: Mapping[str, Any] | None = None,
        own_copy: bool = False,
        record: str | os.PathLike[str] | None = None,
        on_step: Callable[[StepRecord], object] | None = None,
        progress: bool = True,
        on_late: LateWork | Literal["discard", "retry", "carry", "requeue"] = "discard",
    ) -> None:
        check_communicator(comm)
        if weight not in ("equal", "samples"):
            raise ValueError(f'weight must be "equal" or "samples", not {weight!r}')
        seed = whole("seed", seed, -(2**63))
        ema = None if ema is None else number("ema", ema)
        if ema is not None and not 0 < ema < 1:
            raise ValueError(f"ema must lie between 0 and 1, as a decay does, not {ema}")
        if average is not None and ema is None:
            raise ValueError("average= is where a moving average goes on, and ema= is not given, so there is none")
        clip_norm, clip_value = _limit("clip_norm", clip_norm), _limit("clip_value", clip_value)
        if not isinstance(own_copy, bool):
            raise TypeError(f"own_copy must be True or False, not {own_copy!r}")
        if not (record is None or isinstance(record, str | os.PathLike)):
            raise TypeError(f"record must be the name of a file, not {record!r}")
        if not (on_step is None or callable(on_step)):
            raise TypeError(f"on_step must be a function that takes a step's record, not {on_step!r}")
        self._comm, self._model = comm, model
        self._optimizer = optimizer  # one, or several, as the state is to be
        self._scheduler, self._metric_scheduler = scheduler, metric_scheduler
        self._optimizers = tuple(optimizer) if isinstance(optimizer, list | tuple) else (optimizer,)
        by_metric = _all(metric_scheduler)
        self._options = Options(
            chosen_policy(policy), (*_all(scheduler), *by_metric), by_metric, seed, weight,
            clip_norm, clip_value, ema, average, own_copy,
            None if record is None else os.fspath(record),
            on_step, progress, late_work_of(on_late),
        )  # fmt: skip
        self._home = torch.device("cpu")  # where the model is
        self._role: Role | None = None
        self._draws: DrawWatch | None = None  # of the newest loop
        self._loop: weakref.ref[SessionLoop] | None = None
        self._evaluated: dict[tuple[object, ...], int] = {}  # how often, by where evaluate is called
        self._measures: tuple[object, ...] | None = None  # where it finds the metric
        self.average: dict[str, Any] | None = None

    def __enter__(self) -> Session:
        if self._comm.size == 1:
            check_launcher(self._comm)
        if isinstance(self._model, nn.Module):  # else it is refused
            self._home = next((parameter.device for parameter in self._model.parameters()), self._home)
        with ordinary_mode():  # else the parameters' memory would be of no use outside of it
            if self._comm.size == 1:
                self._role = SingleProcessRole(self._model, self._optimizers, self._options)
            else:
                role = RootRole if self._comm.rank == self._comm.size - 1 else WorkerRole
                self._role = role(self._comm, self._model, self._optimizers, self._options)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        role, is_over = self._active, left_by_next(error, self._comm)
        problem = None
        if self._draws is not None:
            self._draws.end()
            problem = self._draws.problem(error)
        error = problem or (None if is_over else error)
        if isinstance(error, NameError) and role.worker is None:
            print(_NEVER_SET.format(rank=self._comm.rank, error=error), file=sys.stderr, flush=True)
        try:
            with ordinary_mode():
                role.leave(error)
                if role.averages is not None:
                    self.average = state_of(self._model, role.averages, self._home)
        finally:
            self._role = EndedRole(
                role.worker, role.workers, role.version, role.makes_updates, role.averages, role.samples()
            )
        if problem is not None:
            raise problem
        return is_over

    @property
    def _active(self) -> Role:
        if self._role is None:
            raise RuntimeError("the session has not begun: write `with Session(...) as session:`")
        return self._role

    # -- the loop ----------------------------------------------------------------------------------

    def batches(
        self,
        loader: Iterable[Any],
        *,
        steps: int | None = None,
        epochs: int | None = None,
        resume: Mapping[str, Any] | None = None,
    ) -> Iterator[Any]:
        """Yield this worker's batches until the parameters have had `steps` more updates, or the samples are used up.

        The loader is shared out among the workers and gone through again and again; on the root
        nothing is yielded. `step` follows each batch, or each few: gradients accumulate in between,
        as everywhere in torch. Leaving the loop early means that this worker leaves it.

        Several loops may follow one another, as epochs do: each goes on in the data where the one before it ended, and
        all ranks leave each at the same version. Between two of them every rank has the parameters for itself, to
        look at, and may evaluate, save, or use collectives; what the root's optimizer is set to there holds. Who is
        late at a loop's end holds up nobody, and comes to what follows when it can.

        Args:
            loader: A DataLoader, a list of batches, or any iterable of batches. A DistributedSampler is taken over;
                another sampler of your own, and an iterable other than a list, are taken as they are.
            steps: How many versions this loop makes; without it and `epochs`, until `stop`.
            epochs: How many times every sample is used; under ``on_late="requeue"`` only. The last updates may take
                fewer gradients than others, where samples run out.
            resume: ``state_dict()["samples"]`` of an earlier run's root: go on at its place in the data, with its
                accounts. What was in flight then is handed out again. Load the model and the optimizer before Session;
                versions count from 0.

        Raises:
            RuntimeError: The loop before it is still open; it draws batches ahead of their steps, or in another thread;
                another session's loop is open; parameters were written to between two loops; at the end of the `with`:
                the root had none.
            PeerFailed: Another rank failed.
        """
        if self._loop is not None and (open_loop := self._loop()) is not None:
            open_loop.refuse_another()
        steps = None if steps is None else whole("steps", steps, 0)
        epochs = None if epochs is None else whole("epochs", epochs, 0)
        loop = LoopOptions(steps, epochs, resume)
        loop.check(self._options.on_late, self._options.seed, is_first=self._draws is None)
        for parameter in self._model.parameters():
            parameter.grad = None  # what was computed before is no batch's
        drawn = self._active.batches(loader, loop)
        self._draws = DrawWatch(self._comm, self._model)
        batches = SessionLoop(drawn, self._draws)
        self._loop = weakref.ref(batches)
        return batches

    def step(
        self, loss: Tensor | float | None = None, *, samples: int | None = None, cost: float | None = None
    ) -> Verdict:
        """Send the gradient that `backward` left, wait for its verdict, and take the newest parameters.

        Several batches make one gradient where `step` comes after the last of them only: as it has
        accumulated, all computed on the same parameters. Scale each loss as you would elsewhere.

        Args:
            loss: The batch's loss, for records and reports: as it is, not scaled by a GradScaler.
            samples: How many samples it is the mean of. Otherwise that is counted from the batches: the first dimension
                of a batch's first tensor or array, however deep in tuples, lists, dicts and dataclasses. A nested
                tensor, a PackedSequence and a graph batch (``num_graphs``) say it themselves; a batch in which nothing
                can be counted counts as 1. Under ``weight="samples"`` that must be certain: where nothing can be
                counted, or tensors differ in their first dimension, pass `samples`; pass it too where the first
                dimension is not the samples, as in batches that are sequence first, or lists of samples.
            cost: What one of its batches costs to compute on, in any unit, such as the length of its sequences. The end
                of the run tells how much was dropped of cheap and of dear ones.

        Returns:
            Whether the gradient was accepted, and if not, why.

        Raises:
            TypeError: An argument is no number.
            ValueError: One is out of its range, the loss is scaled, or the samples cannot be counted.
            RuntimeError: No batch or gradient belongs to it, or the gradient is scaled by a GradScaler.
            PeerFailed: Another rank failed.
        """
        refuse_scaled(loss)
        value, price = optional_number("loss", loss), optional_number("cost", cost)
        if cost is not None and not 0 < price < math.inf:
            raise ValueError(f"cost must be finite and greater than 0, not {price}")
        own = None if samples is None else whole("samples", samples, 1)
        if self._draws is not None and self._draws.is_watching:
            self._draws.step(sys._getframe(1))
        with ordinary_mode():  # with gradients: an optimizer's step() decides that itself
            return self._active.step(value, own, price)

    def stale(self) -> bool:
        """Say whether this computation's step has closed, so that going on with it is vain."""
        return self._active.stale()

    def stop(self) -> None:
        """End the training on every rank, before another step closes: this loop, and all that follow it."""
        self._active.stop()

    # -- looking -----------------------------------------------------------------------------------

    @property
    def worker(self) -> int | None:
        """This worker's number; None on the root."""
        return self._active.worker

    @property
    def workers(self) -> int:
        """The number of workers."""
        return self._active.workers

    @property
    def version(self) -> int:
        """The number of updates that the parameters have had."""
        return self._active.version

    def snapshot(self, *, average: bool = False) -> nn.Module:
        """Return a private copy of the model with the newest parameters.

        Args:
            average: Use the moving average of the parameters instead (needs ``ema=``).
        """
        return self._snapshot(average=average)[1]

    def _snapshot(self, *, average: bool) -> tuple[int, nn.Module]:
        if average and self._options.ema is None:
            raise ValueError("there is no average: pass ema= to Session")
        with ordinary_mode():
            version, values = self._active.newest(average=average)
            return version, copy_of(self._plain, values, self._home)

    @property
    def _plain(self) -> nn.Module:
        """The model as it was before torch.compile wrapped it."""
        plain: nn.Module = getattr(self._model, "_orig_mod", self._model)
        return plain

    def evaluate(
        self, fn: Callable[[nn.Module], _T], *, every: int, average: bool = False, metric: bool = False
    ) -> _T | None:
        """Call ``fn(snapshot)`` on one worker, once in `every` versions, while the others train.

        Call it in the loop behind `step`, on every worker. The one that evaluates is merely late.

        Args:
            fn: What to do with the snapshot, a private copy of the model.
            every: In how many versions once. Each call in the script counts for itself.
            average: Evaluate the moving average of the parameters instead (needs ``ema=``).
            metric: Whether `fn` returns a number that goes to the root with this worker's next message: into the
                record, where the report shows it, and to `metric_scheduler`. One call in the script may.

        Returns:
            What `fn` returned; None on other workers and when it is not yet time.

        Raises:
            TypeError: With `metric`, what `fn` returned is no number.
            ValueError: With `metric`, another call finds the metric already.
        """
        every, caller = whole("every", every, 1), sys._getframe(1)
        here = (caller.f_code, caller.f_lasti, every)
        if metric and self._measures not in (None, here):
            raise ValueError("metric=True belongs to one call of evaluate in a script, but here is a second one")
        self._measures = here if metric else self._measures
        if self.worker != 0 or self.version // every <= self._evaluated.get(here, 0):
            return None
        self._evaluated[here] = self.version // every
        version, model = self._snapshot(average=average)
        found = fn(model)
        if metric:
            self._active.measure(version, number("with metric=True, what fn returns", found))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the newest version and the model's state; on the root also all else that a run goes on from.

        That is the optimizer's state and the scheduler's (lists where Session was given lists), the samples' (see
        `batches`), and under ``ema=`` the average: the model's state with the averages in place of its parameters.
        """
        with ordinary_mode():
            version, values = self._active.newest(average=False)
            state: dict[str, Any] = {"version": version, "model": state_of(self._plain, values, self._home)}
        if self._active.makes_updates:
            state["optimizer"] = _states(self._optimizer)
            if self._scheduler is not None:
                state["scheduler"] = _states(self._scheduler)
            if self._metric_scheduler is not None:
                state["metric_scheduler"] = _states(self._metric_scheduler)
            if self._options.ema is not None:
                with ordinary_mode():
                    _, averages = self._active.newest(average=True)
                    state["average"] = state_of(self._plain, averages, self._home)
            state["samples"] = {
                "on_late": str(self._options.on_late), "seed": self._options.seed, **self._active.samples()
            }  # fmt: skip
        return state


def _limit(name: str, value: object) -> float | None:
    limit = None if value is None else number(name, value)
    if limit is not None and not 0 < limit < math.inf:
        raise ValueError(f"{name} must be finite and greater than 0, not {limit}")
    return limit


def _all(owner: Any) -> tuple[Any, ...]:  # noqa: ANN401 (one object, several, or None)
    return tuple(owner) if isinstance(owner, list | tuple) else () if owner is None else (owner,)


def _states(owner: Any) -> Any:  # noqa: ANN401 (one object with a state_dict, or several)
    return [one.state_dict() for one in owner] if isinstance(owner, list | tuple) else owner.state_dict()
