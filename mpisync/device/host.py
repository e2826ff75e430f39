"""The host's memory, worked on by its cores."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpisync.device.base import ALIGNMENT, Memory
from mpisync.device.shared_memory import SharedMemory
from mpisync.kernels.fold import Reducer


class HostMemory(Memory):
    """The host's memory.

    Args:
        threads: How many threads reduce.

    Attributes:
        reducer: Folds, copies and checks what lies in this memory.

    Example:
        >>> memory = HostMemory()
        >>> memory.allocate(100).size
        100
    """

    name = "host memory"
    way = "shared memory"
    is_host = folds_early = True
    is_owned_by_root = False  # a process's own pages lie near its cores, and outlive it while they are mapped

    def __init__(self, threads: int = 1) -> None:
        self.reducer: Reducer = Reducer(threads)

    def allocate(self, size_bytes: int) -> np.ndarray:
        """Return zeroed bytes of this process's own, on a 64-byte boundary."""
        return aligned_bytes(size_bytes)

    def share(self, size_bytes: int, *, as_file: bool = False) -> SharedMemory:
        """Return zeroed bytes that other processes of this node can attach by their address."""
        return SharedMemory.create(size_bytes, as_file=as_file)

    def attach(self, address: str) -> SharedMemory:
        """Return the bytes that another process shares."""
        return SharedMemory.attach(address)

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy contiguous bytes, by as many threads as there are."""
        if self.reducer.threads == 1:
            np.copyto(target, source)
        else:
            self.reducer.copy(source, target)

    def to_host(self, array: np.ndarray) -> np.ndarray:
        """Return the array."""
        return array

    def imported(self, thing: Any) -> np.ndarray:
        """Return an array that looks into another library's."""
        return np.from_dlpack(thing)

    def address(self, array: np.ndarray) -> int:
        """Return where an array begins."""
        return array.ctypes.data

    def finish(self) -> None:
        """Do nothing: what was called has happened."""


def aligned_bytes(size_bytes: int) -> np.ndarray:
    """Allocate private zeroed bytes that start on a 64-byte boundary."""
    raw = np.zeros(size_bytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size_bytes]
