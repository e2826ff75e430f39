"""SIGSEGV handler that names the line writing to read-only parameters, before the fault ends the process.

Python cannot handle the signal: its handlers run after the faulting instruction, which would fault for ever. So the
handler is machine code that calls nothing but write() and sigaction(), as is safe there; then the fault comes again,
and faulthandler shows the line.
"""

from __future__ import annotations

import ctypes
import faulthandler
import signal
import sys
from typing import Any

import numpy as np
from numba import carray, cfunc, types

_SA_SIGINFO = 4
_MASK_BYTES = 128  # glibc's and musl's struct sigaction alike: handler, mask, flags
_ACTION_BYTES = 256  # a struct sigaction, at least
_ADDRESS = 2  # which word of siginfo_t holds the address, on 64-bit Linux


class FaultNotice:
    """A SIGSEGV handler that says `text` before a fault in `memory` ends the process; the line is shown too.

    Args:
        memory: It is mapped read-only.
        text: What happened, and what to write instead.
    """

    def __init__(self, memory: np.ndarray[Any, Any], text: str) -> None:
        faulthandler.disable()  # MPI may have put its own handler over it
        faulthandler.enable(sys.__stderr__ or sys.stderr)
        self._words = ctypes.create_string_buffer(text.encode() + b"\n")
        self._before = ctypes.create_string_buffer(_ACTION_BYTES)  # faulthandler's
        start, stop = memory.ctypes.data, memory.ctypes.data + memory.nbytes
        self._handler = _handler(start, stop, self._words, self._before)
        action = ctypes.create_string_buffer(_ACTION_BYTES)
        ctypes.c_void_p.from_buffer(action).value = self._handler.address
        flags = ctypes.sizeof(ctypes.c_void_p) + _MASK_BYTES
        ctypes.c_int.from_buffer(action, flags).value = _SA_SIGINFO
        ctypes.CDLL(None).sigaction(int(signal.SIGSEGV), action, self._before)

    def undo(self) -> None:
        """Put back the handler that was there before."""
        ctypes.CDLL(None).sigaction(int(signal.SIGSEGV), self._before, None)


def _handler(start: int, stop: int, words: Any, before: Any) -> Any:  # noqa: ANN401 (ctypes' arrays, numba's function)
    libc = ctypes.CDLL(None)
    write, sigaction = libc.write, libc.sigaction
    write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    write.restype = ctypes.c_ssize_t
    sigaction.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    said, said_bytes = ctypes.addressof(words), len(words.value)
    previous, number = ctypes.addressof(before), int(signal.SIGSEGV)

    @cfunc(types.void(types.intc, types.CPointer(types.uintp), types.voidptr))
    def handle(_number, info, _context):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        address = carray(info, 3)[_ADDRESS]
        if start <= address < stop:
            write(2, said, said_bytes)
        sigaction(number, previous, 0)

    return handle
