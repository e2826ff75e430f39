"""Sums, means and copies of gradients, each in one pass over memory.

The sum is a strict left fold in the order given: every element is ((g0 + g1) + g2) + ..., rounded
after each addition, whatever the number of threads and however the gradients are spread over calls.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpisync.kernels import atomics, chunks
from mpisync.kernels.chunks import BLOCK, PEAK, address
from mpisync.kernels.dtypes import DTYPES, Dtype
from mpisync.kernels.thread_pool import ThreadPool
from mpisync.kernels.vectors import VECTOR_BYTES

Array = NDArray[Any]

# What a thread claims at a time: little enough that nobody waits long for another's last chunk.
FOLD_CHUNK = 4 * BLOCK  # elements
COPY_CHUNK_BYTES = 1 << 18
# Bytes read and written, below which waking another thread costs as much as it saves.
THREADED_BYTES = 1 << 22
# Bytes of a result, from which on it goes past the caches: they would not hold it for its reader.
STREAMED_BYTES = 1 << 22


class FoldResult(NamedTuple):
    """What a fold says of its result.

    Attributes:
        finite: Whether every element of the accumulator is.
        sum_squares: ‖accumulator‖², after the division; 0.0 unless norms were asked for.
        gradient_squares: ‖g‖² of each gradient, before any weight; empty unless asked for.
    """

    finite: bool
    sum_squares: float = 0.0
    gradient_squares: tuple[float, ...] = ()


class Reducer:
    """Folds and copies arrays on a number of threads, the caller's among them.

    The other threads start with the first work that is large enough for them, and end with `close`
    or with the reducer. One caller at a time.

    Args:
        threads: How many; they should have a core each.
    """

    def __init__(self, threads: int = 1) -> None:
        self._pool = ThreadPool(threads)

    @property
    def threads(self) -> int:
        """How many threads work at most."""
        return self._pool.threads

    def fold(
        self,
        accumulator: Array,
        gradients: Sequence[Array],
        dtype: Dtype,
        *,
        start: bool,
        weights: Sequence[float] | None = None,
        divisor: float | None = None,
        norms: bool = False,
    ) -> FoldResult:
        """Add gradients to an accumulator, in order.

        Computes accumulator = (((accumulator + w0*g0) + w1*g1) + ...) / divisor element by element,
        in the accumulator's dtype, each operation rounded. Norms are sums in float64 over blocks of
        4096 elements, and of the blocks in order, so that they too depend on no number of threads.

        Args:
            accumulator: A flat array of `dtype.accumulator`, overlapping no gradient.
            gradients: Flat arrays of `dtype.storage`, as long as the accumulator. They may be none
                where there is something to finish.
            dtype: The gradients'.
            start: Whether the sum begins: what the accumulator held is ignored.
            weights: One factor for each gradient.
            divisor: What to divide the sum by.
            norms: Whether to compute the sums of squares.

        Raises:
            ValueError: Arrays or weights that do not fit.
            TypeError: Arrays of another dtype.
        """
        if not gradients:
            return self._finish(accumulator, start, divisor, norms)
        size, target = accumulator.size, _locate_target(accumulator, dtype.accumulator)
        sources = [_locate(gradient, dtype.storage, size) for gradient in gradients]
        streaming = accumulator.nbytes >= STREAMED_BYTES and not norms
        partials = np.empty((len(sources) + 1, -(-size // BLOCK))) if norms else _NO_PARTIALS
        peak = self._run(
            _FOLDS[dtype.name],
            size,
            FOLD_CHUNK,
            size * (len(sources) * dtype.itemsize + dtype.accumulator.itemsize),
            target,
            _BLANKS[dtype.accumulator.itemsize][1] if start else target,
            not start,
            streaming,
            np.array(sources, np.int64),
            _ones(len(sources)) if weights is None else _weights(weights, len(sources)),
            1.0 if divisor is None else float(divisor),  # an int is another type for numba
            partials,
        )
        finite = peak < DTYPES[dtype.accumulator.name].infinity
        if not norms:
            return FoldResult(finite)
        *each, result = (chunks.add_partials(partials, row) for row in range(len(partials)))
        return FoldResult(finite, result, tuple(each))

    def _finish(self, accumulator: Array, start: bool, divisor: float | None, norms: bool) -> FoldResult:
        """Divide what is already there: a fold of the accumulator alone, which leaves its bits."""
        if start:
            raise ValueError("gradients must not be empty where the sum starts")
        dtype = DTYPES[accumulator.dtype.name]
        result = self.fold(accumulator, [accumulator], dtype, start=True, divisor=divisor, norms=norms)
        return FoldResult(result.finite, result.sum_squares)

    def fused_sgd_step(
        self,
        parameters: Array,
        gradients: Sequence[Array],
        dtype: Dtype,
        *,
        accumulator: Array | None = None,
        weights: Sequence[float] | None = None,
        divisor: float = 1.0,
        rate: float,
    ) -> None:
        """Subtract `rate` times the mean of gradients from parameters, in one pass over memory.

        Computes parameters = fma(-rate, mean, parameters) element by element, the mean as `fold` does. What it
        spares is to write the mean and to read it again. Whoever calls it knows that the mean is finite.

        Args:
            parameters: A flat array of `dtype.storage`, which is the accumulator's dtype too.
            gradients: Flat arrays of the same length, one or more.
            dtype: float32 or float64.
            accumulator: The sum of those that were folded before; None where there are none.
            weights: One factor for each gradient.
            divisor: What to divide the sum by.
            rate: The learning rate.
        """
        if dtype.name not in _DESCENTS:
            raise TypeError(f"dtype must be one of {', '.join(_DESCENTS)}, not {dtype.name}")
        if not gradients:
            raise ValueError("gradients must not be empty")
        size, target = parameters.size, _locate_target(parameters, dtype.storage)
        sources = [_locate(gradient, dtype.storage, size) for gradient in gradients]
        blank = _BLANKS[dtype.itemsize][1]
        self._run(
            _DESCENTS[dtype.name],
            size,
            FOLD_CHUNK,
            size * (len(sources) + 2) * dtype.itemsize,
            target,
            blank if accumulator is None else _locate(accumulator, dtype.storage, size),
            accumulator is not None,
            np.array(sources, np.int64),
            _ones(len(sources)) if weights is None else _weights(weights, len(sources)),
            float(divisor),
            float(rate),
        )

    def pack(self, source: Array, target: Array, dtype: Dtype) -> float:
        """Copy a gradient, and return the largest magnitude in it; inf where an element is not finite.

        Args:
            source: A flat array of `dtype.storage`.
            target: Another of the same length, not overlapping it.
            dtype: The gradient's.
        """
        to = _locate_target(target, dtype.storage)
        return self._copy(_locate(source, dtype.storage, target.size), to, target.size, dtype)

    def peak(self, array: Array, dtype: Dtype) -> float:
        """Return the largest magnitude in a flat array of `dtype.storage`; inf where an element is not finite."""
        return self._copy(_locate(array, dtype.storage, array.size), 0, array.size, dtype)

    def copy(self, source: Array, target: Array) -> None:
        """Copy contiguous bytes, whatever they mean."""
        for array in (source, target):
            if not array.flags.c_contiguous:
                raise ValueError("arrays must be contiguous; see numpy.ascontiguousarray")
        source, target = (array.reshape(-1).view(np.uint8) for array in (source, target))
        to = _locate_target(target, _BYTES.storage)
        self._copy(_locate(source, _BYTES.storage, target.size), to, target.size, _BYTES)

    def _copy(self, source: int, target: int, size: int, dtype: Dtype) -> float:
        size_bytes = size * dtype.itemsize
        bits = self._run(
            _COPIES[dtype.itemsize],
            size,
            COPY_CHUNK_BYTES // dtype.itemsize,
            2 * size_bytes,
            source,
            target,
            bool(target) and size_bytes >= STREAMED_BYTES,
        )
        return dtype.magnitude(bits)

    def _run(self, kernel: Callable[..., None], size: int, chunk: int, traffic_bytes: int, *rest: Any) -> int:
        """Run a kernel of `chunks` and return the bits of the largest magnitude that it met."""
        state = np.zeros(3, np.int64)
        if traffic_bytes < THREADED_BYTES:
            kernel(state, size, chunk, *rest)
        else:
            self._pool.run(kernel, state, (size, chunk, *rest), -(-size // chunk))
        return int(state[PEAK])

    def close(self) -> None:
        """End the threads."""
        self._pool.close()

    def __enter__(self) -> "Reducer":
        """Return the reducer itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the threads."""
        self.close()


# -- what the kernels are given --------------------------------------------------------------------

_FOLDS: dict[str, Callable[..., None]] = {
    "float64": chunks.fold_float64,
    "float32": chunks.fold_float32,
    "float16": chunks.fold_float16,
    "bfloat16": chunks.fold_bfloat16,
}
_DESCENTS: dict[str, Callable[..., None]] = {
    "float64": chunks.descend_float64,
    "float32": chunks.descend_float32,
}
_COPIES: dict[int, Callable[..., None]] = {
    8: chunks.copy_64,
    4: chunks.copy_32,
    2: chunks.copy_16,
    1: chunks.copy_8,
}
_BYTES = Dtype("bytes", 1, np.dtype(np.uint8), np.dtype(np.uint8), infinity=0)  # they have no magnitude
_NO_PARTIALS = np.empty((0, 0))


def _blank(dtype: type) -> tuple[Array, int]:
    """Return a vector of -0.0 and its address, for a sum to start from."""
    zeros: Array = np.full(VECTOR_BYTES // np.dtype(dtype).itemsize, -0.0, dtype)
    return zeros, zeros.ctypes.data


_BLANKS = {4: _blank(np.float32), 8: _blank(np.float64)}


@functools.cache
def _ones(count: int) -> NDArray[np.float64]:
    return np.ones(count)


def _weights(weights: Sequence[float], count: int) -> NDArray[np.float64]:
    if len(weights) != count:
        raise ValueError(f"weights must be as many as gradients: {count}, not {len(weights)}")
    return np.array(weights, np.float64)


def _locate(array: Array, dtype: np.dtype[Any], size: int) -> int:
    """Return the address of an array that a kernel may read."""
    flags = array.flags
    if array.dtype != dtype:
        raise TypeError(f"array must be of dtype {dtype}, not {array.dtype}")
    if array.ndim != 1 or not flags.c_contiguous or not flags.aligned:
        raise ValueError("array must be flat, contiguous and aligned to its elements")
    if array.size != size:
        raise ValueError(f"array must have {size} elements, not {array.size}")
    return address(np.asarray(array))  # a memmap is too slow for numba


def _locate_target(array: Array, dtype: np.dtype[Any]) -> int:
    if not array.flags.writeable:
        raise ValueError("array must be writeable")
    return _locate(array, dtype, array.size)


# -- without threads -------------------------------------------------------------------------------

_ALONE = Reducer()
pack = _ALONE.pack
peak = _ALONE.peak


def warm(names: Iterable[str]) -> None:
    """Compile the kernels for dtypes, or load them from the cache, before they are needed.

    Args:
        names: Of dtypes, as in `DTYPES`.
    """
    for name in names:
        dtype = DTYPES[name]
        gradient, accumulator = np.zeros(1, dtype.storage), np.zeros(1, dtype.accumulator)
        _ALONE.fold(accumulator, [gradient], dtype, start=True, norms=True)
        if name in _DESCENTS:
            _ALONE.fused_sgd_step(accumulator, [gradient], dtype, rate=0.0)
        _ALONE.copy(gradient, gradient.copy())
        readonly = gradient.view()
        readonly.flags.writeable = False  # of a type of its own for numba
        pack(readonly, gradient, dtype)
    for words in (np.zeros(1, np.int64), np.zeros(1, np.uint32)):
        atomics.store_release(words, 0, 0)
        atomics.load_acquire(words, 0)
        atomics.fetch_add(words, 0, 0)
    atomics.fence()
