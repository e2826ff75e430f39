"""Plans of the launches of `fold.cu`, for whoever can make them.

A launcher is told the kernel by its C++ name, how many blocks of how many threads, and the kernel's one argument, a
struct that it passes by value. CuPy's `RawModule` makes launchers on a device; the tests have one on the host, from the
same text compiled as C++. Arrays are addresses of the device's memory: whoever gives them has checked their lengths.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpisync.kernels.dtypes import Dtype

SOURCE = Path(__file__).with_name("fold.cu")
OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true")

LINK = 8  # gradients that a launch takes, as in the source; so are the next two
PEAKS = 1024  # words over which a largest magnitude is spread
NORM_BLOCK = 4096  # elements of a partial sum of squares

_PACK_BYTES = 16
_BLOCK = 256  # threads
_BLOCKS_PER_MULTIPROCESSOR = 8  # as many as one can hold; each thread takes several packs where there are more
_SQUARES_BLOCK = 32  # threads that have 4096 elements each: few, so that all multiprocessors get some

_ELEMENTS = {"float64": "double", "float32": "float", "float16": "Float16", "bfloat16": "BFloat16"}
_BITS = {8: "unsigned long long", 4: "unsigned int", 2: "unsigned short"}

NAMES = (
    *(f"fold<{element}>" for element in _ELEMENTS.values()),
    *(f"fused_sgd_step<{element}>" for element in ("double", "float")),
    *(f"squares<{element}>" for element in _ELEMENTS.values()),
    *(f"pack<{bits}>" for bits in _BITS.values()),
)
"""The name expressions of all kernels that are launched."""

Launcher = Callable[[str, int, int, ctypes.Structure], None]
"""Called with a kernel's name, the number of blocks, that of threads in each, and its argument."""


def _fold_fields(real: type[Any]) -> list[tuple[str, Any]]:
    return [
        ("gradients", ctypes.c_uint64 * LINK),
        ("base", ctypes.c_uint64),
        ("target", ctypes.c_uint64),
        ("peaks", ctypes.c_uint64),
        ("size", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("packs", ctypes.c_int64),
        ("count", ctypes.c_int),
        ("weights", real * LINK),
        ("divisor", real),
        ("rate", real),
    ]


class _Fold32(ctypes.Structure):
    _fields_ = _fold_fields(ctypes.c_float)


class _Fold64(ctypes.Structure):
    _fields_ = _fold_fields(ctypes.c_double)


class _Pack(ctypes.Structure):
    _fields_ = [
        ("source", ctypes.c_uint64),
        ("target", ctypes.c_uint64),
        ("peaks", ctypes.c_uint64),
        ("size", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("packs", ctypes.c_int64),
    ]


class _Squares(ctypes.Structure):
    _fields_ = [
        ("source", ctypes.c_uint64),
        ("partials", ctypes.c_uint64),
        ("size", ctypes.c_int64),
        ("aligned", ctypes.c_int),
    ]


class Kernels:
    """The kernels of `fold.cu` on one device.

    Launches return before the device is done; what is launched on one stream happens in order. Addresses are of
    whole elements. Where one stands for an array that is not wanted, it is 0.

    Args:
        launch: Starts a kernel.
        multiprocessors: How many the device has.

    Example:
        >>> from mpisync.kernels.dtypes import DTYPES
        >>> kernels = Kernels(lambda name, blocks, threads, argument: print(name, blocks, threads), multiprocessors=2)
        >>> kernels.fold(0x1000, [0x2000, 0x3000], 100_000, DTYPES["float32"], start=True, divisor=2.0)
        fold<float> 16 256
    """

    def __init__(self, launch: Launcher, multiprocessors: int) -> None:
        self._launch = launch
        self._most_blocks = multiprocessors * _BLOCKS_PER_MULTIPROCESSOR

    def fold(
        self,
        accumulator: int,
        gradients: Sequence[int],
        size: int,
        dtype: Dtype,
        *,
        start: bool,
        weights: Sequence[float] | None = None,
        divisor: float | None = None,
        peaks: int = 0,
    ) -> None:
        """Add gradients to an accumulator, in order, with the bits of `mpisync.kernels.fold.Reducer.fold`.

        Args:
            accumulator: An array of `dtype.accumulator`, overlapping no gradient.
            gradients: Arrays of `dtype.storage`. They may be none where there is something to finish.
            size: The elements of each.
            dtype: The gradients'.
            start: Whether the sum begins: what the accumulator held is ignored.
            weights: One factor for each gradient.
            divisor: What to divide the sum by.
            peaks: Zeroed words, as many as PEAKS, for the largest magnitudes of the result; see `largest`.

        Raises:
            ValueError: Addresses or weights that do not fit.
        """
        by = 1.0 if divisor is None else divisor
        self._fold(accumulator, None, gradients, size, dtype, start, weights, by, 0.0, peaks)

    def fused_sgd_step(
        self,
        parameters: int,
        gradients: Sequence[int],
        size: int,
        dtype: Dtype,
        *,
        accumulator: int,
        start: bool,
        weights: Sequence[float] | None = None,
        divisor: float = 1.0,
        rate: float,
        peaks: int = 0,
    ) -> None:
        """Subtract `rate` times the mean of gradients from parameters, in the last pass of the fold.

        Computes parameters = fma(-rate, mean, parameters) element by element, the mean as `fold` does. The mean
        itself goes nowhere; whoever calls it knows that it is finite.

        Args:
            parameters: An array of `dtype.storage`, which is the accumulator's dtype too.
            gradients: Arrays of the same dtype. They may be none where the accumulator holds them all.
            size: The elements of each.
            dtype: float32 or float64.
            accumulator: The sum of those that were folded before, where there are any; and where sums lie between
                passes, where there are more gradients than LINK.
            start: Whether none were folded before.
            weights: One factor for each gradient.
            divisor: What to divide the sum by.
            rate: The learning rate.
            peaks: Zeroed words, as many as PEAKS, for the largest magnitudes of the mean.

        Raises:
            TypeError: Parameters of that dtype are not updated here.
            ValueError: Addresses or weights that do not fit.
        """
        if dtype.storage != dtype.accumulator:
            raise TypeError(f"dtype must be one of float64, float32, not {dtype.name}; fold, and step an optimizer")
        self._fold(accumulator, parameters, gradients, size, dtype, start, weights, divisor, rate, peaks)

    def _fold(
        self,
        accumulator: int,
        parameters: int | None,
        gradients: Sequence[int],
        size: int,
        dtype: Dtype,
        start: bool,
        weights: Sequence[float] | None,
        divisor: float,
        rate: float,
        peaks: int,
    ) -> None:
        """Launch a pass for each LINK gradients; the sum lies in the accumulator between two of them."""
        if not gradients and start:
            raise ValueError("gradients must not be empty where the sum starts")
        factors = [1.0] * len(gradients) if weights is None else list(weights)
        if len(factors) != len(gradients):
            raise ValueError(f"weights must be as many as gradients: {len(gradients)}, not {len(factors)}")
        kind = _Fold64 if dtype.accumulator.itemsize == 8 else _Fold32
        firsts = range(0, max(len(gradients), 1), LINK)
        # an update of what one pass has summed needs no accumulator
        sums = [accumulator] * (parameters is None or not start or len(firsts) > 1)
        sums += [] if parameters is None else [parameters]
        _check([(address, dtype.itemsize) for address in gradients])
        _check([(address, dtype.accumulator.itemsize) for address in sums])
        for j in firsts:
            some, is_last = gradients[j : j + LINK], j == firsts[-1]
            argument = kind(
                base=0 if start and j == 0 else accumulator,
                target=accumulator,
                size=size,
                count=len(some),
                divisor=1.0,
                rate=rate,
            )
            argument.gradients[: len(some)] = some
            argument.weights[: len(some)] = factors[j : j + LINK]
            name = "fold"
            if is_last:
                argument.divisor, argument.peaks = divisor, peaks
                if parameters is not None:
                    argument.target, name = parameters, "fused_sgd_step"
            arrays = [(address, dtype.itemsize) for address in some]
            arrays += [(address, dtype.accumulator.itemsize) for address in (argument.base, argument.target)]
            self._launch_by_packs(f"{name}<{_ELEMENTS[dtype.name]}>", argument, dtype.itemsize, arrays)

    def pack(self, source: int, target: int, size: int, dtype: Dtype, *, peaks: int = 0) -> None:
        """Copy a gradient, and find the largest magnitude in it.

        Args:
            source: An array of `dtype.storage`.
            target: Another, not overlapping it; 0 to only look.
            size: The elements of each.
            dtype: The gradient's.
            peaks: Zeroed words, as many as PEAKS, for the largest magnitudes; see `largest`.

        Raises:
            ValueError: Addresses that do not fit.
        """
        argument = _Pack(source=source, target=target, peaks=peaks, size=size)
        arrays = [(address, dtype.itemsize) for address in (source, target or source)]
        _check(arrays)
        self._launch_by_packs(f"pack<{_BITS[dtype.itemsize]}>", argument, dtype.itemsize, arrays)

    def squares(self, source: int, size: int, dtype: Dtype, partials: int) -> None:
        """Sum the squares of each NORM_BLOCK elements of an array, in the CPU's order.

        It is a pass of its own: within the fold neighbours in a partial sum are in different threads, which would
        have to wait for each other. Added from the first to the last, the partial sums are ‖array‖² as
        `Reducer.fold(norms=True)` has it, bit by bit.

        Args:
            source: An array of `dtype.storage`.
            size: Its elements.
            dtype: Its dtype; for a sum or a mean that of the accumulator.
            partials: A float64 for each NORM_BLOCK elements, the last ones too.

        Raises:
            ValueError: Addresses that do not fit.
        """
        _check([(source, dtype.itemsize), (partials, 8)])
        argument = _Squares(source=source, partials=partials, size=size, aligned=source % _PACK_BYTES == 0)
        self._launch_for(-(-size // NORM_BLOCK), f"squares<{_ELEMENTS[dtype.name]}>", _SQUARES_BLOCK, argument)

    def _launch_by_packs(
        self, name: str, argument: _Fold32 | _Fold64 | _Pack, itemsize: int, arrays: Sequence[tuple[int, int]]
    ) -> None:
        """Launch a kernel that reads and writes by packs, over arrays given as (address, itemsize)."""
        lanes = _PACK_BYTES // itemsize
        argument.head, argument.packs = _split(argument.size, lanes, arrays)
        threads = max(argument.packs, argument.size - argument.packs * lanes)
        self._launch_for(threads, name, _BLOCK, argument)

    def _launch_for(self, threads: int, name: str, block: int, argument: ctypes.Structure) -> None:
        if threads:
            most = self._most_blocks * _BLOCK // block
            self._launch(name, min(-(-threads // block), most), block, argument)


def _check(arrays: Sequence[tuple[int, int]]) -> None:
    """Refuse what would be a misaligned access on the device, which ends all work of the process there."""
    for address, itemsize in arrays:
        if address <= 0 or address % itemsize:
            raise ValueError(f"address must be a multiple of the {itemsize} bytes of an element, and not {address}")


def _split(size: int, lanes: int, arrays: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return after how many elements all arrays are aligned to a pack, and how many whole packs follow."""
    for head in range(min(lanes, size)):
        if all((address + head * itemsize) % _PACK_BYTES == 0 for address, itemsize in arrays):
            return head, (size - head) // lanes
    return 0, 0


def largest(peaks: NDArray[np.uint64], dtype: Dtype) -> float:
    """Return the largest magnitude that a launch met; inf where an element was not finite.

    Args:
        peaks: The words that it was given.
        dtype: The dtype of the elements: for `pack` the gradient's, else the accumulator's.
    """
    return dtype.magnitude(int(peaks.max()))
