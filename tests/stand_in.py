"""A stand-in for a card: its memory is the host's, its kernels are `fold.cu` as C++, its arrays are no NumPy's.

What takes it for the host's memory fails: an array of it has nothing but what CuPy's have in common with NumPy's and
the code uses. It counts what is moved, and knows whether anything was begun that nobody has waited for.
"""

import errno
import fcntl
import functools
import hashlib
import os
import tempfile
from collections import Counter
from pathlib import Path

import host_kernel
import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from mpisync.device import kernel
from mpisync.device.base import Memory
from mpisync.device.host import aligned_bytes
from mpisync.device.reducer import DeviceReducer
from mpisync.device.shared_memory import SharedMemory

_ITEMSIZES = {
    "double": 8, "float": 4, "Float16": 2, "BFloat16": 2,
    "unsigned long long": 8, "unsigned int": 4, "unsigned short": 2,
}  # fmt: skip


HOST, CUDA = (1, 0), (2, 0)  # devices, as DLPack has them


class StandInArray:
    """An array on the stand-in; it says to be on `device`, where sessions' views are tensors only as the host's."""

    def __init__(self, array, device=HOST):
        self._array, self._device = array, device

    size = property(lambda self: self._array.size)
    nbytes = property(lambda self: self._array.nbytes)
    dtype = property(lambda self: self._array.dtype)
    shape = property(lambda self: self._array.shape)

    def __len__(self):
        return len(self._array)

    def __getitem__(self, part):
        assert isinstance(part, slice) and part.step is None, "only runs of elements"
        return StandInArray(self._array[part], self._device)

    def view(self, dtype):
        return StandInArray(self._array.view(dtype), self._device)

    def reshape(self, shape):
        return StandInArray(self._array.reshape(shape), self._device)

    def __dlpack__(self, **more):
        more = {name: value for name, value in more.items() if name != "dl_device"}
        return self._array.__dlpack__(**more)

    def __dlpack_device__(self):
        return self._device

    def __array__(self, *_, **__):
        raise TypeError("this array is on a device: use Memory.to_host")


class StandInTensor(torch.Tensor):
    """A tensor on the stand-in, which says to be on a card."""

    def __dlpack_device__(self):
        return CUDA


def tensor(thing):
    """Return an array of the stand-in's as a tensor there, as torch.from_dlpack does on a card."""
    return from_dlpack(thing.__dlpack__()).as_subclass(StandInTensor)


class StandInBlock:
    """Shared memory of the stand-in."""

    is_file = False

    def __init__(self, shared, memory):
        self._shared, self._memory = shared, memory
        self.address, self.bytes = "stand-in:" + shared.address, StandInArray(shared.bytes, memory.device)
        memory.counts["open"] += 1

    def protect(self, start):
        raise OSError(errno.ENOTSUP, "a device's memory cannot be made read-only")

    def unlink(self):
        self._shared.unlink()

    def close(self):
        if self._shared.bytes.size:
            self._memory.counts["open"] -= 1
            self._shared.close()


class StandIn(Memory):
    """The stand-in's memory, for one process.

    Attributes:
        counts: Bytes "read" and "written" on the device, "in" and "out" of it; blocks "opened" and still "open".
        is_busy: Whether something was begun that `finish` has not waited for.
    """

    name = "stand-in:0"
    way = "stand-in"
    is_host = folds_early = False
    is_owned_by_root = True

    def __init__(self, device=HOST):
        self.device = device  # which its arrays say to be on
        self.counts = Counter()
        self.is_busy = False
        self._launcher = launcher()
        self.reducer = DeviceReducer(kernel.Kernels(self._launch, multiprocessors=2), self)

    def _launch(self, name, blocks, threads, argument):
        self.is_busy = True
        kind, _, element = name.rstrip(">").partition("<")
        self.counts[kind] += 1
        itemsize = _ITEMSIZES[element]
        wide = max(itemsize, 4)
        if kind == "pack":
            self.counts["read"] += argument.size * itemsize
            self.counts["written"] += argument.size * itemsize * bool(argument.target)
        elif kind == "squares":
            self.counts["read"] += argument.size * itemsize
        else:
            self.counts["read"] += argument.size * (argument.count * itemsize + wide * bool(argument.base))
            self.counts["read"] += argument.size * wide * (kind == "fused_sgd_step")
            self.counts["written"] += argument.size * wide
        self._launcher(name, blocks, threads, argument)

    def allocate(self, size_bytes):
        return StandInArray(aligned_bytes(size_bytes), self.device)

    def share(self, size_bytes, *, as_file=False):
        return StandInBlock(SharedMemory.create(size_bytes), self)

    def attach(self, address):
        kind, _, rest = address.partition(":")
        if kind != "stand-in":
            raise OSError(errno.EACCES, "memory of the root's device cannot be opened")
        self.counts["opened"] += 1
        return StandInBlock(SharedMemory.attach(rest), self)

    def copy(self, source, target):
        self.is_busy = True
        assert target.nbytes == source.nbytes
        for name, array in (("read", source), ("written", target)):
            if isinstance(array, StandInArray):
                self.counts[name] += array.nbytes
        if not isinstance(source, StandInArray):
            self.counts["in"] += source.nbytes
        if not isinstance(target, StandInArray):
            self.counts["out"] += source.nbytes
        bytes_of(target)[:] = bytes_of(source)

    def to_host(self, array):
        if not isinstance(array, StandInArray):
            return array
        self.finish()
        self.counts["out"] += array.nbytes
        return array._array.copy()

    def imported(self, thing):
        plain = thing.as_subclass(torch.Tensor) if isinstance(thing, torch.Tensor) else thing
        return StandInArray(np.from_dlpack(plain), self.device)

    def address(self, array):
        return bytes_of(array).ctypes.data

    def finish(self):
        self.is_busy = False


def bytes_of(array):
    plain = array._array if isinstance(array, StandInArray) else array
    return plain.reshape(-1).view(np.uint8)


@functools.cache
def launcher():
    """Build the kernels once for all processes of these tests."""
    sources = b"".join(path.read_bytes() for path in (kernel.SOURCE, host_kernel.SHIM, Path(host_kernel.__file__)))
    name = f"mpisync-kernels-{os.getuid()}-{hashlib.sha256(sources).hexdigest()[:16]}"
    folder = Path(tempfile.gettempdir(), name)
    folder.mkdir(mode=0o700, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "built").exists():
            host_kernel.built(folder)
            (folder / "built").touch()
    return host_kernel.loaded(folder / "kernels.so")
