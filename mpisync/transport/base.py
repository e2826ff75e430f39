"""The contract of a transport: what the root and a worker may ask of the link between them.

Transports differ in how headers, gradients, replies and parameters travel. Who may write what holds for all of them:

    worker → root   header            the worker's until `send`
                    gradient          the worker's, from `pull` until `send`; the root's until it has replied
    root → worker   reply             the root's; one per header, quoting its ordinal
                    parameters        the root's; a worker reads them after `newest()` says so
"""

from __future__ import annotations

import abc
from collections.abc import Collection
from dataclasses import dataclass

from mpisync.device.base import Array, Memory
from mpisync.transport.layout import Block, Layout
from mpisync.transport.wire import Header, Reply


@dataclass(frozen=True)
class End:
    """The end of the training: at which version, and why if it failed."""

    version: int
    failure: str = ""


@dataclass(frozen=True)
class Pause:
    """The end of one of the session's loops: how many have ended by now, and at which version the last of them did."""

    loops: int
    version: int


class GradientFetcher(abc.ABC):
    """The root's way to gradients that stay with their workers until they are asked for."""

    @abc.abstractmethod
    def want(self, worker: int) -> bool:
        """Ask for the announced gradient; return False while there is no memory for it."""

    @abc.abstractmethod
    def is_whole(self, worker: int) -> bool:
        """Say whether every byte of the announced gradient is in this process's reach."""

    @abc.abstractmethod
    def is_moving(self, worker: int, now_s: float) -> bool:
        """Say whether the asked-for gradient still makes progress; a stalled one is not waited for."""

    @abc.abstractmethod
    def progress(self) -> list[int]:
        """Receive the blocks that have come, and return the workers whose asked-for gradient has become whole."""

    @abc.abstractmethod
    def release(self, worker: int) -> None:
        """Forget the announced gradient: it was folded, or nobody wants it."""


class RootLink(abc.ABC):
    """The root's side of a transport: one object serves all workers that it reaches the same way.

    Attributes:
        name: What records call the transport.
        workers: Whom it reaches.
        is_contiguous: Whether a gradient lies in one run of memory; else block by block.
        fetcher: How to get gradients that stay with their workers until they are asked for; None where each is whole
            when its header arrives, and its memory is the worker's again with the reply.
    """

    name: str
    workers: tuple[int, ...]
    is_contiguous: bool
    fetcher: GradientFetcher | None = None

    @abc.abstractmethod
    def home(self) -> Array | None:
        """Return memory in which the root may keep the parameters, so that workers read them in place; None without."""

    @abc.abstractmethod
    def headers(self) -> list[Header]:
        """Take in the headers that have arrived, in no order that means anything, and move what is being sent.

        Raises:
            RuntimeError: A header does not fit this run.
        """

    @abc.abstractmethod
    def gradient(self, worker: int, block: Block) -> Array:
        """Return the elements of one block of a whole gradient."""

    @abc.abstractmethod
    def reply(self, worker: int, reply: Reply) -> None:
        """Answer a header."""

    def begin(self, version: int) -> None:  # noqa: B027 (nothing, by default)
        """Say that the parameters are about to be overwritten by those of `version`.

        Nothing to do where workers read copies that were sent to them.
        """

    @abc.abstractmethod
    def publish(self, version: int, parameters: Array) -> None:
        """Make `version` the newest; `parameters` do not change until the next `begin`."""

    def serve(self, worker: int) -> None:  # noqa: B027 (nothing, by default)
        """Let `worker` have the newest version, unless it has been sent to it already.

        Nothing to do where all can read what was published.
        """

    @abc.abstractmethod
    def pause(self, pause: Pause) -> None:
        """Say that a loop is over, at the newest version, which a worker that comes late is to find all the same."""

    def has_unsent(self, worker: int) -> bool:
        """Say whether the last version of a loop is still on its way to `worker`.

        Not where it takes nothing more than to read it.
        """
        return False

    def keep(self, living: Collection[int]) -> None:  # noqa: B027 (nothing, by default)
        """Keep the version of the last pause for those of `living` who have not taken it: the next is about to begin.

        Nothing to do where it was sent.
        """

    @abc.abstractmethod
    def end(self, end: End) -> None:
        """Say that the training is over."""

    def flush(self) -> None:  # noqa: B027 (nothing, by default)
        """Wake whoever waits for what was said since the last flush.

        Nothing to do where what is said wakes its receiver.
        """

    @abc.abstractmethod
    def wait(self, timeout_s: float, headers: int = 1) -> None:
        """Sleep until a header may have come, at most `timeout_s`.

        Args:
            timeout_s: The longest sleep.
            headers: How many gradients are worth waking for. What cannot wait for others, any other header
                or a gradient that is late or not finite, wakes all the same.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Give back all receives and memory, also those of workers that never said goodbye."""


class WorkerLink(abc.ABC):
    """A worker's side of a transport.

    Attributes:
        layout: Of the gradient.
        published: Of the parameters.
        gradient: uint8, this worker's to fill between a reply and the next `send`.
        parameters: uint8, the newest parameters.
        memory: In which both lie: this worker's own, or the host's.
        shares_parameters: Whether the root writes there while this worker computes.
    """

    layout: Layout
    published: Layout
    gradient: Array
    parameters: Array
    memory: Memory
    shares_parameters: bool

    @abc.abstractmethod
    def send(self, header: Header) -> None:
        """Post a header; the gradient, if it announces one, is the root's until the reply."""

    @abc.abstractmethod
    def reply(self, ordinal: int) -> Reply | None:
        """Return the answer to message `ordinal`, once it is there."""

    @abc.abstractmethod
    def newest(self) -> int:
        """Return the newest version that can be read whole now; -1 while it is being overwritten."""

    @abc.abstractmethod
    def is_behind(self, version: int) -> bool:
        """Say whether `version` is known to be superseded; costs one memory read where it can."""

    def has_unsent_version(self) -> bool:
        """Say whether there is a newer version that comes only to a worker that asks for it.

        Never where all can read what was published.
        """
        return False

    @abc.abstractmethod
    def read(self, target: Array) -> int:
        """Copy the newest parameters, `target.size` bytes, and return their version; -1 means: try again."""

    @abc.abstractmethod
    def end(self) -> End | None:
        """Return how the training ended, once it has."""

    @abc.abstractmethod
    def loops(self) -> int:
        """Return how many loops have ended; asked often, so it is to cost little."""

    @abc.abstractmethod
    def pause(self) -> Pause:
        """Return the newest end of a loop, where there is one."""

    @abc.abstractmethod
    def take_final(self, target: Array) -> int:
        """Copy the version of the newest pause, `target.size` bytes, and return its number; -1 means: try again.

        Where that is not kept, for a worker that is more than a loop late, it is the newest that can be had.
        """

    @abc.abstractmethod
    def wait(self, timeout_s: float) -> None:
        """Sleep until there may be news, and keep sends moving."""

    def protect(self) -> bool:
        """Make the parameters read-only for this process, and say whether that could be done.

        Not where they are copies of the worker's own.
        """
        return False

    @abc.abstractmethod
    def close(self) -> None:
        """Complete every send and give back the memory."""
