"""A card's memory, in CuPy arrays: own, or shared with other processes by CUDA's inter-process handles.

Everything runs in torch's current stream of the card, so that what torch computed before is done before, and what it
computes next sees it. Memory that is shared is the root's, by plain cudaMalloc: a pool's would be shared whole, and a
worker's would go with the worker. Cards are known by their UUID: each process numbers those that it may see anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mpisync.device.base import ALIGNMENT, Array, Memory, aligned
from mpisync.device.compiler import compiled
from mpisync.device.kernel import Kernels
from mpisync.device.reducer import DeviceReducer

_NONCE_BYTES = ALIGNMENT  # a random prefix: whoever attaches proves that it reached the right memory
_BLOCK_BYTES = 2 << 20  # smaller allocations are parts of one, and the whole of it would be shared
_DEFAULT = 4  # cudaMemcpyDefault: addresses tell where they are
_PEERS = 1  # cudaIpcMemLazyEnablePeerAccess


class CudaMemory(Memory):
    """The memory of one card, as this process numbers it.

    Args:
        index: The card's number.

    Raises:
        ValueError: There is no such card, or CuPy cannot work with it.
    """

    way = "CUDA IPC"
    is_host = folds_early = False  # a card folds all gradients of a step in less time than a pass more takes to begin
    is_owned_by_root = True

    def __init__(self, index: int) -> None:
        self._cupy: Any = _cupy()
        self.index, self.name = index, f"cuda:{index}"
        if not 0 <= index < (cards := self._cupy.cuda.runtime.getDeviceCount()):
            raise ValueError(f"there is no {self.name}: this process sees {cards} cards, numbered from 0")
        try:
            self._prepare()
        except Exception as error:  # of many kinds: torch's, CuPy's, and of what loads libraries for it
            raise ValueError(f"{self.name} cannot be used: {error}") from error

    def _prepare(self) -> None:
        """Get the kernels ready to be launched."""
        import torch

        properties = torch.cuda.get_device_properties(self.index)
        # not CuPy's "uuid", which ends where a byte of it is 0; torch 2.4 has none
        self.uuid = str(getattr(properties, "uuid", "")) or self._cupy.cuda.runtime.deviceGetPCIBusId(self.index)
        try:
            code, symbols = compiled(self._cupy.cuda.nvrtc, 10 * properties.major + properties.minor)
        except Exception as error:
            raise ValueError(f"CuPy cannot compile ({error}); pip install 'mpisync[cuda{_cuda()}]'") from error
        with self._stream():
            module = self._cupy.cuda.function.Module()
            module.load(code)
            self._functions = {name: module.get_function(symbol) for name, symbol in symbols.items()}
        self.reducer: DeviceReducer = DeviceReducer(Kernels(self._launch, properties.multi_processor_count), self)

    @contextlib.contextmanager
    def _stream(self) -> Iterator[int]:
        """Have CuPy work on this card, in torch's stream, whose handle this yields."""
        import torch

        stream = torch.cuda.current_stream(self.index)
        # torch's guard and not CuPy's, which would go back to the card before even if this process has nothing there:
        # that would make a context on it, of some hundred MB
        with torch.cuda.device(self.index):
            self._cupy.cuda.runtime.setDevice(self.index)  # CuPy has a CUDA runtime of its own
            with _in_cupy(self._cupy, stream):
                yield stream.cuda_stream

    def _launch(self, name: str, blocks: int, threads: int, argument: ctypes.Structure) -> None:
        by_value = np.frombuffer(bytes(argument), np.dtype(type(argument)))
        with self._stream():
            self._functions[name]((blocks,), (threads,), (by_value,))

    def free_bytes(self) -> float:
        """Return how much of the card's memory nobody has."""
        with self._stream():
            return float(self._cupy.cuda.runtime.memGetInfo()[0])

    def allocate(self, size_bytes: int) -> Array:
        """Return zeroed bytes of this process's own."""
        try:
            with self._stream():
                return self._cupy.zeros(size_bytes, np.uint8)
        except self._cupy.cuda.memory.OutOfMemoryError as error:
            raise MemoryError(self._missing(size_bytes)) from error

    def _missing(self, size_bytes: int) -> str:
        return f"{size_bytes / 1e6:.1f} MB wanted on {self.name}, which has {self.free_bytes() / 1e6:.1f} MB free"

    def share(self, size_bytes: int, *, as_file: bool = False) -> CudaBlock:
        """Return zeroed bytes that other processes of this node can attach by their address."""
        runtime, whole = self._cupy.cuda.runtime, aligned(size_bytes + _NONCE_BYTES, _BLOCK_BYTES)
        nonce = secrets.token_bytes(_NONCE_BYTES)
        try:
            with self._stream() as stream:
                pointer = runtime.malloc(whole)
                block = CudaBlock(self, pointer, size_bytes, runtime.free)
                runtime.memsetAsync(pointer, 0, whole, stream)
        except runtime.CUDARuntimeError as error:
            raise OSError(errno.ENOMEM, f"{self._missing(whole)} ({error})") from error
        try:
            with self._stream():
                handle = runtime.ipcGetMemHandle(pointer)
            self.copy(np.frombuffer(nonce, np.uint8), block.nonce)
            self.finish()
        except runtime.CUDARuntimeError as error:  # parts of cards (MIG) and some containers have none
            raise OSError(errno.ENOTSUP, f"{self.name} shares no memory by CUDA IPC: {error}") from error
        block.address = f"{self.uuid}?{bytes(handle).hex()}?{nonce.hex()}?{size_bytes}"
        return block

    def attach(self, address: str) -> CudaBlock:
        """Return the bytes that another process shares, on this card or on one that it reaches."""
        runtime = self._cupy.cuda.runtime
        uuid, handle, nonce, size = address.split("?")
        try:
            with self._stream():
                pointer = runtime.ipcOpenMemHandle(bytes.fromhex(handle), _PEERS)
            block = CudaBlock(self, pointer, int(size), runtime.ipcCloseMemHandle)
            found = self.to_host(block.nonce).tobytes()
        except runtime.CUDARuntimeError as error:
            where = "" if uuid == self.uuid else f", which {self.name} does not reach"
            raise OSError(errno.EACCES, f"memory of the root's card{where} cannot be opened: {error}") from error
        block.address = address
        if found != bytes.fromhex(nonce):
            raise OSError(errno.ESTALE, f"{self.name} does not read what the root has written to its card")
        return block

    def copy(self, source: Array, target: Array) -> None:
        """Copy contiguous bytes; one of the two may be the host's."""
        with self._stream() as stream:
            self._cupy.cuda.runtime.memcpyAsync(
                self.address(target), self.address(source), target.nbytes, _DEFAULT, stream
            )

    def to_host(self, array: Array) -> np.ndarray:
        """Return what an array holds, when all before is done."""
        if isinstance(array, np.ndarray):
            return array
        found = np.empty(array.shape, array.dtype)
        self.copy(array, found)
        self.finish()
        return found

    def imported(self, thing: Any) -> Array:
        """Return an array that looks into another library's, ordered behind what that has begun."""
        import torch
        from torch.utils.dlpack import from_dlpack

        # torch's stream waits for the library's own, which for CuPy's arrays is CuPy's of this moment: ask before it is
        # changed
        with torch.cuda.device(self.index):
            tensor = from_dlpack(thing)
        with self._stream():
            return self._cupy.from_dlpack(tensor)

    def address(self, array: Array) -> int:
        """Return where an array begins."""
        return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)

    def finish(self) -> None:
        """Sleep until what was begun in torch's stream is done."""
        with self._stream():
            event = self._cupy.cuda.Event(block=True, disable_timing=True)
            event.record()
            event.synchronize()

    def pin(self, array: np.ndarray) -> Callable[[], None]:
        """Lock the pages of host memory that hold an array; where that cannot be, copies are slower, and right."""
        page, runtime = os.sysconf("SC_PAGESIZE"), self._cupy.cuda.runtime
        start = array.ctypes.data // page * page
        try:
            with self._stream():
                runtime.hostRegister(start, aligned(array.ctypes.data + array.nbytes - start, page), 0)
        except runtime.CUDARuntimeError:
            return super().pin(array)

        def unpin() -> None:
            with self._stream(), contextlib.suppress(runtime.CUDARuntimeError):
                runtime.hostUnregister(start)

        return unpin


class CudaBlock:
    """A block of a card's memory that processes share.

    It is given back when nothing looks into it any more, in the process that has it: a child that was forked never
    does.

    Attributes:
        bytes: uint8, a CuPy array.
        address: Text.
        nonce: What stands before them.
    """

    is_file = False

    def __init__(self, memory: CudaMemory, pointer: int, size_bytes: int, give_back: Any) -> None:
        cupy = _cupy()
        owner = _Owner(memory, pointer, give_back)
        whole = cupy.cuda.UnownedMemory(pointer, size_bytes + _NONCE_BYTES, owner, memory.index)
        flat = cupy.ndarray(size_bytes + _NONCE_BYTES, np.uint8, cupy.cuda.MemoryPointer(whole, 0))
        self.nonce, self.bytes = flat[:_NONCE_BYTES], flat[_NONCE_BYTES:]
        self.address = ""

    def protect(self, start: int) -> None:
        """Refuse: a card's memory that was opened can be written to."""
        raise OSError(errno.ENOTSUP, "a card's memory cannot be made read-only")

    def unlink(self) -> None:
        """Do nothing: it has no name."""

    def close(self) -> None:
        """Let go of the memory."""
        self.nonce = self.bytes = np.empty(0, np.uint8)


class _Owner:
    """What keeps a block, and gives it back when the last array has let go."""

    def __init__(self, memory: CudaMemory, pointer: int, give_back: Any) -> None:
        self._memory, self._pointer, self._give_back, self._pid = memory, pointer, give_back, os.getpid()

    def __del__(self) -> None:
        if os.getpid() == self._pid:
            with contextlib.suppress(Exception), self._memory._stream():  # at exit CUDA may be gone
                self._give_back(self._pointer)


class _Torchs:
    """A stream of torch's, as CuPy asks for it."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle  # the protocol's version


def _in_cupy(cupy: Any, stream: Any) -> Any:
    """Return torch's stream as one of CuPy's, for the current card."""
    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_Torchs(stream.cuda_stream))
    return cupy.cuda.ExternalStream(stream.cuda_stream)  # until CuPy 14, where it warns


def _cuda() -> str:
    """Return the CUDA that torch was built with, "13"; "" where it was built without."""
    import torch

    return str(torch.version.cuda or "").partition(".")[0]


@functools.cache
def _cupy() -> Any:
    """Return CuPy.

    Raises:
        ValueError: It is missing, of another CUDA than torch, or finds no card.
    """
    if not (wanted := _cuda()):
        raise ValueError("what is on a card needs a torch that was built with CUDA, and this one was not")
    try:
        import cupy
    except ImportError:
        raise ValueError(
            f"gradients on a card are reduced by CuPy, which is missing: pip install 'mpisync[cuda{wanted}]'"
        ) from None
    try:
        found = str(cupy.cuda.runtime.runtimeGetVersion() // 1000)
        cards = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # the driver is missing or old
        raise ValueError(f"CuPy cannot use CUDA here: {error}; `mpisync doctor` shows what it finds") from error
    if found != wanted:
        raise ValueError(
            f"CuPy is of CUDA {found} and torch of CUDA {wanted}, and one process cannot use both: "
            f"pip install 'mpisync[cuda{wanted}]', and uninstall the other CuPy"
        )
    if not cards:
        raise ValueError("CUDA shows this process no card: see CUDA_VISIBLE_DEVICES, and the job's --gpus")
    return cupy
