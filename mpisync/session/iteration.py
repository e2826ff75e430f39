"""The iterator that a session's loop goes through, and the refusals of loops that do not draw step by step.

A gradient belongs to the batches that were drawn since the step before it, and a batch without a gradient was passed
over. A loop that draws the next batch before the step of this one would have every gradient taken for another batch's.
"""

from __future__ import annotations

import signal
import sys
import threading
import weakref
from collections.abc import Generator, Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

from mpi4py import MPI
from torch import nn

_MANY_BATCHES = 100  # drawn ahead: a list() of an endless iterator
_KEPT_BATCHES = 8  # of those before the first step; whoever draws ahead does so at once
_STEP_BY_STEP = (
    "take each batch when its turn comes. To fetch ahead, give the DataLoader num_workers= and prefetch_factor=; an "
    "example batch is next(iter(loader)); what needs several batches at once has the data set or collate_fn join them; "
    "a wrapper goes around the loader, session.batches(wrapper(loader)), and is taken as it is: it gives each worker "
    "(session.worker of session.workers) data of its own"
)
_DRAWN_AHEAD = (
    "a batch was drawn from session.batches before the step of the one before it, as wrappers do that look ahead or "
    "prefetch (itertools.pairwise, list(), an extra next()), and gradients would be taken for other batches': "
    f"{_STEP_BY_STEP}"
)
_OTHER_THREAD = (
    "a batch was drawn from session.batches in another thread than the one that called it, as prefetching wrappers do, "
    f"and a session is of one thread: {_STEP_BY_STEP}"
)
_TWO_LOOPS = (
    "the loop of another session of the same root is not at its end, and the root serves one loop after the other, so "
    "these two would wait for each other for ever: go through session.batches of one, then of the other; or train both "
    "models in one session, as the parts of one nn.ModuleDict with a list of optimizers"
)
_NESTED = (
    "session.batches was called inside the loop of another call, and a session has one loop at a time: let it come to "
    "its end, or leave it by `break` (and call close() of its iterator, where that is kept in a variable)"
)
_NEVER_BEGUN = (
    "session.batches was called and never gone through, so nothing was trained: write `for batch in "
    "session.batches(loader, ...)`"
)
_LEFT_BY_NEXT = (
    "mpisync: on rank {rank} next() found no further batch of session.batches (at the root there is none at all, when "
    "the training has ended), which ended the `with`; the script goes on behind it. Write `for batch in "
    "session.batches(...)`, or give next() a default"
)


class LoopEnded(StopIteration):
    """The end of a session's loop, told apart from that of any other iterator."""


class _Passed(NamedTuple):
    """A batch that was followed by another before there was a gradient."""

    batch: Any
    holders: set[int]  # frames that had it then, by id


class DrawWatch:
    """A watch for loops that draw batches ahead, until the first step.

    A loop that passes a batch over had it, and has it no longer when it steps; a look-ahead, or whatever stands between
    the loop and `session.batches`, draws the second batch before the loop has the first, or the loop still has it.

    Args:
        comm: The session's communicator.
        model: Whose gradients.

    Attributes:
        is_watching: Whether there was no step yet; without it nothing needs to be noted.
        has_begun: Whether a batch was asked for.
        has_ended: Whether no further one will come.
    """

    def __init__(self, comm: MPI.Intracomm, model: nn.Module) -> None:
        self._parameters = list(model.parameters())
        self._newest: Any = None
        self._drawn = 0
        self._passed: list[_Passed] = []
        self.is_watching = True
        self.has_begun = self.has_ended = False
        self.misuse = ""  # by another thread
        root = comm.group.Translate_ranks([comm.size - 1], MPI.COMM_WORLD.group)[0]
        self.root = root if comm.size > 1 else None
        self.thread = threading.get_ident()

    def before(self, frame: FrameType) -> None:
        """Take note that `frame` draws the next batch; raise RuntimeError where the loop never gets any."""
        self.has_begun = True
        if not self._drawn or any(p.grad is not None for p in self._parameters):
            return
        if len(self._passed) < _KEPT_BATCHES:
            own = _objects(self._newest)
            self._passed.append(_Passed(self._newest, {id(each) for each in _stack(frame) if _has(each, own)}))
        if self._drawn == _MANY_BATCHES and any(_objects(batch) and not holders for batch, holders in self._passed):
            raise RuntimeError(_DRAWN_AHEAD)

    def after(self, batch: Any) -> None:
        """Take note of the batch that was drawn."""
        self._newest = batch
        self._drawn += 1

    def step(self, frame: FrameType) -> None:
        """Raise RuntimeError if a batch was drawn ahead of the first step, which `frame` makes."""
        stack = list(_stack(frame))
        now = set(map(id, stack))
        for batch, holders in self._passed:
            own = _objects(batch)
            if own and batch is not self._newest:  # numbers tell nothing, nor does the same batch again
                if not holders & now or any(_is_in(value, own) for each in stack for value in each.f_locals.values()):
                    raise RuntimeError(_DRAWN_AHEAD)
        self.is_watching, self._newest, self._passed = False, None, []

    def end(self) -> None:
        """Take note that the loop is at its end, or its session is."""
        self.has_ended = True
        _open.discard(self)

    def problem(self, error: BaseException | None) -> RuntimeError | None:
        """Return what is to be raised at the end of a `with` that `error` has left."""
        if self.misuse and isinstance(error, KeyboardInterrupt):
            return RuntimeError(self.misuse)
        return RuntimeError(_NEVER_BEGUN) if error is None and not self.has_begun else None


class SessionLoop(Iterator[Any]):
    """An iterator over the batches of a rank.

    Args:
        drawn: The batches.
        watch: The session's.
    """

    def __init__(self, drawn: Generator[Any, None, None], watch: DrawWatch) -> None:
        self._drawn, self._watch = drawn, watch
        self._thread = threading.get_ident()

    def __next__(self) -> Any:
        if threading.get_ident() != self._thread:
            self._refuse_thread()
        watch = self._watch
        if watch.is_watching:
            if not watch.has_begun:
                self._begin()
            watch.before(sys._getframe(1))
        try:
            batch = next(self._drawn)
        except StopIteration:
            watch.end()
            raise LoopEnded from None
        if watch.is_watching:
            watch.after(batch)
        return batch

    def _begin(self) -> None:
        for other in list(_open):
            if other.thread == self._thread and other.root == self._watch.root is not None:
                raise RuntimeError(_TWO_LOOPS)
        _open.add(self._watch)

    def _refuse_thread(self) -> None:
        """Raise RuntimeError, also in the thread of the loop, which may wait for this one for ever."""
        self._watch.misuse = _OTHER_THREAD
        if self._thread == threading.main_thread().ident:
            signal.pthread_kill(self._thread, signal.SIGINT)
        raise RuntimeError(_OTHER_THREAD)

    def refuse_another(self) -> None:
        """Raise RuntimeError if this loop is not at its end, since another is asked for."""
        if self._watch.has_begun and not self._watch.has_ended:
            raise RuntimeError(_NESTED)

    def close(self) -> None:
        """Leave the loop."""
        self._watch.end()
        self._drawn.close()


_open: weakref.WeakSet[DrawWatch] = weakref.WeakSet()  # of loops that have begun and are not at their end


def left_by_next(error: BaseException | None, comm: MPI.Intracomm) -> bool:
    """Say whether a `with` was left by the loop's own end, which is no failure; tell so."""
    cause = error.__cause__ if isinstance(error, RuntimeError) else error  # a generator makes a RuntimeError of it
    if not isinstance(cause, LoopEnded):
        return False
    print(_LEFT_BY_NEXT.format(rank=comm.rank), file=sys.stderr, flush=True)
    return True


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _objects(batch: Any) -> list[Any]:
    """Return the batch and its parts, as far as an object tells which batch it is: numbers and words do not."""
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return [each for each in (batch, *parts) if not isinstance(each, int | float | complex | str | bytes | None)]


def _is_in(value: Any, own: list[Any]) -> bool:
    return any(value is each for each in own)


def _has(frame: FrameType, own: list[Any]) -> bool:
    """Say whether a frame has the batch, a part of it, or a part inside of something as small."""
    for value in frame.f_locals.values():
        if _is_in(value, own):
            return True
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
        if len(inner) <= 2 * len(own) and any(_is_in(each, own[1:]) for each in inner):
            return True
    return False
