"""As much of CuPy and torch.cuda as CudaMemory asks for, on the host's memory, and as strict as theirs.

Blocks that processes share are memfds, so that whole sessions run on CudaMemory itself. Kernels are `fold.cu` as C++.
"""

import contextlib
import ctypes
import os
import struct
from types import SimpleNamespace

import numpy as np
from stand_in import StandInArray, launcher

from mpisync.device import kernel
from mpisync.device.host import aligned_bytes
from mpisync.device.shared_memory import SharedMemory

_HANDLE = struct.Struct("<qq16sq24x")  # 64 bytes: the process and its descriptor, a nonce, a size
_ARGUMENTS = {"squares": kernel._Squares, "pack": kernel._Pack}


class CUDARuntimeError(RuntimeError):
    pass


class OutOfMemoryError(MemoryError):
    pass


class Array(StandInArray):
    def __getitem__(self, part):
        return Array(super().__getitem__(part)._array)

    def view(self, dtype):
        return Array(self._array.view(dtype))

    @property
    def data(self):
        return SimpleNamespace(ptr=self._array.ctypes.data)


class Runtime:
    """Blocks, by their addresses; whatever gets something else than integers and bytes raises."""

    CUDARuntimeError = CUDARuntimeError

    def __init__(self):
        self.cards, self.version, self.device, self.free_bytes = 2, 13020, 0, 1 << 33
        self.shared, self.opened, self.registered = {}, {}, {}
        self.fails = ""  # the name of a function
        self.moved = []  # streams of copies

    def _do(self, name, *integers):
        assert all(type(value) is int for value in integers), (name, integers)
        if self.fails == name:
            raise CUDARuntimeError(f"cudaErrorUnknown: {name}")

    def getDeviceCount(self):
        return self.cards

    def runtimeGetVersion(self):
        return self.version

    def setDevice(self, index):
        self._do("setDevice", index)
        self.device = index

    def memGetInfo(self):
        return self.free_bytes, 1 << 34

    def malloc(self, size):
        self._do("malloc", size)
        assert size % (2 << 20) == 0
        block = SharedMemory.create(size)
        self.shared[block.bytes.ctypes.data] = block
        return block.bytes.ctypes.data

    def free(self, pointer):
        self._do("free", pointer)
        self.shared.pop(pointer).close()

    def ipcGetMemHandle(self, pointer):
        self._do("ipcGetMemHandle", pointer)
        where, nonce, size = self.shared[pointer].address.rsplit("?", 2)
        _, _, pid, _, fd = where.split("/")
        return _HANDLE.pack(int(pid), int(fd), bytes.fromhex(nonce), int(size))

    def ipcOpenMemHandle(self, handle, flags):
        self._do("ipcOpenMemHandle", flags)
        assert type(handle) is bytes and len(handle) == 64 and flags == 1
        pid, fd, nonce, size = _HANDLE.unpack(handle)
        if pid == os.getpid():
            raise CUDARuntimeError("cudaErrorDeviceUninitialized: invalid device context")
        block = SharedMemory.attach(f"/proc/{pid}/fd/{fd}?{nonce.hex()}?{size}")
        self.opened[block.bytes.ctypes.data] = block
        return block.bytes.ctypes.data

    def ipcCloseMemHandle(self, pointer):
        self._do("ipcCloseMemHandle", pointer)
        self.opened.pop(pointer).close()

    def memsetAsync(self, pointer, value, size, stream):
        self._do("memsetAsync", pointer, value, size, stream)
        ctypes.memset(pointer, value, size)

    def memcpyAsync(self, target, source, size, kind, stream):
        self._do("memcpyAsync", target, source, size, kind, stream)
        assert kind == 4
        self.moved.append(stream)
        ctypes.memmove(target, source, size)

    def hostRegister(self, start, size, flags):
        self._do("hostRegister", start, size, flags)
        assert start % 4096 == size % 4096 == flags == 0
        self.registered[start] = size

    def hostUnregister(self, start):
        self._do("hostUnregister", start)
        del self.registered[start]


class Nvrtc:
    NVRTCError = RuntimeError

    def getSupportedArchs(self):
        return (75, 80, 90)

    def createProgram(self, source, name, headers, names):
        return 1

    def getLoweredName(self, program, name):
        return f"_Z{name}"

    def getCUBIN(self, program):
        return b"\x7fELF"

    addNameExpression = compileProgram = destroyProgram = lambda self, *_: None


class Module:
    def load(self, code):
        assert code == b"\x7fELF"

    def get_function(self, symbol):
        name = symbol.removeprefix("_Z")
        wide = kernel._Fold64 if "double" in name else kernel._Fold32
        kind = _ARGUMENTS.get(name.partition("<")[0], wide)

        def launch(grid, block, arguments):
            (by_value,) = arguments
            assert type(grid) is type(block) is tuple and by_value.size == 1
            launcher()(name, *grid, *block, kind.from_buffer_copy(by_value.tobytes()))

        return launch


class Event:
    def __init__(self, block, disable_timing):
        assert block and disable_timing

    record = synchronize = lambda self: None


class Stream:
    now = []  # those that are current

    @classmethod
    def from_external(cls, other):
        stream = cls()
        version, stream.ptr = other.__cuda_stream__()
        assert version == 0
        return stream

    def __enter__(self):
        self.now.append(self.ptr)

    def __exit__(self, *_):
        self.now.pop()


def installed(patch):
    """Have CudaMemory find these in CuPy's and torch's place; return the runtime."""
    runtime = Runtime()

    def foreign(size, dtype, pointer):
        assert pointer.size == size
        raw = (ctypes.c_uint8 * size).from_address(pointer.pointer)
        raw.owner = pointer.owner  # an array keeps what it looks into
        return Array(np.frombuffer(raw, dtype))

    def zeros(size, dtype):
        if size > runtime.free_bytes:
            raise OutOfMemoryError(size)
        assert Stream.now, "in torch's stream"
        return Array(aligned_bytes(size).view(dtype))

    cuda = SimpleNamespace(
        runtime=runtime, nvrtc=Nvrtc(), Stream=Stream, Event=Event, function=SimpleNamespace(Module=Module),
        memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
        UnownedMemory=lambda pointer, size, owner, index: SimpleNamespace(pointer=pointer, size=size, owner=owner),
        MemoryPointer=lambda memory, offset: memory,
    )  # fmt: skip

    @contextlib.contextmanager
    def device(index):
        before, runtime.device = runtime.device, index
        yield
        runtime.device = before

    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=2, uuid="0123-45")
    patch.setitem(__import__("sys").modules, "cupy", SimpleNamespace(cuda=cuda, zeros=zeros, ndarray=foreign))
    patch.setattr("torch.version.cuda", "13.0")
    patch.setattr("torch.cuda.current_stream", lambda index: SimpleNamespace(cuda_stream=0x70 + index))
    patch.setattr("torch.cuda.device", device)
    patch.setattr("torch.cuda.get_device_properties", lambda index: properties)
    return runtime
