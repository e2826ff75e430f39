"""CudaMemory itself, on a CuPy and a torch.cuda of the tests': what it asks for, what it gives back, what it says."""

import gc
import os
import sys

import fake_cupy
import numpy as np
import pytest
from test_device_session import BATCHES, loss_of
from training import WORKERS, flat, new_model, on_union, sgd, train

from mpisync.device import compiler, cuda
from mpisync.kernels.dtypes import DTYPES
from mpisync.session import distributed_model


@pytest.fixture
def runtime(monkeypatch):
    cuda._cupy.cache_clear()
    compiler.compiled.cache_clear()
    yield fake_cupy.installed(monkeypatch)
    cuda._cupy.cache_clear()
    compiler.compiled.cache_clear()


def test_arrays_go_to_a_card_and_back(runtime):
    memory = cuda.CudaMemory(1)
    array = memory.allocate(400).view(np.dtype(np.float32))
    assert memory.name == "cuda:1" and not memory.to_host(array).any()
    memory.copy(np.arange(100, dtype=np.float32), array)
    part = memory.to_host(array[50:])
    assert part.tolist() == list(range(50, 100)) and memory.address(array[50:]) == memory.address(array) + 200
    assert set(runtime.moved) == {0x71} and runtime.device == 0 and not fake_cupy.Stream.now
    assert memory.reducer.peak(array, DTYPES["float32"]) == 99


@pytest.mark.parametrize(
    ("fails", "number", "says"),
    [
        ("malloc", 12, "2.1 MB wanted on cuda:0, which has 8589.9 MB free (cudaErrorUnknown: malloc)"),
        ("ipcGetMemHandle", 95, "cuda:0 shares no memory by CUDA IPC: cudaErrorUnknown: ipcGetMemHandle"),
        ("memcpyAsync", 95, "cuda:0 shares no memory by CUDA IPC: cudaErrorUnknown: memcpyAsync"),
    ],
)
def test_memory_that_cannot_be_shared_is_an_oserror_and_is_given_back(runtime, fails, number, says):
    memory = cuda.CudaMemory(0)
    runtime.fails = fails
    with pytest.raises(OSError) as caught:
        memory.share(1000)
    assert (caught.value.errno, caught.value.strerror) == (number, says)
    del caught
    gc.collect()
    assert not runtime.shared


def test_a_block_is_given_back_with_the_last_array_and_by_its_own_process_only(runtime):
    memory = cuda.CudaMemory(0)
    block = memory.share(1000)
    part = block.bytes[10:20]
    if (child := os.fork()) == 0:
        del block, part
        gc.collect()
        os._exit(len(runtime.shared))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1, "a child does not free what is its parent's"
    block.close()
    gc.collect()
    assert len(runtime.shared) == 1
    del part
    gc.collect()
    assert not runtime.shared


def attached(runtime, memory, address):
    """Attach in another process, and return its words."""
    out, into = os.pipe()
    if os.fork() == 0:
        try:
            block = memory.attach(address)
            memory.copy(np.full(5, 7, np.uint8), block.bytes[:5])
            said = "" if len(runtime.opened) == 1 else "it is not open"
            block.close()
            del block
            gc.collect()
            said += "it is still open" if runtime.opened else ""
        except OSError as error:
            said = str(error.strerror)
        os.write(into, f"{said}\n".encode())
        os._exit(0)
    with open(out) as file:
        os.close(into)
        return file.read().strip()


def test_another_process_opens_a_block_and_closes_it(runtime):
    memory = cuda.CudaMemory(0)
    block = memory.share(1000)
    assert attached(runtime, memory, block.address) == ""
    assert memory.to_host(block.bytes)[:6].tolist() == [7] * 5 + [0]
    uuid, handle, nonce, size = block.address.split("?")
    assert (uuid, len(handle), len(nonce), size) == ("0123-45", 128, 128, "1000")
    wrong = "?".join([uuid, handle, "00" * 64, size])
    assert attached(runtime, memory, wrong) == "cuda:0 does not read what the root has written to its card"
    runtime.fails = "ipcOpenMemHandle"
    said = attached(runtime, memory, "?".join(["another", handle, nonce, size]))
    assert said.startswith("memory of the root's card, which cuda:0 does not reach cannot be opened: cudaError")
    runtime.fails = "memcpyAsync"
    assert attached(runtime, memory, block.address).startswith("memory of the root's card cannot be opened: cudaError")


def test_pages_are_locked_where_they_can_be(runtime):
    memory, array = cuda.CudaMemory(0), np.zeros(10_000, np.uint8)
    unpin = memory.pin(array[100:])
    ((start, size),) = runtime.registered.items()
    assert start <= array.ctypes.data + 100 and array.ctypes.data + array.nbytes <= start + size
    unpin()
    assert not runtime.registered
    runtime.fails = "hostRegister"
    memory.pin(array)()


def test_what_keeps_a_card_from_being_used_is_a_sentence(runtime, monkeypatch):
    def refused(match, index=0):
        cuda._cupy.cache_clear()
        compiler.compiled.cache_clear()
        with pytest.raises(ValueError, match=match):
            cuda.CudaMemory(index)

    refused("there is no cuda:2: this process sees 2 cards, numbered from 0", index=2)
    with monkeypatch.context() as patch:
        patch.setattr(fake_cupy.Nvrtc, "createProgram", lambda *_: 1 / 0)
        refused(r"cuda:0 cannot be used: CuPy cannot compile \(division by zero\); pip install 'mpisync\[cuda13\]'")
    with monkeypatch.context() as patch:
        patch.setattr(fake_cupy.Module, "load", lambda *_: 1 / 0)
        refused("cuda:0 cannot be used: division by zero$")
    runtime.version = 12090
    refused(r"CuPy is of CUDA 12 and torch of CUDA 13, .* pip install 'mpisync\[cuda13\]', and uninstall the other")
    runtime.version, runtime.cards = 13000, 0
    refused("CUDA shows this process no card")
    monkeypatch.setitem(sys.modules, "cupy", None)
    refused(r"CuPy, which is missing: pip install 'mpisync\[cuda13\]'")
    monkeypatch.setattr("torch.version.cuda", None)
    refused("needs a torch that was built with CUDA")


def test_what_is_missing_is_said(runtime):
    memory = cuda.CudaMemory(0)
    runtime.free_bytes = 100
    with pytest.raises(MemoryError, match="1.0 MB wanted on cuda:0, which has 0.0 MB free"):
        memory.allocate(1_000_000)


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("root_device", ["auto", "cpu"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sessions_run_on_it_and_give_everything_back(comm, monkeypatch, runtime, root_device, momentum):
    monkeypatch.setenv("MPISYNC_DEVICE", root_device)
    monkeypatch.setattr(distributed_model, "memory_of", lambda model: cuda.CudaMemory(0))
    for _ in range(2):
        model, twin = new_model(), new_model()
        verdicts, session = train(comm, model, sgd(model, momentum=momentum), 6, BATCHES)
        on_union(twin, sgd(twin, momentum=momentum), BATCHES, loss_of)
        assert all(verdict.accepted for verdict in verdicts)
        assert np.abs(flat(model) - flat(twin)).max() < 1e-6
        is_root = session.worker is None
        del session, verdicts
    gc.collect()
    assert not runtime.shared and not runtime.opened and not runtime.registered
    assert set(runtime.moved) == ({0x70} if root_device == "auto" or not is_root else set())


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize(("who", "fails"), [(0, "ipcOpenMemHandle"), (WORKERS, "ipcGetMemHandle")])
def test_without_ipc_gradients_come_to_the_host(comm, monkeypatch, runtime, capfd, who, fails):
    monkeypatch.setattr(distributed_model, "memory_of", lambda model: cuda.CudaMemory(0))
    runtime.fails = fails if comm.rank == who else ""
    model = new_model()
    verdicts, _ = train(comm, model, sgd(model), 6, BATCHES)
    assert all(verdict.accepted for verdict in verdicts)
    if comm.rank == WORKERS:
        said = capfd.readouterr().err
        assert "not all workers reach cuda:0, which is the root's" in said and fails in said, said
