"""The memory of gradients and parameters, and what works on it: the one place that a device could stand in for.

All memory in which a gradient, a sum or a version of the parameters is kept comes from here, and all arithmetic on it
is the reducer's. Headers, verdicts and versions are not a memory's affair: they stay with the host.
"""

from __future__ import annotations

import numpy as np

from mpisync.kernels.fold import Reducer
from mpisync.transport.layout import aligned_bytes
from mpisync.transport.shared_memory import SharedMemory


class HostMemory:
    """The host's memory, worked on by its cores.

    Args:
        threads: How many threads reduce.

    Attributes:
        reducer: Folds, copies and checks what lies in this memory.

    Example:
        >>> memory = HostMemory()
        >>> memory.allocate(100).size
        100
    """

    def __init__(self, threads: int = 1) -> None:
        self.reducer = Reducer(threads)

    def allocate(self, size_bytes: int) -> np.ndarray:
        """Return zeroed bytes of this process's own, on a 64-byte boundary."""
        return aligned_bytes(size_bytes)

    def share(self, size_bytes: int, *, as_file: bool) -> SharedMemory:
        """Return zeroed bytes that other processes of this node can attach by their address.

        Raises:
            OSError: They cannot be had.
        """
        return SharedMemory.create(size_bytes, as_file=as_file)

    def attach(self, address: str) -> SharedMemory:
        """Return the bytes that another process shares.

        Raises:
            OSError: They cannot be mapped from here.
        """
        return SharedMemory.attach(address)
