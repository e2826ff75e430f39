"""The torch face: a training loop whose gradients are averaged over the first workers of each step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, TypeVar

from mpi4py import MPI
from torch import Tensor, nn
from torch.optim import Optimizer

from mpisync.aggregation.late_work import LateWork, late_work_of
from mpisync.aggregation.verdict import Verdict
from mpisync.model.flat import FlatModel
from mpisync.model.update import averaged_state
from mpisync.policies import Policy
from mpisync.records import StepRecord
from mpisync.session.loop import LoopOptions
from mpisync.session.options import Options, check_communicator, chosen_policy
from mpisync.session.roles.base import Role
from mpisync.session.roles.ended import EndedRole
from mpisync.session.roles.root import RootRole
from mpisync.session.roles.single import SingleProcessRole
from mpisync.session.roles.worker import WorkerRole
from mpisync.transport.rendezvous import check_launcher

_T = TypeVar("_T")


def _number(loss: Tensor | float | None) -> float:
    """Return the loss as a number; NaN where there is none."""
    if loss is None:
        return math.nan
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise ValueError(f"loss must be one number, not a tensor of shape {list(loss.shape)}: pass loss.mean()")
    try:
        return float(loss.detach() if isinstance(loss, Tensor) else loss)
    except (TypeError, ValueError):
        raise TypeError(f"loss must be one number, such as what backward() began at, not {loss!r}") from None


class Session:
    """The training of a torch model with backup workers; every rank runs the same script.

    The last rank of `comm` becomes the root aggregator: its loop body never runs. The others are
    workers. Started as a single process the script trains alone, and the policy is ignored.

    Args:
        comm: The communicator; a private duplicate is used.
        model: Has the same parameters on every rank; the root's initial values hold for all.
        optimizer: Any torch optimizer without a closure; only the root's is stepped.
        policy: When a step closes and which gradients count: `BackupWorkers(b)`, `Deadline`,
            `Async`, `Adaptive`, `Replay`. MPISYNC_POLICY goes before it. Default: full synchronous SGD.
        scheduler: A learning-rate scheduler of `optimizer`, stepped once a version; one that goes by the
            loss (ReduceLROnPlateau) gets the mean loss of the accepted gradients.
        seed: What batches and random numbers follow from, with worker and sequence.
        weight: "equal", or "samples" to weight each gradient by its samples.
        clip_norm: The largest global norm of the mean gradient.
        ema: Decay of an exponential moving average of the parameters, 0.9999 in the paper.
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
        optimizer: Optimizer,
        *,
        policy: Policy | None = None,
        scheduler: Any | None = None,  # noqa: ANN401 (torch has no common class for schedulers)
        seed: int = 0,
        weight: Literal["equal", "samples"] = "equal",
        clip_norm: float | None = None,
        ema: float | None = None,
        own_copy: bool = False,
        record: str | None = None,
        on_step: Callable[[StepRecord], object] | None = None,
        progress: bool = True,
        on_late: LateWork | Literal["discard", "retry", "carry", "requeue"] = "discard",
    ) -> None:
        check_communicator(comm)
        if weight not in ("equal", "samples"):
            raise ValueError(f'weight must be "equal" or "samples", not {weight!r}')
        if ema is not None and not 0 < ema < 1:
            raise ValueError(f"ema must lie between 0 and 1, as a decay does, not {ema}")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be greater than 0, not {clip_norm}")
        self._comm, self._model, self._optimizer = comm, model, optimizer
        self._options = Options(
            chosen_policy(policy), scheduler, seed, weight, clip_norm, ema, own_copy, record,
            on_step, progress, late_work_of(on_late),
        )  # fmt: skip
        self._role: Role | None = None
        self._has_batches = False
        self._evaluated = 0
        self.average: dict[str, Any] | None = None

    def __enter__(self) -> Session:
        if self._comm.size == 1:
            check_launcher(self._comm)
            self._role = SingleProcessRole(self._model, self._optimizer, self._options)
        else:
            role = RootRole if self._comm.rank == self._comm.size - 1 else WorkerRole
            self._role = role(self._comm, self._model, self._optimizer, self._options)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        role = self._active
        try:
            role.leave(error)
            if role.averages is not None:
                self.average = averaged_state(self._model, role.averages)
        finally:
            self._role = EndedRole(
                role.worker, role.workers, role.version, role.makes_updates, role.averages, role.samples()
            )

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
        """Yield this worker's batches until the parameters have had `steps` updates, or the samples are used up.

        The loader is shared out among the workers and gone through again and again; on the root
        nothing is yielded. `step` follows each batch, or each few: gradients accumulate in between,
        as everywhere in torch. Leaving the loop early means that this worker leaves.

        Args:
            loader: A DataLoader, a list of batches, or any iterable of batches. A sampler of your
                own, and an iterable other than a list, are taken as they are.
            steps: How many versions to make; without it and `epochs`, until `stop`.
            epochs: How many times every sample is used; under ``on_late="requeue"`` only. The last updates may take
                fewer gradients than others, where samples run out.
            resume: ``state_dict()["samples"]`` of an earlier run's root: go on at its place in the data, with its
                accounts. What was in flight then is handed out again. Load the model and the optimizer before Session;
                versions count from 0.

        Raises:
            RuntimeError: This is a second loop; at the end of the `with`: the root had none.
            PeerFailed: Another rank failed.
        """
        if self._has_batches:
            raise RuntimeError(
                "session.batches can be gone through once a session: give it the steps of all epochs together, and do "
                "what came between them in the loop (session.version, session.evaluate(fn, every=)) or in on_step="
            )
        loop = LoopOptions(steps, epochs, resume)
        loop.check(self._options.on_late, self._options.seed)
        self._has_batches = True
        for parameter in self._model.parameters():
            parameter.grad = None  # what was computed before is no batch's
        return self._active.batches(loader, loop)

    def step(
        self, loss: Tensor | float | None = None, *, samples: int | None = None, cost: float | None = None
    ) -> Verdict:
        """Send the gradient that `backward` left, wait for its verdict, and take the newest parameters.

        Several batches make one gradient where `step` comes after the last of them only: as it has
        accumulated, all computed on the same parameters. Scale each loss as you would elsewhere.

        Args:
            loss: The batch's loss, for records and reports.
            samples: How many samples it is the mean of; counted from the batches otherwise.
            cost: What one of its batches costs to compute on, in any unit, such as the length of its sequences. The end
                of the run tells how much was dropped of cheap and of dear ones.

        Returns:
            Whether the gradient was accepted, and if not, why.
        """
        value = _number(loss)
        if cost is not None and not 0 < cost < math.inf:
            raise ValueError(f"cost must be finite and greater than 0, not {cost}")
        return self._active.step(value, samples, math.nan if cost is None else float(cost))

    def stale(self) -> bool:
        """Say whether this computation's step has closed, so that going on with it is vain."""
        return self._active.stale()

    def stop(self) -> None:
        """End the training on every rank, before another step closes."""
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
        return self._copied(average=average)[0]

    def _copied(self, *, average: bool = False) -> tuple[nn.Module, int]:
        """Return a private copy of the model, and the version of its parameters."""
        plain = getattr(self._model, "_orig_mod", self._model)
        if average and self._options.ema is None:
            raise ValueError("there is no average: pass ema= to Session")
        twin: nn.Module = copy.deepcopy(plain)
        return twin, self._active.fill(FlatModel(twin), average=average)

    def evaluate(
        self, fn: Callable[[nn.Module], _T], *, every: int, average: bool = False
    ) -> _T | None:
        """Call ``fn(snapshot)`` on one worker, once in `every` versions, while the others train.

        Call it in the loop behind `step`, on every worker. The one that evaluates is merely late.

        Returns:
            What `fn` returned; None on other workers and when it is not yet time.
        """
        if every < 1:
            raise ValueError(f"every must be at least 1, not {every}")
        if self.worker != 0 or self.version // every <= self._evaluated:
            return None
        self._evaluated = self.version // every
        return fn(self.snapshot(average=average))

    def state_dict(self) -> dict[str, Any]:
        """Return the newest version and the model's state; on the root also the optimizer's, scheduler's, samples'."""
        twin, version = self._copied()
        state: dict[str, Any] = {"version": version, "model": twin.state_dict()}
        if self._active.makes_updates:
            state["optimizer"] = self._optimizer.state_dict()
            if self._options.scheduler is not None:
                state["scheduler"] = self._options.scheduler.state_dict()
            state["samples"] = {
                "on_late": str(self._options.on_late), "seed": self._options.seed, **self._active.samples()
            }  # fmt: skip
        return state

