"""Atomic loads, stores and additions on words that threads or processes share.

For arrays of int64 or uint32, from Python and from compiled code alike. A plain store may become
visible before the stores that precede it (on ARM; on x86 after streaming stores), so whoever
publishes data does so in pairs, and names the pair in a comment at both ends:

    writer: writes the data,  store_release(words, i, n)     # pairs with <reader's name>
    reader: load_acquire(words, i) >= n,  reads the data     # pairs with <writer's name>

What the writer wrote before the release, the reader sees after an acquire that saw it. An index is
not checked against the array's length.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numpy.typing import NDArray

from mpisync.kernels.jit import compiled, intrinsic

Words = NDArray[np.int64] | NDArray[np.uint32]


def _word(context: Any, builder: ir.IRBuilder, array: Any, args: Any) -> ir.Value:
    """Return a pointer to words[i], from the lowered (words, i, ...)."""
    words = context.make_array(array)(context, builder, args[0])
    offset = builder.mul(args[1], builder.extract_value(words.strides, 0))  # words may be a column of a table
    start = builder.ptrtoint(words.data, offset.type)
    return builder.inttoptr(builder.add(start, offset), words.data.type)


def _check(words: Any, *, writes: bool) -> None:
    if not isinstance(words, types.Array) or words.dtype not in (types.int64, types.uint32):
        raise TypeError(f"words must be an int64 or uint32 array, not {words}")
    if words.ndim != 1 or not words.aligned:
        raise TypeError(f"words must be aligned and of one dimension, not {words}")
    if writes and not words.mutable:
        raise TypeError(f"words must be writeable, not {words}")


@intrinsic
def _load(typing_context: Any, words: Any, i: Any) -> Any:
    _check(words, writes=False)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pointer = _word(context, builder, words, args)
        return builder.load_atomic(pointer, "acquire", words.dtype.bitwidth // 8)

    return words.dtype(words, types.intp), generate


@intrinsic
def _store(typing_context: Any, words: Any, i: Any, value: Any) -> Any:
    _check(words, writes=True)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pointer = _word(context, builder, words, args)
        builder.store_atomic(args[2], pointer, "release", words.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(words, types.intp, words.dtype), generate


@intrinsic
def _add(typing_context: Any, words: Any, i: Any, value: Any) -> Any:
    _check(words, writes=True)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.atomic_rmw("add", _word(context, builder, words, args), args[2], "acq_rel")

    return words.dtype(words, types.intp, words.dtype), generate


@intrinsic
def _max(typing_context: Any, words: Any, i: Any, value: Any) -> Any:
    _check(words, writes=True)

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.atomic_rmw("max", _word(context, builder, words, args), args[2], "acq_rel")

    return words.dtype(words, types.intp, words.dtype), generate


@intrinsic
def _fence(typing_context: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@compiled
def load_acquire(words: Words, i: int) -> int:
    """Return words[i]; what its writer wrote before a release of that value is visible after."""
    value: int = _load(words, i)
    return value


@compiled
def store_release(words: Words, i: int, value: int) -> None:
    """Set words[i]; whoever reads that value by `load_acquire` sees all that was written before."""
    _store(words, i, value)


@compiled
def fetch_add(words: Words, i: int, value: int) -> int:
    """Add to words[i] and return what it was; no addition is lost. A release and an acquire."""
    old: int = _add(words, i, value)
    return old


@compiled
def fetch_max(words: Words, i: int, value: int) -> int:
    """Raise words[i] of int64 to a larger value and return what it was. A release and an acquire."""
    old: int = _max(words, i, value)
    return old


@compiled
def fence() -> None:
    """Order everything before this, streaming stores too, before everything after it.

    Only a full fence orders a store before a later load of another word, as two sides need that
    each say "I am about to sleep" and then look whether the other has already rung.
    """
    _fence()
