"""The parameters of a worker's model: what they show at each moment, and what the loop must not write to them.

They are bound to the memory of the newest version, except for two times. The first gradient is computed on copies, so
that a first forward pass that initialises parameters is seen whole, and reaches everyone or no one. Whoever looks (see
`Looks`) gets copies until the next version, all of one version whatever the root writes meanwhile.
"""

from __future__ import annotations

import warnings

import numpy as np
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mpisync.aggregation.worker import Worker
from mpisync.kernels.atomics import fence
from mpisync.model.binding import Binding
from mpisync.model.guards import REMEDY, FrozenWatch, WriteWatch
from mpisync.model.tensor_layout import Views
from mpisync.model.write_sample import MemorySample
from mpisync.session.distributed_model import DistributedModel

_IN_LOOP = (
    "on a worker (by p.data, .numpy() or the like, which torch does not count; MPISYNC_READ_ONLY=1 shows the line, "
    "where memory is shared)"
)
_SMALL_BYTES = 1 << 20
_Room = tuple[np.ndarray, Views, list[Tensor]]  # memory, and in it the parameters and the buffers
BETWEEN_LOOPS = "between two loops of the session, where it does not last"


class WorkerParameters:
    """The parameters of a worker's model.

    Args:
        model: Compiled or not.
        distributed: Its layouts.
        worker: This one's side of the protocol.
        own_copy: Whether the loop may write to its copy of the parameters.
        in_place: Whether parameters may be views of the memory that the root writes or sends to.
        read_only: Whether that memory is to be made read-only, so that from the first gradient on nothing is copied.

    Attributes:
        memory: Where versions appear.
    """

    def __init__(
        self,
        model: nn.Module,
        distributed: DistributedModel,
        worker: Worker,
        *,
        own_copy: bool,
        in_place: bool,
        read_only: bool,
    ) -> None:
        self._distributed, self._worker, self._link = distributed, worker, worker.link
        participant, flat = distributed.participant, distributed.flat
        self._reads, self._own_copy = not in_place, own_copy
        published = participant.published
        self.memory = worker.link.parameters if in_place else participant.memory.allocate(published.size_bytes)
        self._is_overwritten = in_place and self._link.shares_parameters  # while this worker computes
        self._flat, self._views = flat, distributed.parameters(self.memory)
        self._buffers = flat.buffers.views(published.extras(self.memory))
        self._binding = Binding(model, flat, self._views, self._copies)
        self._is_first = not read_only
        self._at_gradient: list[str] | None = None  # what had been written when the first gradient came
        self._handles: list[RemovableHandle] = []
        self._writes = WriteWatch(zip(flat.names, flat.parameters, strict=True), REMEDY)
        self._frozen = FrozenWatch(flat.frozen)
        self._version = -1  # the one shown last
        self._is_paused = False  # since a loop ended: the parameters are the script's until the next begins
        self._room: _Room | None = None
        self._sample = None if self._is_overwritten or own_copy else MemorySample(self.memory)

    def begin(self) -> None:
        """Raise RuntimeError if parameters were written to before the loop, whose first version replaces them."""
        self._frozen.check()
        if self._version < 0:
            self._writes.check()
            self._binding.check_memory()
        elif not self._own_copy:
            self._binding.check_memory()
            self._refuse(self._written() or [], BETWEEN_LOOPS)
            self._writes.reset()  # what was written may have been put back

    def take(self, *, ended: bool = False) -> bool:
        """Show the newest version, and return whether it was whole.

        Args:
            ended: Whether it is the last of all.
        """
        self._is_paused = False
        if self._reads:
            self._worker.read(self.memory)
        # a late step leaves no trace: these are the published ones, whatever ours have become
        self._flat.buffers.load(self._buffers)
        if self._is_first and not ended:
            self._binding.load()
            self._arm()
        else:
            self._binding.bind()
        if self._sample is not None:
            self._sample.take()
        if self._worker.version != self._version:
            self._version = self._worker.version
            self._writes.published()
        if self._is_overwritten and not ended:
            fence()
            return not self._link.is_behind(self._worker.version)
        return True

    def check(self) -> list[str]:
        """Refuse what the loop has written since the last version, and return what its first pass has initialised.

        Raises:
            RuntimeError: A parameter was written to, or replaced.
        """
        self._frozen.check()
        if self._is_first:
            return self._check_first()
        if not self._own_copy:
            self._writes.check()
            self._binding.check_memory()
            if self._binding.is_detached:
                self._refuse(self._written() or [])
            elif self._sample is not None and (at := self._sample.written()) is not None:
                self._refuse([self._distributed.parameter_at(at)])
        return []

    def _check_first(self) -> list[str]:
        """Tell what the first forward pass wrote, which initialises, from what was written after it."""
        written = self._written()
        if written is None:  # this gradient is late, so the next one is the first
            self._arm()
            return []
        initialised = written if self._at_gradient is None else self._at_gradient
        self._disarm()
        self._is_first = False
        self._writes.reset()
        if not self._own_copy:
            self._refuse([name for name in written if name not in initialised])
            return initialised
        if initialised:
            warnings.warn(
                f"parameter {initialised[0]!r} was written to before the first gradient, and own_copy=True lets that "
                "last until the next version only: if the first forward pass initialises, run it before Session, on "
                "every rank",
                stacklevel=4,
            )
        return []

    def _written(self) -> list[str] | None:
        """Return the detached parameters that differ from their version; None where that is overwritten."""
        written = self._binding.written()
        fence()
        return None if self._is_overwritten and self._link.is_behind(self._worker.version) else written

    def _arm(self) -> None:
        """Have the parameters compared when the first gradient arrives: what was written by then initialises."""
        self._disarm()
        self._at_gradient = None
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._meet_gradient)  # type: ignore[no-untyped-call]
            for parameter in self._flat.parameters
        ]

    def _disarm(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _meet_gradient(self, _: Tensor) -> None:
        if self._handles:
            self._disarm()
            self._at_gradient = self._binding.written()

    def _refuse(self, names: list[str], where: str = _IN_LOOP) -> None:
        if names:
            raise RuntimeError(f"parameter {names[0]!r} was written to {where}: {REMEDY}")

    def _copies(self) -> list[Tensor]:
        """Return copies of the parameters, all of the version computed on; of the newest where that is overwritten."""
        copies = [view.clone() for view in self._views.tensors]
        fence()
        if self._is_overwritten and self._link.is_behind(self._worker.version):  # so this gradient is late anyway
            memory = self._distributed.participant.memory.allocate(self.memory.size)
            self._worker.copy_newest(memory)
            copies = [view.clone() for view in self._distributed.parameters(memory).tensors]
            self._flat.buffers.load(self._flat.buffers.views(self._distributed.participant.published.extras(memory)))
        return copies

    def pause(self) -> None:
        """Make the parameters and buffers private, at the version at which the loop has ended."""
        self._disarm()
        memory, views, buffers = self._room_for_last()
        self._worker.end_loop(memory)
        self._binding.show([view.clone() for view in views.tensors])
        self._flat.buffers.load(buffers)
        self._writes.reset()
        self._version, self._is_paused = self._worker.version, True

    def _room_for_last(self) -> _Room:
        """Return where a loop's last version goes: our own memory, or room that is kept where the model is small."""
        if self._reads:
            return self.memory, self._views, self._buffers
        if self._room is not None:
            return self._room
        published = self._distributed.participant.published
        memory = self._distributed.participant.memory.allocate(published.size_bytes)
        room = memory, self._distributed.parameters(memory), self._flat.buffers.views(published.extras(memory))
        if memory.size <= _SMALL_BYTES:  # else views cost nothing beside a copy, and room is dear
            self._room = room
        return room

    def end(self, *, final: bool) -> None:
        """Make the parameters private, with the final version if it is there.

        Args:
            final: Whether the training has ended well; else they keep what they show.
        """
        self._disarm()
        if final and not (self._is_paused and self._worker.version == self._version):
            self.take(ended=True)
        self._binding.end()
