"""The compiled entry points: each claims chunks of the arrays until none is left.

Several threads call one with the same arguments. They share `state`: NEXT is the next chunk to
claim, DONE how many are finished, PEAK the largest magnitude met, as `vectors.larger_magnitude` has
it. So a thread that gets no core delays nobody by more than the chunk it holds, and one that comes when all are claimed
touches nothing but `state`.

Arrays that are computed with come as the address of their first element: to unbox an array costs
a small call as much as the arithmetic does.
"""

import numpy as np
from numpy.typing import NDArray

from mpisync.kernels import vectors as v
from mpisync.kernels.atomics import fence, fetch_add, fetch_max
from mpisync.kernels.jit import compiled, inlined
from mpisync.kernels.links import (
    Addresses,
    Weights,
    descend_block,
    fold_block,
    sum_squares,
    whole_vectors,
)
from mpisync.kernels.vectors import Intrinsic, highest, larger_magnitude, no_magnitude

NEXT, DONE, PEAK = 0, 1, 2  # in `state`
BLOCK = 4096  # elements in a partial sum of squares; it also bounds what a norm leaves in the cache

State = NDArray[np.int64]
Partials = NDArray[np.float64]


@compiled
def address(array: NDArray[np.float64] | NDArray[np.float32] | NDArray[np.uint16]) -> int:
    """Return where an array begins, seven times as fast as `array.ctypes.data`."""
    return array.ctypes.data


@compiled
def add_partials(partials: Partials, row: int) -> float:
    """Return the sum of a row, from its first element to its last."""
    total = 0.0
    for i in range(partials.shape[1]):
        total += partials[row, i]
    return total


@inlined
def _finish(state: State, peak: int, streaming: bool) -> None:
    if streaming:
        fence()  # streams are not ordered by the release below
    fetch_max(state, PEAK, peak)
    fetch_add(state, DONE, 1)  # a release; pairs with the acquire in threads.ThreadPool.run


@inlined
def _fold(
    load: Intrinsic,
    load_one: Intrinsic,
    keep: Intrinsic,
    keep_one: Intrinsic,
    lanes: int,
    state: State,
    size: int,
    chunk: int,
    target: int,
    base: int,
    step: int,
    streaming: bool,
    g: Addresses,
    w: Weights,
    divisor: float,
    partials: Partials,
) -> None:
    """Fold chunk after chunk; squares of gradient j into row j of `partials`, the result's last."""
    count = len(g)
    rows = partials.shape[0]
    while True:
        first = fetch_add(state, NEXT, 1) * chunk
        if first >= size:
            return
        peak = 0
        for begin in range(first, min(first + chunk, size), BLOCK):
            end = min(begin + BLOCK, size)
            high = fold_block(
                load, load_one, keep, keep_one, lanes, target, base, step, streaming, g, w, divisor,
                begin, end,
            )  # fmt: skip
            peak = max(peak, high)
            if rows > 0:
                for j in range(count):
                    partials[j, begin // BLOCK] = sum_squares(load, load_one, lanes, g[j], begin, end)
                partials[count, begin // BLOCK] = sum_squares(keep, keep_one, lanes, target, begin, end)
        _finish(state, peak, streaming)


@compiled
def fold_float64(
    state: State,
    size: int,
    chunk: int,
    target: int,
    base: int,
    step: int,
    streaming: bool,
    g: Addresses,
    w: Weights,
    divisor: float,
    partials: Partials,
) -> None:
    """Fold gradients of float64."""
    _fold(
        v.fetch_float64, v.load_one_float64, v.load_float64, v.load_one_float64, 8,
        state, size, chunk, target, base, step, streaming, g, w, divisor, partials,
    )  # fmt: skip


@compiled
def fold_float32(
    state: State,
    size: int,
    chunk: int,
    target: int,
    base: int,
    step: int,
    streaming: bool,
    g: Addresses,
    w: Weights,
    divisor: float,
    partials: Partials,
) -> None:
    """Fold gradients of float32."""
    _fold(
        v.fetch_float32, v.load_one_float32, v.load_float32, v.load_one_float32, 16,
        state, size, chunk, target, base, step, streaming, g, w, divisor, partials,
    )  # fmt: skip


@compiled
def fold_float16(
    state: State,
    size: int,
    chunk: int,
    target: int,
    base: int,
    step: int,
    streaming: bool,
    g: Addresses,
    w: Weights,
    divisor: float,
    partials: Partials,
) -> None:
    """Fold gradients of float16."""
    _fold(
        v.fetch_float16, v.load_one_float16, v.load_float32, v.load_one_float32, 16,
        state, size, chunk, target, base, step, streaming, g, w, divisor, partials,
    )  # fmt: skip


@compiled
def fold_bfloat16(
    state: State,
    size: int,
    chunk: int,
    target: int,
    base: int,
    step: int,
    streaming: bool,
    g: Addresses,
    w: Weights,
    divisor: float,
    partials: Partials,
) -> None:
    """Fold gradients of bfloat16."""
    _fold(
        v.fetch_bfloat16, v.load_one_bfloat16, v.load_float32, v.load_one_float32, 16,
        state, size, chunk, target, base, step, streaming, g, w, divisor, partials,
    )  # fmt: skip


@inlined
def _descend(
    load: Intrinsic,
    load_one: Intrinsic,
    lanes: int,
    state: State,
    size: int,
    chunk: int,
    target: int,
    base: int,
    step: int,
    g: Addresses,
    w: Weights,
    divisor: float,
    rate: float,
) -> None:
    """Fold chunk after chunk, and subtract `rate` times each result from `target` at once."""
    while True:
        begin = fetch_add(state, NEXT, 1) * chunk
        if begin >= size:
            return
        end = min(begin + chunk, size)
        peak = descend_block(load, load_one, lanes, target, base, step, g, w, divisor, rate, begin, end)
        _finish(state, peak, False)


@compiled
def descend_float64(
    state: State,
    size: int,
    chunk: int,
    target: int,
    base: int,
    step: int,
    g: Addresses,
    w: Weights,
    divisor: float,
    rate: float,
) -> None:
    """Fold gradients of float64 and descend."""
    _descend(
        v.fetch_float64, v.load_one_float64, 8, state, size, chunk, target, base, step, g, w, divisor, rate
    )


@compiled
def descend_float32(
    state: State,
    size: int,
    chunk: int,
    target: int,
    base: int,
    step: int,
    g: Addresses,
    w: Weights,
    divisor: float,
    rate: float,
) -> None:
    """Fold gradients of float32 and descend."""
    _descend(
        v.fetch_float32, v.load_one_float32, 16, state, size, chunk, target, base, step, g, w, divisor, rate
    )


@inlined
def _copy_strip(load: Intrinsic, put: Intrinsic, lanes: int, source: int, target: int, begin: int, end: int) -> int:
    if begin >= end:
        return 0
    peak = no_magnitude(load(source, begin))
    for i in range(begin, end, lanes):
        x = load(source, i)
        peak = larger_magnitude(peak, x)
        put(target, i, x)
    result: int = highest(peak)
    return result


@inlined
def _copy(
    load: Intrinsic,
    load_one: Intrinsic,
    lanes: int,
    state: State,
    size: int,
    chunk: int,
    source: int,
    target: int,
    streaming: bool,
) -> None:
    """Copy chunk after chunk, and find the largest magnitude; target 0 is for only that."""
    while True:
        begin = fetch_add(state, NEXT, 1) * chunk
        if begin >= size:
            return
        end = min(begin + chunk, size)
        low, high = whole_vectors(lanes, target, streaming, begin, end)
        peak = 0
        if target == 0:
            peak = _copy_strip(load, v.drop, lanes, source, target, low, high)
            peak = max(peak, _copy_strip(load_one, v.drop, 1, source, target, high, end))
        else:
            for edge_begin, edge_end in ((begin, low), (high, end)):
                edge = _copy_strip(load_one, v.store, 1, source, target, edge_begin, edge_end)
                peak = max(peak, edge)
            if streaming:
                strip = _copy_strip(load, v.stream, lanes, source, target, low, high)
            else:
                strip = _copy_strip(load, v.store, lanes, source, target, low, high)
            peak = max(peak, strip)
        _finish(state, peak, streaming)


@compiled
def copy_64(state: State, size: int, chunk: int, source: int, target: int, streaming: bool) -> None:
    """Copy elements of 64 bits, and find the largest magnitude."""
    _copy(
        v.load_float64,
        v.load_one_float64,
        8,
        state,
        size,
        chunk,
        source,
        target,
        streaming,
    )


@compiled
def copy_32(state: State, size: int, chunk: int, source: int, target: int, streaming: bool) -> None:
    """Copy elements of 32 bits, and find the largest magnitude."""
    _copy(
        v.load_float32,
        v.load_one_float32,
        16,
        state,
        size,
        chunk,
        source,
        target,
        streaming,
    )


@compiled
def copy_16(state: State, size: int, chunk: int, source: int, target: int, streaming: bool) -> None:
    """Copy elements of 16 bits, and find the largest magnitude."""
    _copy(
        v.load_bits16,
        v.load_one_bits16,
        32,
        state,
        size,
        chunk,
        source,
        target,
        streaming,
    )


@compiled
def copy_8(state: State, size: int, chunk: int, source: int, target: int, streaming: bool) -> None:
    """Copy bytes, and find the largest magnitude."""
    _copy(v.load_bytes, v.load_one_byte, 64, state, size, chunk, source, target, streaming)
