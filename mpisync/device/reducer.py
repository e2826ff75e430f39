"""Arithmetic on a device's arrays by its kernels: what `mpisync.kernels.fold.Reducer` is on the host, with its bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mpisync.device.base import Array, Memory
from mpisync.device.kernel import LINK, NORM_BLOCK, PEAKS, Kernels, largest
from mpisync.kernels import chunks
from mpisync.kernels.dtypes import DTYPES, Dtype
from mpisync.kernels.fold import FoldResult


class DeviceReducer:
    """The kernels of one device, on arrays of its memory. Each method means what the host's of that name does.

    Args:
        kernels: The device's.
        memory: The device's.
    """

    def __init__(self, kernels: Kernels, memory: Memory) -> None:
        self._kernels, self._memory = kernels, memory
        self._peaks = memory.allocate(8 * PEAKS).view(np.dtype(np.uint64))
        self._zeros = np.zeros(PEAKS, np.uint64)

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
        """Add gradients to an accumulator, in order."""
        sources = [self._located(gradient, dtype, accumulator.size) for gradient in gradients]
        target = self._located(accumulator, DTYPES[dtype.accumulator.name], accumulator.size)
        self._kernels.fold(
            target,
            sources,
            accumulator.size,
            dtype,
            start=start,
            weights=weights,
            divisor=divisor,
            peaks=self._blank_peaks(),
        )
        wide = DTYPES[dtype.accumulator.name]
        squares = [self._squares(source, accumulator.size, dtype) for source in sources] if norms else []
        total = self._squares(target, accumulator.size, wide) if norms else 0.0
        return FoldResult(self._largest(wide) < math.inf, total, tuple(squares))

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
        """Subtract `rate` times the mean of gradients from parameters, in one pass."""
        size = parameters.size
        start, between = accumulator is None, accumulator
        if accumulator is None and len(gradients) > LINK:
            between = self._memory.allocate(size * dtype.itemsize).view(dtype.storage)  # sums lie there between passes
        self._kernels.fused_sgd_step(
            self._located(parameters, dtype, size),
            [self._located(gradient, dtype, size) for gradient in gradients],
            size,
            dtype,
            accumulator=0 if between is None else self._located(between, dtype, size),
            start=start,
            weights=weights,
            divisor=divisor,
            rate=rate,
        )

    def pack(self, source: Array, target: Array, dtype: Dtype) -> float:
        """Copy a gradient, and return the largest magnitude in it; inf where an element is not finite."""
        size = target.size
        self._kernels.pack(
            self._located(source, dtype, size),
            self._located(target, dtype, size),
            size,
            dtype,
            peaks=self._blank_peaks(),
        )
        return self._largest(dtype)

    def peak(self, array: Array, dtype: Dtype) -> float:
        """Return the largest magnitude in an array; inf where an element is not finite."""
        at = self._located(array, dtype, array.size)
        self._kernels.pack(at, 0, array.size, dtype, peaks=self._blank_peaks())
        return self._largest(dtype)

    def _located(self, array: Array, dtype: Dtype, size: int) -> int:
        """Return the address of an array, which the kernels take for what it should be."""
        if array.dtype != dtype.storage:
            raise TypeError(f"array must be of dtype {dtype.storage}, not {array.dtype}")
        if array.size != size:
            raise ValueError(f"array must have {size} elements, not {array.size}")
        return self._memory.address(array)

    def _blank_peaks(self) -> int:
        self._memory.copy(self._zeros, self._peaks)
        return self._memory.address(self._peaks)

    def _largest(self, dtype: Dtype) -> float:
        return largest(self._memory.to_host(self._peaks), dtype)

    def _squares(self, source: int, size: int, dtype: Dtype) -> float:
        partials = self._memory.allocate(8 * -(-size // NORM_BLOCK)).view(np.dtype(np.float64))
        self._kernels.squares(source, size, dtype, self._memory.address(partials))
        return float(chunks.add_partials(self._memory.to_host(partials).reshape(1, -1), 0))
