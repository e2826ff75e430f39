"""The array face: push a gradient, pull the parameters, in mpi4py's manner."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import numpy as np
from mpi4py import MPI

from mpisync.aggregation.closed_step import ClosedStep
from mpisync.aggregation.errors import PeerFailed
from mpisync.aggregation.participant import Participant, bytes_at_root, compile_at_root
from mpisync.aggregation.root import Root
from mpisync.aggregation.shutdown import leave_root, leave_worker
from mpisync.aggregation.verdict import Verdict
from mpisync.aggregation.worker import Worker
from mpisync.device.base import Array
from mpisync.device.placement import placed
from mpisync.kernels.jit import check_jit
from mpisync.policies import Policy
from mpisync.records import StepRecord
from mpisync.session.arguments import optional_number, whole
from mpisync.session.arrays import Form
from mpisync.session.device_arrays import form_of
from mpisync.session.options import check_communicator, chosen_policy, made_or_problem
from mpisync.transport.layout import Layout
from mpisync.transport.rendezvous import Proposal, check_launcher, meet
from mpisync.transport.wire import GradientInfo

_BYTES = np.dtype(np.uint8)


class ReducedStep:
    """A closed step of a `PartialReduce`.

    Attributes:
        step: Its number.
        mean: The mean of the accepted gradients, of the gradient's shape; float32 for 16-bit gradients. The next step's
            takes its memory: copy what you keep.
        accepted: (worker, sequence) of each, in order of acceptance.
        finite: Whether every element of the mean is finite.
    """

    def __init__(
        self, closed: ClosedStep, mean: Any, write: Callable[[Any], None], is_open: Callable[[int], bool]
    ) -> None:
        self._closed, self._write, self._is_open = closed, write, is_open
        self.step, self.accepted, self.finite = closed.step, closed.accepted, closed.finite
        self.mean = mean

    def publish(self, parameters: Any) -> StepRecord:
        """Make `parameters` the next version.

        Args:
            parameters: An array of the shape and dtype of `like`, of any kind that is taken for it.
                `PartialReduce.parameters` is published without a copy, where the root reduces in their memory.

        Returns:
            What happened in the step.

        Raises:
            TypeError: It is no array.
            ValueError: It is of another shape or dtype, or not where `like` is.
            RuntimeError: This step was published before, or the training has ended.
        """
        if not self._is_open(self.step):
            raise RuntimeError(
                f"step {self.step} was published already, or the training has ended: publish each step once, inside "
                "the loop over serve"
            )
        self._write(parameters)
        return self._closed.publish()


class PartialReduce:
    """A partial reduction: averages the first gradients of every step at a root, and hands its parameters back.

    The last rank of `comm` is the root, the others are workers. Collective; use it as a context
    manager, or call `free` on every rank.

    Args:
        comm: The communicator; a private duplicate is used.
        like: An array of the gradients' shape and dtype (float64, float32, float16, or bfloat16). Here and elsewhere
            that is a NumPy array, a tensor, or any array that speaks DLPack, in host memory or on a CUDA device:
            all of a rank's are where its `like` is. Ranks may differ in that.
        policy: When a step closes and which gradients count. MPISYNC_POLICY goes before it.
        parameters: On the root: the values of version 0, of the shape and dtype of `like`.
            Without it they are zeros.

    Attributes:
        parameters: The parameters in memory that the root shares with the workers of its node, for
            use without copies; the root's own memory elsewhere. A worker must not write to it. On a worker with
            its arrays on a device, or whose policy lets old versions count, it is what was pulled into it. After
            `free`, the final parameters, a copy of one's own.
        gradient: On a worker: where its gradient goes; fill it and `push` it to save a copy.

    Both, and a step's mean, are tensors where `like` is a tensor, else NumPy arrays, on a device CuPy arrays.

    Raises:
        ValueError: Fewer than two ranks, arrays that differ between ranks or cannot be used, a device that cannot, or
            a policy that could never close a step; on every rank.

    Example:
        Run with ``mpirun -n 5 python script.py``::

            reduction = mpisync.PartialReduce(comm, like=theta, policy=mpisync.BackupWorkers(1))
            if reduction.is_root:
                for step in reduction.serve(steps=1000):
                    theta -= 0.1 * step.mean
                    step.publish(theta)
            else:
                while reduction.pull(theta):
                    verdict = reduction.push(compute(theta))
            reduction.free()

        One process alone cannot be root and worker:

        >>> import numpy as np
        >>> PartialReduce(MPI.COMM_SELF, like=np.zeros(3))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: PartialReduce needs a root and at least one worker, but ...
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        *,
        like: Any,
        policy: Policy | None = None,
        parameters: Any | None = None,
    ) -> None:
        check_communicator(comm)
        check_launcher(comm)
        if comm.size < 2:
            raise ValueError(
                "PartialReduce needs a root and at least one worker, but the communicator has one "
                "rank: start the script with `mpisync run -n 3 ...` or mpirun"
            )

        def prepare() -> tuple[Form, Policy]:
            check_jit()
            form, chosen = form_of(like), chosen_policy(policy)
            chosen.check(comm.size - 1)
            if parameters is not None:
                form.taken(parameters, "the parameters")
            return form, chosen

        made, problem = made_or_problem(prepare)
        if made is None:
            meet(comm, Proposal("", problem), _differ)  # which raises it, on every rank
        assert made is not None
        form, policy = made
        self._form, dtype = form, form.dtype
        layout = Layout.of([(dtype.name, form.size)])
        own = form.memory
        if own is not None and comm.rank == comm.size - 1:
            needed_bytes = bytes_at_root(layout, layout, comm.size - 1, policy)
            own, problem = made_or_problem(lambda: placed(form.memory, needed_bytes))
        content = json.dumps({"dtype": dtype.name, "shape": list(form.shape), "policy": str(policy)})
        compile_at_root(comm, layout)
        meeting = meet(comm, Proposal(content, problem), _differ)
        self._participant = Participant(meeting, layout, layout, policy, own)
        self.is_root = self._participant.is_root
        self._root: Root | None = None
        self._worker: Worker | None = None
        self._mean: Array | None = None  # where users see it, if it is not made there
        if self.is_root:
            self._home = self._flat = layout.arrays(self._participant.parameters)[0]
            self._owns_flat = not form.is_in(self._participant.memory)
            if self._owns_flat:
                self._flat, self._mean = form.allocate(dtype.storage), form.allocate(dtype.accumulator)
            if parameters is not None:
                self._write(parameters)
            self._root = self._participant.root()
        else:
            self._worker = self._participant.worker()
            link = self._worker.link
            self._slot = layout.arrays(link.gradient)[0]
            self._packs = form.is_in(link.memory)  # gradients straight into their slot
            self.gradient: Any = form.given(self._slot if form.lends else form.allocate(dtype.storage))
            self._owns_flat = not (form.lends and self._participant.reads_in_place)
            self._flat = form.allocate(dtype.storage) if self._owns_flat else layout.arrays(link.parameters)[0]
        self.parameters: Any = form.given(self._flat)
        if not self.is_root and isinstance(self.parameters, np.ndarray):
            self.parameters.flags.writeable = False  # whoever writes to what all share is told at the line
        self._closed = -1  # the newest step that was handed out at the root
        self._freed = False

    # -- the root ----------------------------------------------------------------------------------

    def serve(self, steps: int | None = None) -> Iterator[ReducedStep]:
        """Yield each closed step; publish it before going on.

        Args:
            steps: How many versions to make; without it, until `stop` or until all workers left.

        Raises:
            RuntimeError: This rank is a worker, or a step was not published.
            PeerFailed: A worker failed.
        """
        if self._root is None:
            raise RuntimeError("serve is the root's: workers pull and push")
        for closed in self._root.serve(None if steps is None else whole("steps", steps, 0)):
            self._closed, mean = closed.step, closed.mean[0]
            if self._mean is not None:
                self._form.copy(mean, self._mean)
                mean = self._mean
            yield ReducedStep(closed, self._form.given(mean), self._write, self._is_open)
        self.free()

    def _write(self, parameters: Any) -> None:
        """Write the next version to where users see it, and to where it is published from."""
        self._form.copy(self._form.taken(parameters, "the parameters"), self._flat)
        self._form.copy(self._flat, self._home)

    def _is_open(self, step: int) -> bool:
        return not self._freed and self._root is not None and self._root.version == step

    # -- a worker ----------------------------------------------------------------------------------

    def pull(self, parameters: Any) -> bool:
        """Wait for the newest version and copy it into `parameters`.

        Args:
            parameters: Of the shape and dtype of `like`; `PartialReduce.parameters` saves the copy.

        Returns:
            False when the training has ended; `parameters` then holds the final version, and this
            worker has said goodbye.
        """
        worker = self._as_worker("pull")
        target = None if parameters is self.parameters else self._form.target(parameters, "the parameters")
        if target is not None and self._form.is_one(target, self._flat):
            target = None  # another view of the same
        running = not self._freed and worker.pull() is not None
        if not running:
            self._leave(None)
        if target is not None:
            self._form.fill(target, worker.read if running else self._read_final)
        elif running and self._owns_flat:
            worker.read(self._flat.view(_BYTES))
        return running

    def _read_final(self, target: Array) -> None:
        self._form.copy(self._flat.view(_BYTES), target)

    def push(self, gradient: Any | None = None, *, samples: int = 1, loss: float | None = None) -> Verdict:
        """Send a gradient and wait for its verdict.

        Args:
            gradient: Of the shape and dtype of `like`; without it, what is in `self.gradient`.
            samples: How many samples it is the mean of.
            loss: Their loss, for the record.

        Returns:
            Whether it was accepted, and if not, why; a gradient with NaN or Inf is rejected.

        Raises:
            TypeError: An argument is of a wrong type.
            ValueError: The gradient is of another shape or dtype, or not where `like` is; or there are no samples.
            RuntimeError: Nothing was pulled yet, or the training has ended.
            PeerFailed: Another rank failed.
        """
        worker = self._as_worker("push")
        if self._freed:
            raise RuntimeError("push comes too late: the training has ended, as pull said with False")
        if worker.version < 0:
            raise RuntimeError("push comes before pull: a gradient is computed on the parameters that pull brings")
        samples, value = whole("samples", samples, 1), optional_number("loss", loss)
        memory, dtype = self._participant.memory, self._form.dtype
        gradient = self.gradient if gradient is None else gradient
        if gradient is self.gradient and self._form.lends:  # it is in its slot already
            peak = memory.reducer.peak(self._slot, dtype)
        elif self._packs:
            peak = memory.reducer.pack(self._form.taken(gradient, "the gradient"), self._slot, dtype)
        else:
            taken = self._form.taken(gradient, "the gradient")
            peak = memory.reducer.peak(taken, dtype)
            memory.copy(taken, self._slot)
        worker.handed += samples
        return worker.push(GradientInfo(samples, value, peak=peak))

    def stale(self) -> bool:
        """Say whether the version being computed on is superseded, so that computing on is vain."""
        return self._as_worker("stale").is_stale()

    def _as_worker(self, verb: str) -> Worker:
        if self._worker is None:
            raise RuntimeError(f"{verb} is a worker's: the root serves")
        return self._worker

    # -- the end -----------------------------------------------------------------------------------

    def stop(self) -> None:
        """End the training on every rank."""
        if self._root is not None:
            self._root.stop()
        elif self._worker is not None:
            self._worker.stop()

    def free(self) -> None:
        """Say goodbye and give back the memory; on a worker, wait for the end of the training."""
        self._leave(None)

    def _leave(self, error: BaseException | None) -> None:
        if self._freed:
            return
        self._freed = True
        unpublished = None
        if error is None and self._root is not None and self._closed == self._root.version:
            # workers cannot read what is about to be written, and would wait for it
            error = unpublished = RuntimeError(
                f"step {self._closed} was closed but not published: call step.publish() before leaving the loop over "
                "serve"
            )
        final = self._flat
        try:
            if not self._owns_flat:
                final = self._form.allocate(self._form.dtype.storage)
                self._form.copy(self._flat, final)
            if self._worker is not None and error is None:
                self._worker.finish()
                self._worker.read(final.view(_BYTES))
        except PeerFailed as failed:
            error = failed
            raise
        finally:
            self._flat = self._slot = self._home = final  # let go of shared memory
            self.parameters = self.gradient = self._form.given(final)
            if self._root is not None:
                leave_root(self._root, error)
            elif self._worker is not None:
                leave_worker(self._worker, error)
        if unpublished is not None:
            raise unpublished

    def __enter__(self) -> PartialReduce:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(error)


def _differ(root: str, here: str) -> str | None:
    a, b = json.loads(root), json.loads(here)
    for name in a:
        if a[name] != b[name]:
            return f"{name} is {b[name]} here and {a[name]} on the root: all ranks must agree"
    return None
