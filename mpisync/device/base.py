"""What memory must do for gradients, their sum and the parameters to lie in it."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from mpisync.kernels.dtypes import Dtype
from mpisync.kernels.fold import FoldResult

Array = Any
"""A flat array: NumPy's, or a device's with slices, ``view``, ``size``, ``nbytes``, ``dtype`` and ``__dlpack__``."""

ALIGNMENT = 64  # bytes: a cache line, and what every kernel is content with


def aligned(size_bytes: int, to: int = ALIGNMENT) -> int:
    """Round `size_bytes` up to a multiple of `to`."""
    return -(-size_bytes // to) * to


class Shared(Protocol):
    """A run of bytes that other processes of this user can attach by its `address`.

    Attributes:
        bytes: uint8.
        address: Text.
        is_file: Whether this process made it as a file, which would outlive it.
    """

    bytes: Array
    address: str
    is_file: bool

    def protect(self, start: int) -> None:
        """Make the bytes from `start` on read-only for this process."""

    def unlink(self) -> None:
        """Take a name away, once all have attached."""

    def close(self) -> None:
        """Let go of the memory."""


class Arithmetic(Protocol):
    """What is computed on arrays of one memory; see `mpisync.kernels.fold.Reducer` for what each means."""

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

    def pack(self, source: Array, target: Array, dtype: Dtype) -> float:
        """Copy a gradient, and return the largest magnitude in it."""

    def peak(self, array: Array, dtype: Dtype) -> float:
        """Return the largest magnitude in an array; inf where an element is not finite."""


class Memory(abc.ABC):
    """One kind of memory, as this process reaches it.

    What is done to it happens in order; from another process's point of view it has happened when `finish` returns.

    Attributes:
        name: What people call it: "host memory", "cuda:0".
        way: How gradients travel where workers put them into it: what records call the transport.
        is_host: Whether its arrays are NumPy's.
        folds_early: Whether gradients that wait for others are worth a pass of their own meanwhile.
        is_owned_by_root: Whether what workers share with the root must be the root's: a worker's would go with it.
        reducer: What computes on its arrays.
    """

    name: str
    way: str
    is_host: bool
    folds_early: bool
    is_owned_by_root: bool
    reducer: Arithmetic

    @abc.abstractmethod
    def allocate(self, size_bytes: int) -> Array:
        """Return zeroed bytes of this process's own, on a 64-byte boundary.

        Raises:
            MemoryError: There are not so many.
        """

    @abc.abstractmethod
    def share(self, size_bytes: int, *, as_file: bool = False) -> Shared:
        """Return zeroed bytes that other processes of this node can attach by their address.

        Raises:
            OSError: They cannot be had.
        """

    @abc.abstractmethod
    def attach(self, address: str) -> Shared:
        """Return the bytes that another process shares.

        Raises:
            OSError: They cannot be reached from here, or are others.
        """

    def free_bytes(self) -> float:
        """Return how much of it nobody has; infinity where that is not known."""
        return math.inf

    def pin(self, array: np.ndarray) -> Callable[[], None]:
        """Lock the pages of the host's memory that hold an array, to copy from and to them faster.

        Returns:
            What unlocks them, before they are unmapped.
        """
        return lambda: None

    @abc.abstractmethod
    def copy(self, source: Array, target: Array) -> None:
        """Copy contiguous bytes; one of the two may be the host's."""

    @abc.abstractmethod
    def to_host(self, array: Array) -> np.ndarray:
        """Return what an array holds, when all before is done; the host's as they are, without a copy."""

    @abc.abstractmethod
    def imported(self, thing: Any) -> Array:
        """Return an array that looks into another library's, by DLPack.

        What its library has begun with it is done before what is done to the array here.

        Args:
            thing: Flat and contiguous, in this memory, of a dtype that NumPy has.
        """

    @abc.abstractmethod
    def address(self, array: Array) -> int:
        """Return where an array begins, to tell whether two are one."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Wait until everything that this process has begun on the memory is done."""
