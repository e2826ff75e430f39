"""The array face: push a gradient, pull the parameters, in mpi4py's manner."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import TracebackType

import numpy as np
from mpi4py import MPI

from mpisync.aggregation.closed_step import ClosedStep
from mpisync.aggregation.errors import PeerFailed
from mpisync.aggregation.participant import Participant, compile_at_root
from mpisync.aggregation.root import Root
from mpisync.aggregation.shutdown import leave_root, leave_worker
from mpisync.aggregation.verdict import Verdict
from mpisync.aggregation.worker import Worker
from mpisync.kernels.dtypes import dtype_of
from mpisync.policies import Policy
from mpisync.records import StepRecord
from mpisync.session.options import check_communicator, chosen_policy, problem_of
from mpisync.transport.layout import Layout
from mpisync.transport.rendezvous import Proposal, check_launcher, meet
from mpisync.transport.wire import GradientInfo


class ReducedStep:
    """A closed step of a `PartialReduce`.

    Attributes:
        step: Its number.
        mean: The mean of the accepted gradients, of the gradient's shape; float32 for 16-bit gradients.
        accepted: (worker, sequence) of each, in order of acceptance.
        finite: Whether every element of the mean is finite.
    """

    def __init__(self, closed: ClosedStep, shape: tuple[int, ...], target: np.ndarray) -> None:
        self._closed, self._target = closed, target
        self.step, self.accepted, self.finite = closed.step, closed.accepted, closed.finite
        self.mean = closed.mean[0].reshape(shape)

    def publish(self, parameters: np.ndarray) -> StepRecord:
        """Make `parameters` the next version.

        Args:
            parameters: An array of the gradient's shape and dtype. `PartialReduce.parameters` is
                published without a copy.

        Returns:
            What happened in the step.
        """
        if parameters.ctypes.data != self._target.ctypes.data:
            np.copyto(self._target, parameters.reshape(-1))
        return self._closed.publish()


class PartialReduce:
    """A partial reduction: averages the first gradients of every step at a root, and hands its parameters back.

    The last rank of `comm` is the root, the others are workers. Collective; use it as a context
    manager, or call `free` on every rank.

    Args:
        comm: The communicator; a private duplicate is used.
        like: An array of the gradients' shape and dtype (float64, float32, float16, or bfloat16).
        policy: When a step closes and which gradients count. MPISYNC_POLICY goes before it.
        parameters: On the root: the values of version 0, of the shape and dtype of `like`.
            Without it they are zeros.

    Attributes:
        parameters: The parameters in memory that the root shares with the workers of its node, for
            use without copies; the root's own memory elsewhere. Workers must not write to it. After
            `free`, the final parameters, a copy of one's own.
        gradient: On a worker: where its gradient goes; fill it and `push` it to save a copy.

    Raises:
        ValueError: Fewer than two ranks, arrays that differ between ranks, or a policy that could
            never close a step.

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
        like: np.ndarray,
        policy: Policy | None = None,
        parameters: np.ndarray | None = None,
    ) -> None:
        check_communicator(comm)
        check_launcher(comm)
        if not isinstance(like, np.ndarray):
            raise TypeError(
                f"like must be a NumPy array, not {type(like).__name__}: of a CPU tensor give tensor.numpy()"
            )
        if comm.size < 2:
            raise ValueError(
                "PartialReduce needs a root and at least one worker, but the communicator has one "
                "rank: start the script with `mpisync run -n 3 ...` or mpirun"
            )
        policy = chosen_policy(policy)
        self._shape, self._dtype, self._like_dtype = like.shape, dtype_of(like), like.dtype
        problem = problem_of(lambda: policy.check(comm.size - 1))
        if parameters is not None:
            problem = problem or problem_of(lambda: self._check(parameters, "the parameters"))
        layout = Layout.of([(self._dtype.name, like.size)])
        content = json.dumps({"dtype": self._dtype.name, "shape": list(like.shape), "policy": str(policy)})
        compile_at_root(comm, layout)
        meeting = meet(comm, Proposal(content, problem), _differ)
        self._participant = Participant(meeting, layout, layout, policy)
        self.is_root = self._participant.is_root
        self._root: Root | None = None
        self._worker: Worker | None = None
        if self.is_root:
            self._flat: np.ndarray = layout.arrays(self._participant.parameters)[0].view(like.dtype)
            if parameters is not None:
                np.copyto(self._flat, parameters.reshape(-1))
            self._root = self._participant.root()
        else:
            self._worker = self._participant.worker()
            link = self._worker.link
            self._flat = layout.arrays(link.parameters)[0].view(like.dtype)
            gradient = layout.arrays(link.gradient)[0].view(like.dtype)
            self.gradient: np.ndarray = gradient.reshape(self._shape)
            self._slot = self._dtype.stored(gradient)
        self.parameters: np.ndarray = self._flat.reshape(self._shape)
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
        for closed in self._root.serve(steps):
            yield ReducedStep(closed, self._shape, self._flat)
        self.free()

    # -- a worker ----------------------------------------------------------------------------------

    def pull(self, parameters: np.ndarray) -> bool:
        """Wait for the newest version and copy it into `parameters`.

        Returns:
            False when the training has ended; `parameters` then holds the final version, and this
            worker has said goodbye.
        """
        worker = self._as_worker("pull")
        in_place = parameters is self.parameters
        if not in_place:
            self._check(parameters, "the parameters")
            if not parameters.flags.c_contiguous:
                raise ValueError("the parameters must be a contiguous array to be pulled into")
        running = not self._freed and worker.pull() is not None
        if not running:
            self._leave(None)
        if not in_place and running:
            worker.read(parameters.reshape(-1).view(np.uint8))
        elif not in_place:
            np.copyto(parameters, self.parameters)
        return running

    def push(
        self, gradient: np.ndarray | None = None, *, samples: int = 1, loss: float = float("nan")
    ) -> Verdict:
        """Send a gradient and wait for its verdict.

        Args:
            gradient: Of the shape and dtype of `like`; without it, what is in `self.gradient`.
            samples: How many samples it is the mean of.
            loss: Their loss, for the record.

        Returns:
            Whether it was accepted, and if not, why; a gradient with NaN or Inf is rejected.
        """
        worker = self._as_worker("push")
        if self._freed:
            raise RuntimeError("push comes too late: the training has ended, as pull said with False")
        reducer = self._participant.memory.reducer
        if gradient is None or gradient is self.gradient:  # it is in its slot already
            peak = reducer.peak(self._slot, self._dtype)
        else:
            self._check(gradient, "the gradient")
            stored = self._dtype.stored(np.ascontiguousarray(gradient)).reshape(-1)
            peak = reducer.pack(stored, self._slot, self._dtype)
        worker.handed += samples
        return worker.push(GradientInfo(samples, loss, peak=peak))

    def _check(self, array: np.ndarray, what: str) -> None:
        if array.shape != self._shape or array.dtype != self._like_dtype:
            raise ValueError(
                f"{what} must be {list(self._shape)} {self._dtype.name} as `like` is, but this is "
                f"{list(array.shape)} {array.dtype}"
            )

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
        final = self.parameters.copy()
        try:
            if self._worker is not None and error is None:
                self._worker.finish()
                self._worker.read(final.reshape(-1).view(np.uint8))
        except PeerFailed as failed:
            error = failed
            raise
        finally:
            self.parameters = self._flat = self.gradient = self._slot = final  # let go of shared memory
            if self._root is not None:
                leave_root(self._root, error)
            elif self._worker is not None:
                leave_worker(self._worker, error)

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
