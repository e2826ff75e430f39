"""The layouts of a torch session, and the rank's part in the run: what a root and a worker have in common."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from mpi4py import MPI
from torch import nn
from torch.optim import Optimizer

from mpisync.aggregation.participant import Participant, bytes_at_root, compile_at_root
from mpisync.device.base import Array, aligned
from mpisync.device.host import aligned_bytes
from mpisync.device.placement import memory_of, placed
from mpisync.kernels.jit import check_jit
from mpisync.model.aliases import check_aliases
from mpisync.model.averages import initial_average
from mpisync.model.flat import FlatModel
from mpisync.model.frozen import in_blocks
from mpisync.model.origins import differing, digest, shared_elsewhere
from mpisync.model.scheduler import check_schedulers
from mpisync.model.signature import difference
from mpisync.model.tensor_layout import Views
from mpisync.model.validation import check_model_and_optimizers
from mpisync.session.options import Options, made_or_problem, problem_of
from mpisync.session.recorder import check_replay
from mpisync.transport.collectives import broadcast, exchange
from mpisync.transport.layout import BLOCK_BYTES, Layout
from mpisync.transport.rendezvous import Meeting, Proposal, meet


class DistributedModel:
    """The model as it travels, and this rank's part in the run. Collective.

    A gradient's extras are a byte a parameter that says whether it had a gradient, then the module
    buffers; a version's extras are the module buffers. The average, if there is one, follows the
    parameters in segments of its own.
    """

    def __init__(
        self, comm: MPI.Intracomm, model: nn.Module, optimizers: Sequence[Optimizer], options: Options, problem: str
    ) -> None:
        problem = (
            problem
            or problem_of(check_jit)
            or problem_of(lambda: options.policy.check(comm.size - 1))
            or problem_of(lambda: check_replay(options))
            or problem_of(lambda: check_model_and_optimizers(model, optimizers))
            or problem_of(lambda: check_schedulers(options.schedulers, optimizers, options.metric_schedulers))
            or problem_of(lambda: initial_average(FlatModel(model), options.average))
            or problem_of(lambda: check_aliases(model, optimizers))
        )
        if problem:
            meet(comm, Proposal("", problem), _differ)  # which raises it, on every rank
        own, problem = made_or_problem(lambda: memory_of(model))
        self.flat = FlatModel(model, on_host=own is None or own.is_host)
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
        if comm.rank == comm.size - 1 and not problem:
            needed_bytes = bytes_at_root(layout, published, comm.size - 1, options.policy)
            own, problem = made_or_problem(lambda: placed(own, needed_bytes))
        if problem:
            meet(comm, Proposal("", problem), _differ)
        content = json.dumps([said, self.flat.signature().decode()])
        compile_at_root(comm, layout)
        meeting = meet(comm, Proposal(content), _differ)
        self._notice(model, meeting)
        self.participant = Participant(meeting, layout, published, options.policy, own)
        self._share_frozen()
        for optimizer in optimizers:
            # torch's mark of a step, which only the root makes, and not always by this method: without it a scheduler
            # that the script steps between two loops would complain
            vars(optimizer)["_opt_called"] = True

    def _notice(self, model: nn.Module, meeting: Meeting) -> None:
        """Say what is no error, and changes results where the script does not expect it."""
        digests = exchange(meeting.comm, str(digest(model)), "which values its model has")
        notices = []
        if meeting.is_root:
            notices.append(differing(digests, meeting.root))
        elif meeting.comm.rank == 0:
            notices.append(shared_elsewhere(list(zip(self.flat.names, self.flat.parameters, strict=True)), model))
        for text in filter(None, notices):
            print(text, file=sys.stderr, flush=True)

    def _share_frozen(self) -> None:
        """Give everyone the root's frozen parameters, once: they never travel again."""
        meeting = self.participant.meeting
        tensors = [tensor for _, tensor in self.flat.frozen]
        blocks = in_blocks(tensors, aligned_bytes(BLOCK_BYTES), takes=not meeting.is_root)
        broadcast(blocks, meeting.comm, meeting.root, "to share frozen parameters")

    def parameters(self, memory: Array) -> Views:
        """Return the parameters in a version's bytes."""
        return self.flat.views(self.participant.published.arrays(memory)[: self.segments])

    def averages(self, memory: Array) -> Views:
        """Return the parameters' averages in a version's bytes."""
        return self.flat.views(self.participant.published.arrays(memory)[self.segments :])

    def parameter_at(self, offset: int) -> str:
        """Return the name of the parameter at byte `offset` of a version, or a word for what else lies there."""
        for place in self.flat.places:
            segment = self.participant.published.segments[place.segment]
            element = (offset - segment.offset) // segment.dtype.itemsize
            # what is read is a word of 8 bytes: the element that differs may be any in it
            if place.offset - 8 < element < place.offset + place.count and segment.offset <= offset + 7:
                return place.name
        return "a buffer, or an average"


def _differ(root: str, here: str) -> str | None:
    (theirs, their_model), (ours, our_model) = json.loads(root), json.loads(here)
    for name, value in theirs.items():
        if ours[name] != value:
            return f"{name} is {ours[name]!r} here and {value!r} on the root: all ranks must agree"
    return difference(their_model.encode(), our_model.encode())
