"""The messages between a worker and the root: two fixed structs and nothing else.

A worker sends a `Header` for every message it starts; the root answers every header with exactly one `Reply`, and sends
further replies to workers that it reaches by messages only (asking for blocks, sending parameters). Both are checked
before use; nothing is ever unpickled.
"""

from __future__ import annotations

import enum
import math
import struct
from typing import NamedTuple


class Tag(enum.IntEnum):
    """MPI tags on the private communicator."""

    HEADER = 1
    REPLY = 2
    GRADIENT_BLOCK = 3
    PARAMETER_BLOCK = 4


class Kind(enum.IntEnum):
    """The kinds of header."""

    READY = 6  # about to begin; the reply says at which version
    CLAIM = 7  # which batch is next? The reply says
    PASS = 8  # batches were drawn, and the loop went on without a gradient
    GRADIENT = 1  # a gradient is ready
    LEAVE = 2  # this worker contributes nothing more
    STOP = 3  # end the training everywhere
    FAIL = 4  # an exception ended this worker's loop; the text names it
    BYE = 5  # the last message of a worker: it has the final parameters


class ReplyKind(enum.IntEnum):
    """The kinds of reply."""

    VERDICT = 1
    WANT = 2  # send blocks first .. first+blocks-1 of the announced gradient
    BLOCK = 3  # a parameter block follows
    PUBLISHED = 4  # every block of version `newest` has been sent
    BEHIND = 5  # there is a newer version than the one this worker computes on
    END = 6  # the training has ended (text empty) or failed (text says why)
    PAUSE = 7  # loop number `first` of the session is over, at version `newest`, which has been sent


class Status(enum.IntEnum):
    """The verdict on a message."""

    ACCEPTED = 1
    LATE = 2
    REJECTED = 3
    NOTED = 4  # heard, where there is nothing to judge


TEXT_BYTES = 1000  # enough for an error's whole sentence, so that every rank reads what to do
_HEADER = struct.Struct(f"<QB3xiqqqqdqdddQdiididqqq{TEXT_BYTES}s")
_REPLY = struct.Struct(f"<QBBHiqqqqqdiiqqq{TEXT_BYTES}s")
HEADER_BYTES = _HEADER.size
REPLY_BYTES = _REPLY.size


class GradientInfo(NamedTuple):
    """A worker's description of a gradient, or of batches that left none."""

    samples: int = 0  # that it is the mean of
    loss: float = math.nan  # theirs
    compute_s: float = 0.0
    data_s: float = 0.0  # that this worker waited for them
    fingerprint: int = 0  # what two workers share only if they computed the same gradient
    peak: float = 0.0  # the largest magnitude in it; inf where it has NaN or Inf
    batches: int = 0  # that it was computed from, or that were passed over
    carries: int = 0  # whether this worker's late gradients are added in
    cost: float = math.nan  # what the loop says a batch of it costs
    initial: int = 0  # whether it is no gradient but the parameters that this worker's first forward pass initialised
    metric: float = math.nan  # of an evaluation since the message before
    metric_version: int = -1  # that was evaluated; -1: none was


_NO_GRADIENT = GradientInfo()
_INFO_AT = 8  # its place among the fields of a header
_INFO_END = _INFO_AT + len(GradientInfo._fields)


class Header(NamedTuple):
    """A worker's message; `incarnation` keeps messages of another run from ever fitting this one."""

    incarnation: int
    kind: int
    worker: int
    ordinal: int  # numbers this worker's messages from 1; replies quote it
    sequence: int  # numbers its computations from 0
    version: int  # of the parameters it computed on
    handed: int  # samples handed to its loop so far
    stamp_s: float  # CLOCK_MONOTONIC when the gradient was complete
    info: GradientInfo = _NO_GRADIENT
    peak_rss_bytes: int = 0
    loop: int = 0  # of the session, from 0
    text: str = ""

    def pack_into(self, buffer: bytearray | memoryview) -> None:
        """Write the struct at the start of `buffer`."""
        _HEADER.pack_into(buffer, 0, *self[:_INFO_AT], *self.info, self.peak_rss_bytes, self.loop, clip_text(self.text))

    @classmethod
    def unpack(cls, buffer: bytearray | memoryview) -> Header:
        """Read the struct at the start of `buffer`."""
        fields = _HEADER.unpack_from(buffer, 0)
        info = GradientInfo._make(fields[_INFO_AT:_INFO_END])
        return cls._make((*fields[:_INFO_AT], info, *fields[_INFO_END:-1], _text(fields[-1])))


class Reply(NamedTuple):
    """The root's answer to message `ordinal`, or one of the root's own messages."""

    incarnation: int
    kind: int
    status: int = 0
    worker: int = -1
    ordinal: int = 0
    step: int = -1  # the step that judged the gradient
    newest: int = -1  # newest version of the parameters
    late_by: int = 0
    resume: int = -1  # version at which the next computation must begin
    waited_s: float = 0.0  # from arrival to verdict
    first: int = 0
    blocks: int = 0
    epoch: int = -1  # of the batch that was claimed
    batch: int = -1  # its number in the epoch's order; -1: there is none left
    last: int = -1  # version at which the loop ends; -1 where nobody knows yet
    again: int = 0  # whether the batches of the gradient are to be computed on again
    text: str = ""

    def pack_into(self, buffer: bytearray | memoryview, offset: int = 0) -> None:
        """Write the struct at `offset` of `buffer`."""
        _REPLY.pack_into(
            buffer, offset, self.incarnation, self.kind, self.status, self.again, self.worker, self.ordinal,
            self.step, self.newest, self.late_by, self.resume, self.waited_s, self.first,
            self.blocks, self.epoch, self.batch, self.last, clip_text(self.text),
        )  # fmt: skip

    @classmethod
    def unpack(cls, buffer: bytearray | memoryview, offset: int = 0) -> Reply:
        """Read the struct at `offset` of `buffer`."""
        incarnation, kind, status, again, *rest, text = _REPLY.unpack_from(buffer, offset)
        return cls._make((incarnation, kind, status, *rest, again, _text(text)))


def clip_text(text: str) -> bytes:
    """Encode `text` in at most `TEXT_BYTES` without cutting a character in two."""
    if not text:  # as nearly always
        return b""
    return text.encode()[:TEXT_BYTES].decode(errors="ignore").encode()


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace") if raw[0] else ""
