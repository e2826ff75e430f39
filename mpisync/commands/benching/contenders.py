"""The ways to average gradients that `collective.py` compares, behind one face.

Every gradient is a pattern of eight small numbers times the worker's number from one, so that every
result is known without a second implementation: a step on the pattern alone tells what each element
must be.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
from mpi4py import MPI

from mpisync.aggregation.participant import Participant, compile_at_root
from mpisync.aggregation.shutdown import leave_root, leave_worker
from mpisync.commands.benching.measuring import meet
from mpisync.device.host import HostMemory
from mpisync.policies import BackupWorkers
from mpisync.transport import rendezvous
from mpisync.transport.layout import Layout, SgdSpan
from mpisync.transport.rendezvous import Proposal
from mpisync.transport.wire import GradientInfo

LR = 0.125
_STRIDE = 997  # of the elements looked at after every visit


def pattern(size: int) -> np.ndarray:
    """Return 1 to 8, over and over: exact in float32 whatever is summed."""
    return (np.arange(size) % 8 + 1).astype(np.float32)


class Update:
    """A step of an optimizer on an array, in place.

    SGD is what torch's does without its class, `add_`, or NumPy's two passes where torch is absent;
    AdamW is torch's own, fused.
    """

    def __init__(self, name: str, parameters: np.ndarray, threads: int = 1) -> None:
        self._parameters = parameters
        self._optimizer: Any = None
        self._torch: Any = None
        try:
            import torch
        except ImportError:
            if name != "sgd":
                raise
            return
        self._torch = torch
        if threads > 1:  # as a session's root does
            torch.set_num_threads(threads)
        self._leaf = torch.from_numpy(parameters)
        if name == "adamw":
            self._leaf.requires_grad_()
            self._optimizer = torch.optim.AdamW([self._leaf], lr=LR, fused=True)

    def step(self, mean: np.ndarray) -> None:
        """Update the parameters."""
        if self._torch is None:
            np.multiply(mean, LR, out=mean)
            np.subtract(self._parameters, mean, out=self._parameters)
        elif self._optimizer is None:
            self._leaf.add_(self._torch.from_numpy(mean), alpha=-LR)
        else:
            self._leaf.grad = self._torch.from_numpy(mean)
            self._optimizer.step()


class Contender:
    """One way; every rank has an object, the last rank's is the root's (it may have no part)."""

    name: str

    def __init__(self, comm: MPI.Intracomm, team: MPI.Intracomm | None, size: int) -> None:
        self.comm, self.team, self.size = comm, team, size
        self.workers = comm.size - 1

    def work(self, count: int) -> list[float]:
        """Do `count` rounds on a worker; how long each took here, in seconds."""
        took = []
        for _ in range(count):
            self.reset()
            begin = time.perf_counter()
            self.once()
            took.append(time.perf_counter() - begin)
        return took

    def serve(self, count: int) -> None:
        """Do the root's part of `count` rounds."""

    def reset(self) -> None:
        """Make ready for a round, outside the time."""

    def once(self) -> None:
        """Do one round on a worker."""
        raise NotImplementedError

    def outcome(self) -> tuple[np.ndarray, np.ndarray]:
        """Return what a worker has, and what the first eight elements should be."""
        raise NotImplementedError

    def is_right(self, whole: bool) -> bool:
        """Check the result, all of it or one element of many."""
        got, expected = self.outcome()
        if not whole:
            at = np.arange(0, self.size, _STRIDE)
            return bool(np.allclose(got[at], expected[at % 8], rtol=1e-4, atol=1e-6))
        rows = got[: self.size // 8 * 8].reshape(-1, 8)
        rest = got[self.size // 8 * 8 :]
        return bool(
            np.allclose(rows, expected, rtol=1e-4, atol=1e-6)
            and np.allclose(rest, expected[: rest.size], rtol=1e-4, atol=1e-6)
        )

    def close(self) -> None:
        """Give everything back. Collective."""


class Ours(Contender):
    """First N of N workers, from gradients in their slots to new parameters, update included."""

    def __init__(
        self,
        comm: MPI.Intracomm,
        team: MPI.Intracomm | None,
        size: int,
        transport: str,
        optimizer: str,
    ) -> None:
        super().__init__(comm, team, size)
        self.name = f"mpisync {transport}"
        os.environ["MPISYNC_TRANSPORT"] = transport
        os.environ.setdefault("MPISYNC_STALL_REPORT_S", "3600")  # the others' turns are no stalls
        layout = Layout.of([("float32", size)])
        self._own = comm.Dup()  # two runs at a time must not share a communicator
        compile_at_root(self._own, layout)
        meeting = rendezvous.meet(self._own, Proposal("", ""), lambda a, b: None)
        participant = Participant(meeting, layout, layout, BackupWorkers(0))
        self._known = np.zeros(8, np.float32)
        self._check = Update(optimizer, self._known)
        if participant.is_root:
            self._root = participant.root()
            self._steps = self._root.serve()
            assert isinstance(participant.memory, HostMemory)  # as no other was asked for
            parameters = layout.arrays(participant.parameters)[0]
            self._update = Update(optimizer, parameters, participant.memory.reducer.threads)
            self._spans = [SgdSpan(0, 0, size, LR)] if optimizer == "sgd" else []
            self.spent_s: dict[str, list[float]] = {
                "reduce": [], "update": [], "publish": [], "step": []
            }  # fmt: skip
        else:
            self._worker = participant.worker()
            link = self._worker.link
            self._parameters = layout.arrays(link.parameters)[0]
            layout.arrays(link.gradient)[0][:] = pattern(size) * (comm.rank + 1)

    def once(self) -> None:
        """Hand the gradient over, and wait for the parameters it led to."""
        self._worker.push(GradientInfo(1, peak=8.0 * self.workers))
        self._worker.pull()

    def serve(self, count: int) -> None:
        """Take, update, publish; see to it that what was published arrives."""
        before_s = None
        for _ in range(count):
            closed = next(self._steps)
            if not (self._spans and closed.fused_sgd_step(self._spans)):
                self._update.step(closed.mean[0])
            record = closed.publish()
            self.spent_s["reduce"].append(record.reduce_s)
            self.spent_s["update"].append(record.update_s)
            self.spent_s["publish"].append(record.publish_s)
            if before_s is not None:  # from one version to the next, within a burst
                self.spent_s["step"].append(record.published_s - before_s)
            before_s = record.published_s
        arrived = self.comm.Ibarrier()
        while not arrived.Test():
            self._root.inbox.take()  # which sends on what is on its way
            self._root.roster.wait(1e-4)

    def work(self, count: int) -> list[float]:
        """Follow what the parameters should be by steps on the pattern alone."""
        if self._worker.version < 0:
            self._worker.pull()  # the first needs the root to serve
        took = super().work(count)
        meet(self.comm)  # as the root's `serve` does
        mean = pattern(8) * np.float32((self.workers + 1) / 2)
        for _ in range(count):
            self._check.step(mean.copy())
        return took

    def outcome(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the parameters."""
        return self._parameters, self._known

    def close(self) -> None:
        """End the training."""
        if self.team is None:
            leave_root(self._root, None)
        else:
            leave_worker(self._worker, None)
        self._own.Free()


class Collective(Contender):
    """Sums among the workers, without an update."""

    def __init__(self, comm: MPI.Intracomm, team: MPI.Intracomm | None, size: int) -> None:
        super().__init__(comm, team, size)
        self._ranks = comm if team is None else team
        if team is not None:
            self._source = pattern(size) * (comm.rank + 1)
            self._sum = np.zeros(size, np.float32)

    def reset(self) -> None:
        """Spoil what the last round left."""
        self._sum[::_STRIDE] = np.nan

    def outcome(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the sum."""
        return self._sum, pattern(8) * np.float32(self.workers * (self.workers + 1) / 2)


class Allreduce(Collective):
    """MPI_Allreduce."""

    name = "MPI_Allreduce"

    def once(self) -> None:
        """Sum everywhere."""
        self._ranks.Allreduce(self._source, self._sum, MPI.SUM)


class ReduceBcast(Collective):
    """MPI_Reduce, then MPI_Bcast."""

    name = "Reduce+Bcast"

    def once(self) -> None:
        """Sum at the first, then send to all."""
        self._ranks.Reduce(self._source, self._sum, MPI.SUM, root=0)
        self._ranks.Bcast(self._sum, root=0)


class Gloo(Collective):
    """The all_reduce under DistributedDataParallel on CPUs."""

    name = "gloo all_reduce"

    def __init__(self, comm: MPI.Intracomm, team: MPI.Intracomm | None, size: int, distributed: Any) -> None:
        super().__init__(comm, team, size)
        self._distributed = distributed
        if team is not None:
            import torch

            self._tensor = torch.from_numpy(self._sum)

    def reset(self) -> None:
        """It sums in place."""
        np.copyto(self._sum, self._source)

    def once(self) -> None:
        """Sum everywhere."""
        self._distributed.all_reduce(self._tensor)
