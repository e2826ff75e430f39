"""The strict left fold of a block of elements: links of fixed arity, chained through the cache.

A link of arity k reads k gradients and computes, element by element and in this order,

    target = ((base + w[0]*g[0]) + w[1]*g[1] + ... + w[k-1]*g[k-1]) / divisor

in registers. More gradients than a link takes go through several, and what lies between two links
stays in the first-level cache: a strip is small, so memory sees every gradient once and the target
once. Measured, two links of four over strips of 1024 are as fast as one link of eight.

Where there is nothing to add to yet, base is one vector of -0.0 read again and again (step 0), for
-0.0 + x is x for every x, -0.0 too. No weights are weights of 1.0, which leave every bit as it is.

What the functions share: `load` reads whole vectors of a gradient and `load_one` single elements,
`keep` and `keep_one` read the accumulator or what lies between two links, `put` stores (`vectors`).
Addresses are those of element 0, `g` and `w` are arrays of the gradients' addresses and of their
weights, `lanes` elements make a vector. A link returns the largest magnitude among its results, as
an integer (`vectors.larger_magnitude`): once it is that of inf or NaN, no later link makes it
finite again.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numpy.typing import NDArray

from mpisync.kernels import vectors
from mpisync.kernels.jit import inlined, intrinsic
from mpisync.kernels.vectors import (
    Intrinsic,
    add,
    add_lanes,
    add_scaled,
    divide,
    highest,
    larger_magnitude,
    no_magnitude,
    squares,
    store,
    stream,
    subtract_product,
)

STRIP = 1024
ARITY = 4  # of the longest link

Addresses = NDArray[np.int64]
Weights = NDArray[np.float64]


@intrinsic
def _scratch(typing_context: Any) -> Any:
    """Return the address of a strip of the widest accumulator, on the stack."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        with builder.goto_entry_block():
            strip = builder.alloca(ir.ArrayType(ir.DoubleType(), STRIP))
            strip.align = vectors.VECTOR_BYTES
        return builder.ptrtoint(strip, vectors.I64)

    return types.int64(), generate


@inlined
def link(
    load: Intrinsic,
    keep: Intrinsic,
    put: Intrinsic,
    lanes: int,
    target: int,
    base: int,
    step: int,
    gradients: tuple[int, ...],
    weights: tuple[float, ...],
    divisor: float,
    begin: int,
    end: int,
) -> int:
    """Do one pass over elements `begin` to `end`; the arity is the tuples' length."""
    if begin >= end:
        return 0
    peak = no_magnitude(keep(base, begin * step))
    for i in range(begin, end, lanes):
        x = keep(base, i * step)
        for j in range(len(gradients)):  # of constant length: LLVM unrolls it
            x = add_scaled(x, weights[j], load(gradients[j], i))
        if divisor != 1:
            x = divide(x, divisor)
        peak = larger_magnitude(peak, x)
        put(target, i, x)
    result: int = highest(peak)
    return result


@inlined
def _last_link(
    load: Intrinsic,
    keep: Intrinsic,
    put: Intrinsic,
    lanes: int,
    target: int,
    base: int,
    step: int,
    g: Addresses,
    w: Weights,
    j: int,
    divisor: float,
    begin: int,
    end: int,
) -> int:
    """Do the pass over the gradients from j on, of which there are 1 to ARITY."""
    left = len(g) - j
    if left == 4:
        g4, w4 = (g[j], g[j + 1], g[j + 2], g[j + 3]), (w[j], w[j + 1], w[j + 2], w[j + 3])
        return link(load, keep, put, lanes, target, base, step, g4, w4, divisor, begin, end)
    if left == 3:
        g3, w3 = (g[j], g[j + 1], g[j + 2]), (w[j], w[j + 1], w[j + 2])
        return link(load, keep, put, lanes, target, base, step, g3, w3, divisor, begin, end)
    if left == 2:
        g2, w2 = (g[j], g[j + 1]), (w[j], w[j + 1])
        return link(load, keep, put, lanes, target, base, step, g2, w2, divisor, begin, end)
    return link(load, keep, put, lanes, target, base, step, (g[j],), (w[j],), divisor, begin, end)


@inlined
def _chain(
    load: Intrinsic,
    keep: Intrinsic,
    lanes: int,
    target: int,
    base: int,
    step: int,
    streaming: bool,
    g: Addresses,
    w: Weights,
    divisor: float,
    begin: int,
    end: int,
) -> int:
    """Fold all gradients over one strip of whole vectors."""
    peak = 0
    j = 0
    between = _scratch() - begin * (vectors.VECTOR_BYTES // lanes)
    while len(g) - j > 4:
        g4, w4 = (g[j], g[j + 1], g[j + 2], g[j + 3]), (w[j], w[j + 1], w[j + 2], w[j + 3])
        high = link(load, keep, store, lanes, between, base, step, g4, w4, 1.0, begin, end)
        peak = max(peak, high)
        base, step = between, 1
        j += 4
    if streaming:
        high = _last_link(load, keep, stream, lanes, target, base, step, g, w, j, divisor, begin, end)
    else:
        high = _last_link(load, keep, store, lanes, target, base, step, g, w, j, divisor, begin, end)
    return max(peak, high)


@inlined
def _edge(
    load_one: Intrinsic,
    keep_one: Intrinsic,
    target: int,
    base: int,
    step: int,
    g: Addresses,
    w: Weights,
    divisor: float,
    begin: int,
    end: int,
) -> int:
    """Fold the few elements before or after the whole vectors."""
    peak = 0
    last = len(g) - 1
    for j in range(len(g)):
        by = divisor if j == last else 1.0
        one, weight = (g[j],), (w[j],)
        high = link(load_one, keep_one, store, 1, target, base, step, one, weight, by, begin, end)
        peak = max(peak, high)
        base, step = target, 1
    return peak


@inlined
def whole_vectors(lanes: int, target: int, streaming: bool, begin: int, end: int) -> tuple[int, int]:
    """Return where the whole vectors between `begin` and `end` begin and end.

    A stream wants an aligned address, so that there may be single elements before them.
    """
    itemsize = vectors.VECTOR_BYTES // lanes
    low = begin
    if streaming:
        past = (target + begin * itemsize) % vectors.VECTOR_BYTES
        low = min(end, begin + (vectors.VECTOR_BYTES - past) % vectors.VECTOR_BYTES // itemsize)
    return low, low + (end - low) // lanes * lanes


@inlined
def fold_block(
    load: Intrinsic,
    load_one: Intrinsic,
    keep: Intrinsic,
    keep_one: Intrinsic,
    lanes: int,
    target: int,
    base: int,
    step: int,
    streaming: bool,
    g: Addresses,
    w: Weights,
    divisor: float,
    begin: int,
    end: int,
) -> int:
    """Fold all gradients over elements `begin` to `end`."""
    low, high = whole_vectors(lanes, target, streaming, begin, end)
    peak = 0
    for edge_begin, edge_end in ((begin, low), (high, end)):
        edge = _edge(load_one, keep_one, target, base, step, g, w, divisor, edge_begin, edge_end)
        peak = max(peak, edge)
    for i in range(low, high, STRIP):
        strip_end = min(i + STRIP, high)
        strip = _chain(load, keep, lanes, target, base, step, streaming, g, w, divisor, i, strip_end)
        peak = max(peak, strip)
    return peak


@inlined
def _descend_strip(load: Intrinsic, lanes: int, target: int, mean: int, rate: float, begin: int, end: int) -> None:
    for i in range(begin, end, lanes):
        store(target, i, subtract_product(load(target, i), rate, load(mean, i)))


@inlined
def descend_block(
    load: Intrinsic,
    load_one: Intrinsic,
    lanes: int,
    target: int,
    base: int,
    step: int,
    g: Addresses,
    w: Weights,
    divisor: float,
    rate: float,
    begin: int,
    end: int,
) -> int:
    """Fold all gradients over elements `begin` to `end`, and subtract `rate` times the result from `target`.

    The result itself goes nowhere: a strip of it at a time lies in the first-level cache.
    """
    itemsize = vectors.VECTOR_BYTES // lanes
    _, high = whole_vectors(lanes, target, False, begin, end)
    peak = 0
    for i in range(begin, high, STRIP):
        strip_end = min(i + STRIP, high)
        mean = _scratch() - i * itemsize
        strip = _chain(load, load, lanes, mean, base, step, False, g, w, divisor, i, strip_end)
        _descend_strip(load, lanes, target, mean, rate, i, strip_end)
        peak = max(peak, strip)
    rest = _scratch() - high * itemsize
    edge = _edge(load_one, load_one, rest, base, step, g, w, divisor, high, end)
    _descend_strip(load_one, 1, target, rest, rate, high, end)
    return max(peak, edge)


@inlined
def sum_squares(load: Intrinsic, load_one: Intrinsic, lanes: int, address: int, begin: int, end: int) -> float:
    """Return the sum of squares of elements `begin` to `end` in float64.

    One partial sum a lane, the lanes from first to last, then what is left one by one: an order
    that depends on `begin` and `end` alone.
    """
    high = begin + (end - begin) // lanes * lanes
    total = 0.0
    if high > begin:
        sums = squares(load(address, begin))
        for i in range(begin + lanes, high, lanes):
            sums = add(sums, squares(load(address, i)))
        total = add_lanes(sums)
    for i in range(high, end):
        total += add_lanes(squares(load_one(address, i)))
    return total
