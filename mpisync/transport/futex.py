"""The futex that lets processes sleep until shared memory changes."""

from __future__ import annotations

import ctypes
import platform
import time

import numpy as np

_SYS_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221}.get(platform.machine())
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_libc = ctypes.CDLL(None, use_errno=True)


class Futex:
    """A uint32 in shared memory on which processes sleep until another changes it and wakes them.

    Where the platform has no futex, a wait is a short sleep.
    """

    def __init__(self, words: np.ndarray, index: int) -> None:
        self.words = words  # keeps the memory alive
        self.index = index
        self._address = ctypes.c_void_p(words.ctypes.data + 4 * index)

    def wait(self, seen: int, timeout_s: float) -> None:
        """Sleep while the word still is `seen`, at most `timeout_s`."""
        whole = int(timeout_s)
        limit = (ctypes.c_long * 2)(whole, int((timeout_s - whole) * 1e9))
        if _SYS_FUTEX is None:
            time.sleep(min(timeout_s, 1e-4))
            return
        _libc.syscall(
            _SYS_FUTEX, self._address, _FUTEX_WAIT, ctypes.c_uint32(seen & 0xFFFFFFFF), limit, None, 0
        )

    def wake(self) -> None:
        """Wake all who sleep on the word."""
        if _SYS_FUTEX is not None:
            _libc.syscall(_SYS_FUTEX, self._address, _FUTEX_WAKE, 0x7FFFFFFF, None, None, 0)
