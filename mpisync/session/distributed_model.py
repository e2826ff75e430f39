"""The layouts of a torch session, and the rank's part in the run: what a root and a worker have in common."""

from __future__ import annotations

import json
import sys

import numpy as np
from mpi4py import MPI
from torch import nn
from torch.optim import Optimizer

from mpisync.aggregation.participant import Participant, compile_at_root
from mpisync.model.flat import FlatModel
from mpisync.model.origins import differing, digest, shared_elsewhere
from mpisync.model.scheduler import check_scheduler
from mpisync.model.signature import difference
from mpisync.model.tensor_layout import Views
from mpisync.model.validation import check_model_and_optimizer
from mpisync.session.options import Options, problem_of
from mpisync.session.recorder import check_replay
from mpisync.transport.collectives import poll
from mpisync.transport.layout import Layout, aligned, aligned_bytes
from mpisync.transport.rendezvous import Meeting, Proposal, meet


class DistributedModel:
    """The model as it travels, and this rank's part in the run. Collective.

    A gradient's extras are a byte a parameter that says whether it had a gradient, then the module
    buffers; a version's extras are the module buffers. The average, if there is one, follows the
    parameters in segments of its own.
    """

    def __init__(
        self, comm: MPI.Intracomm, model: nn.Module, optimizer: Optimizer, options: Options, problem: str
    ) -> None:
        problem = (
            problem
            or problem_of(lambda: options.policy.check(comm.size - 1))
            or problem_of(lambda: check_replay(options))
            or problem_of(lambda: check_model_and_optimizer(model, optimizer))
            or problem_of(lambda: check_scheduler(options.scheduler, optimizer))
            or problem_of(lambda: FlatModel(model))
        )
        if problem:
            meet(comm, Proposal("", problem), _differ)  # which raises it, on every rank
        self.flat = FlatModel(model)
        self.presence_bytes = aligned(len(self.flat.parameters))
        self.segments = len(self.flat.segments)
        buffers_bytes = self.flat.buffers.size_bytes
        layout = Layout.of(self.flat.segments, self.presence_bytes + buffers_bytes)
        copies = 1 if options.ema is None else 2
        published = Layout.of([*self.flat.segments] * copies, buffers_bytes)
        said = {
            "policy": str(options.policy),
            "seed": options.seed,
            "weight": options.weight,
            "ema": options.ema,
            "own_copy": options.own_copy,
            "on_late": str(options.on_late),
        }
        content = json.dumps([said, self.flat.signature().decode()])
        compile_at_root(comm, layout)
        meeting = meet(comm, Proposal(content), _differ)
        self._notice(model, meeting)
        self.participant = Participant(meeting, layout, published, options.policy)
        self._share_frozen()

    def _notice(self, model: nn.Module, meeting: Meeting) -> None:
        """Say what is no error, and changes results where the script does not expect it."""
        digests = np.zeros(meeting.comm.size, np.int64)
        poll(meeting.comm.Iallgather(np.array([digest(model)], np.int64), digests), meeting.comm, "to compare models")
        notices = []
        if meeting.is_root:
            notices.append(differing(digests.tolist(), meeting.root))
        elif meeting.comm.rank == 0:
            notices.append(shared_elsewhere(list(zip(self.flat.names, self.flat.parameters, strict=True)), model))
        for text in filter(None, notices):
            print(text, file=sys.stderr, flush=True)

    def _share_frozen(self) -> None:
        """Give everyone the root's frozen parameters, once: they never travel again."""
        frozen, meeting = self.flat.frozen, self.participant.meeting
        if frozen.size_bytes:
            values = aligned_bytes(frozen.size_bytes)
            views = frozen.views(values)
            if meeting.is_root:
                frozen.pack(views)
            request = meeting.comm.Ibcast([values, MPI.BYTE], root=meeting.root)
            poll(request, meeting.comm, "to share frozen parameters")
            frozen.load(views)

    def parameters(self, memory: np.ndarray) -> Views:
        """Return the parameters in a version's bytes."""
        return self.flat.views(self.participant.published.arrays(memory)[: self.segments])

    def averages(self, memory: np.ndarray) -> Views:
        """Return the parameters' averages in a version's bytes."""
        return self.flat.views(self.participant.published.arrays(memory)[self.segments :])


def _differ(root: str, here: str) -> str | None:
    (theirs, their_model), (ours, our_model) = json.loads(root), json.loads(here)
    for name, value in theirs.items():
        if ours[name] != value:
            return f"{name} is {ours[name]!r} here and {value!r} on the root: all ranks must agree"
    return difference(their_model.encode(), our_model.encode())
