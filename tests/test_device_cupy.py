"""What CudaMemory asks of CuPy, as far as it goes without a driver; a card's own tests are `make gpu-test`."""

import ctypes
import functools
import re
from types import SimpleNamespace

import numpy as np
import pytest

from mpisync.device import cuda, kernel
from mpisync.device.compiler import compiled

cupy = pytest.importorskip("cupy", reason="CuPy is not installed; extra 'cuda13' brings it", exc_type=ImportError)


@functools.cache
def code(generation):
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:  # softlink's own kind
        pytest.skip(f"CuPy finds no NVRTC: {error}")
    return compiled(cupy.cuda.nvrtc, generation)


@pytest.mark.parametrize("generation", [90, 1000])
def test_kernels_are_compiled_with_their_own_options(generation):
    """Of a card that nobody knows yet the driver compiles the rest, from PTX."""
    found, symbols = code(generation)
    assert tuple(symbols) == kernel.NAMES and len(set(symbols.values())) == len(kernel.NAMES)
    assert found.startswith(b"\x7fELF" if generation == 90 else b"//")
    assert all(symbol.encode() in found for symbol in symbols.values())
    if generation == 1000:
        assert b".ftz" not in found, "subnormal numbers would be taken for 0"
        assert len(re.findall(rb"\b(?:add|mul|div|fma)\.rn\.f32\b", found)) > 100


def test_what_nvrtc_says_is_said(monkeypatch):
    code(90)
    monkeypatch.setattr("mpisync.device.compiler.OPTIONS", ("--no-such-option",))
    with pytest.raises(ValueError, match="(?s)NVRTC_ERROR_INVALID_OPTION.*no-such-option"):
        compiled(cupy.cuda.nvrtc, 80)


def test_torchs_stream_is_one_of_cupys():
    stream = cuda._in_cupy(cupy, SimpleNamespace(cuda_stream=0x7F00))  # a warning would be an error here
    assert stream.ptr == 0x7F00


def test_arrays_of_foreign_memory_are_located():
    owner = SimpleNamespace()
    whole = cupy.cuda.UnownedMemory(1 << 20, 1000, owner, 0)
    flat = cupy.ndarray(1000, np.uint8, cupy.cuda.MemoryPointer(whole, 0))
    part = flat[64:].view(np.dtype(np.float32))
    assert (part.data.ptr, part.size, part.nbytes, part.dtype) == ((1 << 20) + 64, 234, 936, np.float32)


def test_every_function_that_is_called_is_there():
    runtime = cupy.cuda.runtime
    for name in (
        "deviceGetPCIBusId", "free", "getDeviceCount", "hostRegister", "hostUnregister", "ipcCloseMemHandle",
        "ipcGetMemHandle", "ipcOpenMemHandle", "malloc", "memGetInfo", "memcpyAsync", "memsetAsync",
        "runtimeGetVersion", "setDevice",
    ):  # fmt: skip
        assert callable(getattr(runtime, name)), name
    assert issubclass(runtime.CUDARuntimeError, Exception)
    assert issubclass(cupy.cuda.memory.OutOfMemoryError, MemoryError)
    assert runtime.memcpyDefault == cuda._DEFAULT and runtime.cudaIpcMemLazyEnablePeerAccess == cuda._PEERS
    assert callable(cupy.cuda.function.Module().load) and callable(cupy.cuda.Event)


@pytest.mark.parametrize("kind", [kernel._Fold32, kernel._Fold64, kernel._Pack, kernel._Squares])
def test_a_kernels_argument_is_one_element_of_its_bytes(kind):
    """What CuPy passes by value: the address of an array of one element."""
    argument = kind(size=7)
    by_value = np.frombuffer(bytes(argument), np.dtype(kind))
    assert by_value.size == 1 and by_value.nbytes == ctypes.sizeof(kind) and by_value.tobytes() == bytes(argument)
