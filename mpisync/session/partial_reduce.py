"""The array face: push a gradient, pull the parameters, in mpi4py's manner."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import numpy as np
from mpi4py import MPI

from mpisync.aggregation.closed_step import ClosedStep
from mpisync.aggregation.errors import PeerFailed
from mpisync.aggregation.participant import Participant, compile_at_root
from mpisync.aggregation.root import Root
from mpisync.aggregation.shutdown import leave_root, leave_worker
from mpisync.aggregation.verdict import Verdict
from mpisync.aggregation.worker import Worker
from mpisync.kernels.jit import check_jit
from mpisync.policies import Policy
from mpisync.records import StepRecord
from mpisync.session.arguments import optional_number, whole
from mpisync.session.arrays import ArrayForm
from mpisync.session.options import check_communicator, chosen_policy, problem_of
from mpisync.transport.layout import Layout
from mpisync.transport.rendezvous import Proposal, check_launcher, meet
from mpisync.transport.wire import GradientInfo


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
        self, closed: ClosedStep, form: ArrayForm, target: np.ndarray, is_open: Callable[[int], bool]
    ) -> None:
        self._closed, self._form, self._target, self._is_open = closed, form, target, is_open
        self.step, self.accepted, self.finite = closed.step, closed.accepted, closed.finite
        self.mean: Any = form.given(closed.mean[0])

    def publish(self, parameters: Any) -> StepRecord:
        """Make `parameters` the next version.

        Args:
            parameters: An array of the shape and dtype of `like`, of any kind that is taken for it.
                `PartialReduce.parameters` is published without a copy.

        Returns:
            What happened in the step.

        Raises:
            TypeError: It is no array.
            ValueError: It is of another shape or dtype, or not in host memory.
            RuntimeError: This step was published before, or the training has ended.
        """
        if not self._is_open(self.step):
            raise RuntimeError(
                f"step {self.step} was published already, or the training has ended: publish each step once, inside "
                "the loop over serve"
            )
        values = self._form.taken(parameters, "the parameters")
        if values.ctypes.data != self._target.ctypes.data:
            np.copyto(self._target, values)
        return self._closed.publish()


class PartialReduce:
    """A partial reduction: averages the first gradients of every step at a root, and hands its parameters back.

    The last rank of `comm` is the root, the others are workers. Collective; use it as a context
    manager, or call `free` on every rank.

    Args:
        comm: The communicator; a private duplicate is used.
        like: An array of the gradients' shape and dtype (float64, float32, float16, or bfloat16). Here and elsewhere
            that is a NumPy array, a CPU tensor, or any array in host memory that speaks DLPack.
        policy: When a step closes and which gradients count. MPISYNC_POLICY goes before it.
        parameters: On the root: the values of version 0, of the shape and dtype of `like`.
            Without it they are zeros.

    Attributes:
        parameters: The parameters in memory that the root shares with the workers of its node, for
            use without copies; the root's own memory elsewhere. A worker must not write to it. After
            `free`, the final parameters, a copy of one's own.
        gradient: On a worker: where its gradient goes; fill it and `push` it to save a copy.

    Both, and a step's mean, are tensors where `like` is a tensor, else NumPy arrays.

    Raises:
        ValueError: Fewer than two ranks, arrays that differ between ranks or cannot be used, or a policy that could
            never close a step; on every rank.

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
        problem = (
            problem_of(check_jit)
            or problem_of(lambda: ArrayForm(like))
            or problem_of(lambda: chosen_policy(policy).check(comm.size - 1))
        )
        if parameters is not None and not problem:
            problem = problem_of(lambda: ArrayForm(like).taken(parameters, "the parameters"))
        if problem:
            meet(comm, Proposal("", problem), _differ)  # which raises it, on every rank
        self._form, policy = ArrayForm(like), chosen_policy(policy)
        shape, dtype = self._form.shape, self._form.dtype
        layout = Layout.of([(dtype.name, math.prod(shape))])
        content = json.dumps({"dtype": dtype.name, "shape": list(shape), "policy": str(policy)})
        compile_at_root(comm, layout)
        meeting = meet(comm, Proposal(content), _differ)
        self._participant = Participant(meeting, layout, layout, policy)
        self.is_root = self._participant.is_root
        self._root: Root | None = None
        self._worker: Worker | None = None
        if self.is_root:
            self._flat: np.ndarray = layout.arrays(self._participant.parameters)[0]
            if parameters is not None:
                np.copyto(self._flat, self._form.taken(parameters, "the parameters"))
            self._root = self._participant.root()
        else:
            self._worker = self._participant.worker()
            link = self._worker.link
            self._flat = layout.arrays(link.parameters)[0]
            self._slot = layout.arrays(link.gradient)[0]
            self.gradient: Any = self._form.given(self._slot)
        self.parameters: Any = self._form.given(self._flat)
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
            self._closed = closed.step
            yield ReducedStep(closed, self._form, self._flat, self._is_open)
        self.free()

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
        if target is not None and target.ctypes.data == self._flat.ctypes.data and target.size:
            target = None  # another view of the same
        running = not self._freed and worker.pull() is not None
        if not running:
            self._leave(None)
        if target is not None and running:
            whole_copy = target if target.flags.c_contiguous else np.empty(target.shape, target.dtype)
            worker.read(whole_copy.reshape(-1).view(np.uint8))
            if whole_copy is not target:
                np.copyto(target, whole_copy)
        elif target is not None:
            np.copyto(target, self._flat.reshape(target.shape))
        return running

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
            ValueError: The gradient is of another shape or dtype, or not in host memory; or there are no samples.
            RuntimeError: Nothing was pulled yet, or the training has ended.
            PeerFailed: Another rank failed.
        """
        worker = self._as_worker("push")
        if self._freed:
            raise RuntimeError("push comes too late: the training has ended, as pull said with False")
        if worker.version < 0:
            raise RuntimeError("push comes before pull: a gradient is computed on the parameters that pull brings")
        samples, value = whole("samples", samples, 1), optional_number("loss", loss)
        reducer, dtype = self._participant.memory.reducer, self._form.dtype
        if gradient is None or gradient is self.gradient:  # it is in its slot already
            peak = reducer.peak(self._slot, dtype)
        else:
            peak = reducer.pack(self._form.taken(gradient, "the gradient"), self._slot, dtype)
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
        final = self._flat.copy()
        try:
            if self._worker is not None and error is None:
                self._worker.finish()
                self._worker.read(final.view(np.uint8))
        except PeerFailed as failed:
            error = failed
            raise
        finally:
            self._flat = self._slot = final  # let go of shared memory
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
