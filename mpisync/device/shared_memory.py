"""Host memory that several processes of a node share.

A `memfd` opened through /proc/PID/fd is bounded by no mount and vanishes with its last user; where /proc of another
process cannot be opened (other PID namespaces), a file in /dev/shm takes its place, unlinked once all have attached.
Pages are allocated before mapping: a hole would let the first touch kill the process with SIGBUS.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import secrets
from pathlib import Path

import numpy as np

_NONCE_BYTES = 64  # a random prefix: whoever attaches proves that it mapped the right memory
_libc = ctypes.CDLL(None, use_errno=True)


class SharedMemory:
    """A run of zeroed bytes that other processes of this user can map by its `address`.

    Attributes:
        bytes: uint8.
        address: Text.
        is_file: Whether this process made it as a file in /dev/shm.

    Raises:
        OSError: The memory cannot be had (the message says how much is free) or mapped.
    """

    def __init__(self, fd: int, size_bytes: int, address: str, path: str | None) -> None:
        self._fd = fd
        self._path, self.is_file = path, path is not None
        self._map = mmap.mmap(fd, size_bytes + _NONCE_BYTES, mmap.MAP_SHARED)
        self.address = address
        self.bytes = np.frombuffer(self._map, np.uint8)[_NONCE_BYTES:]

    @classmethod
    def create(cls, size_bytes: int, *, as_file: bool = False) -> SharedMemory:
        """Make shared memory of `size_bytes`, every page allocated by the caller (NUMA)."""
        path = None
        if as_file:
            path = f"/dev/shm/mpisync-{secrets.token_hex(8)}"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        else:
            fd = os.memfd_create("mpisync", os.MFD_CLOEXEC)
        try:
            _allocate(fd, size_bytes + _NONCE_BYTES)
            nonce = secrets.token_bytes(16)
            where = path or f"/proc/{os.getpid()}/fd/{fd}"
            memory = cls(fd, size_bytes, f"{where}?{nonce.hex()}?{size_bytes}", path)
            memory._map[:16] = nonce
        except BaseException:
            os.close(fd)
            if path:
                os.unlink(path)
            raise
        return memory

    @classmethod
    def attach(cls, address: str) -> SharedMemory:
        """Map memory that another process made, given its `address`."""
        where, nonce, size = address.rsplit("?", 2)
        fd = os.open(where, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_size != int(size) + _NONCE_BYTES:
                raise OSError(errno.ESTALE, f"{where} is another memory than {address}")
            memory = cls(fd, int(size), address, None)
        except BaseException:
            os.close(fd)
            raise
        if memory._map[:16] != bytes.fromhex(nonce):
            memory.close()
            raise OSError(errno.ESTALE, f"{where} is another memory than {address}")
        return memory

    def protect(self, start: int) -> None:
        """Make the bytes from `start` on, and the rest of its page, read-only for this process."""
        base = self.bytes.ctypes.data - _NONCE_BYTES  # mappings begin on a page
        first = (_NONCE_BYTES + start) // mmap.PAGESIZE * mmap.PAGESIZE
        size = ctypes.c_size_t(len(self._map) - first)
        if _libc.mprotect(ctypes.c_void_p(base + first), size, mmap.PROT_READ):
            raise OSError(ctypes.get_errno(), "shared memory cannot be made read-only")

    def unlink(self) -> None:
        """Take the name away once all have attached; the memory lives on while it is mapped."""
        if self._path is not None:
            Path(self._path).unlink(missing_ok=True)
            self._path = None

    def close(self) -> None:
        """Give back the descriptor and name; pages go once no array looks into them."""
        self.unlink()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.bytes = np.empty(0, np.uint8)


def _allocate(fd: int, size_bytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size_bytes)
    except OSError as error:
        missing = f"{size_bytes / 1e6:.1f} MB of shared memory wanted"
        raise OSError(error.errno, f"{missing}, and {os.strerror(error.errno or 0)}") from error
