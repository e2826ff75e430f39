"""Memory that processes share: opened and closed, its users killed; and what launches cost where many share a card."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import get_context
from typing import Any

import numpy as np

from mpisync.device.shared_memory import SharedMemory
from mpisync.kernels.dtypes import DTYPES
from on_card.card import Card, SkipStep, check, found, quantiles_us

_ANSWER_S = 40.0  # for a child to start, or to do what it was told
_MB = 1_000_000


class Child:
    """Another process with the same card, which does what it is told."""

    def __init__(self, *, stand_in: bool) -> None:
        context = get_context("spawn")  # CUDA does not survive a fork
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, stand_in), daemon=True)
        self.process.start()

    def tell(self, name: str, *arguments: Any) -> None:
        """Have it do something."""
        self._pipe.send((name, arguments))

    def answer(self) -> Any:
        """Return what it has found."""
        check(self._pipe.poll(_ANSWER_S), f"process {self.process.pid} has not answered for {_ANSWER_S:.0f} s")
        kind, value = self._pipe.recv()
        check(kind == "done", f"in another process: {value}")
        return value

    def ask(self, name: str, *arguments: Any) -> Any:
        """Have it do something, and return what it has found."""
        self.tell(name, *arguments)
        return self.answer()

    def kill(self) -> None:
        """End it at once."""
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(10.0)


@contextlib.contextmanager
def children(card: Card, count: int) -> Iterator[list[Child]]:
    """Start processes, all of which have their card when the block begins; end them after it."""
    started = [Child(stand_in=not card.is_real) for _ in range(count)]
    try:
        for child in started:
            child.ask("ready")
        yield started
    finally:
        for child in started:
            child.kill()


def _serve(pipe: Any, stand_in: bool) -> None:
    orders = Orders(Card(stand_in=stand_in))
    while True:
        name, arguments = pipe.recv()
        try:
            pipe.send(("done", getattr(orders, name)(*arguments)))
        except Exception as error:
            pipe.send(("failed", f"{type(error).__name__}: {error}"))


class Orders:
    """What a child can be told to do."""

    def __init__(self, card: Card) -> None:
        self._card, self._memory = card, card.memory
        self._blocks: list[Any] = []

    def ready(self) -> float:
        """Say how much of the card is free."""
        return float(self._memory.free_bytes())

    def open(self, address: str) -> float:
        """Attach a block; say how long that took."""
        began_s = time.perf_counter()
        self._blocks.append(self._memory.attach(address))
        return time.perf_counter() - began_s

    def close(self) -> float:
        """Let go of the last block; say how long that took."""
        block = self._blocks.pop()
        began_s = time.perf_counter()
        block.close()
        del block
        return time.perf_counter() - began_s

    def fill(self, value: int) -> float:
        """Write a byte all over the last block, from memory of its own; say how long that took."""
        target = self._blocks[-1].bytes
        own = self._card.array(np.full(target.nbytes, value, np.uint8))
        return self._card.seconds(lambda: self._memory.copy(own, target), 3)

    def cycle(self, address: str, times: int) -> tuple[float, float]:
        """Open and close a block again and again; say what is free on the card before and after."""
        self.open(address), self.close()
        before = self.ready()
        for _ in range(times):
            self.open(address), self.close()
        return before, self.ready()

    def copy_for_ever(self) -> None:
        """Write the last block until somebody ends this process."""
        target = self._blocks[-1].bytes
        own = self._card.array(np.full(target.nbytes, 7, np.uint8))
        while True:
            self._memory.copy(own, target)
            self._memory.finish()

    def share(self, size_bytes: int) -> str:
        """Share a block; say its address."""
        self._blocks.append(self._memory.share(size_bytes))
        return str(self._blocks[-1].address)

    def launches(self, times: int) -> list[float]:
        """Say how long launches of a small fold take, each until it is done."""
        return launches(self._card, times)

    def compute(self, for_s: float) -> int:
        """Keep the card busy as training does; say how many products of matrices that were."""
        import torch

        side = self._card.size(4096) if self._card.is_real else 64
        matrix, count = torch.ones(side, side, device=self._card.device), 0
        end_s = time.monotonic() + for_s
        while time.monotonic() < end_s:
            for _ in range(10):
                matrix @ matrix
            self._memory.finish()
            count += 10
        return count

    def pin(self, address: str) -> dict[str, float]:
        """Attach host memory; say what copies to and from it reach, before and after its pages are locked."""
        shared = SharedMemory.attach(address)
        here = self._memory.allocate(shared.bytes.nbytes)
        figures = {f"pageable_{name}": rate for name, rate in self._rates(here, shared.bytes).items()}
        began_s = time.perf_counter()
        unpin = self._memory.pin(shared.bytes)
        figures["pin_ms"] = round(1e3 * (time.perf_counter() - began_s), 3)
        if self._card.is_real:  # 1: known to CUDA as the host's
            attributes = self._memory._cupy.cuda.runtime.pointerGetAttributes(shared.bytes.ctypes.data)
            figures["is_pinned"] = float(attributes.type == 1)
        figures |= {f"pinned_{name}": rate for name, rate in self._rates(here, shared.bytes).items()}
        unpin()
        shared.close()
        return figures

    def _rates(self, here: Any, there: Any) -> dict[str, float]:
        moved, repeats = there.nbytes / 1e9, self._card.times(5)
        return {
            "out_gb_s": round(moved / self._card.seconds(lambda: self._memory.copy(here, there), repeats), 2),
            "in_gb_s": round(moved / self._card.seconds(lambda: self._memory.copy(there, here), repeats), 2),
        }


def launches(card: Card, times: int) -> list[float]:
    """Time launches of a small fold, each until the host knows that it is done."""
    size, kernels, memory = 16_384, card.memory.reducer._kernels, card.memory
    arrays = [card.array(np.ones(size, np.float32)) for _ in range(5)]
    target, *places = [memory.address(array) for array in arrays]
    took = []
    for _ in range(times):
        began_s = time.perf_counter()
        kernels.fold(target, places, size, DTYPES["float32"], start=True, divisor=4.0)
        memory.finish()
        took.append(time.perf_counter() - began_s)
    return took


def ipc(card: Card) -> None:
    """Open blocks of three sizes from another process, twice, write to them, and close them; many times."""
    memory = card.memory
    with children(card, 1) as (child,):
        for name, real in {"2mib": 2 << 20, "100mb": 100 * _MB, "4gb": 4000 * _MB}.items():
            began_s = time.perf_counter()
            block = memory.share(card.size(real))
            share_s = time.perf_counter() - began_s
            figures = {"share": share_s, "open": child.ask("open", block.address)}
            if card.is_real:  # the stand-in keeps its file open once
                figures["second_open"] = child.ask("open", block.address)
                figures["second_close"] = child.ask("close")
            figures["fill"] = child.ask("fill", 5)
            check(bool((memory.to_host(block.bytes) == 5).all()), f"{name}: what was written is not what is read")
            figures["close"] = child.ask("close")
            found(**{f"{name}_ms": {what: round(1e3 * took_s, 4) for what, took_s in figures.items()}})
            before, after = child.ask("cycle", block.address, card.times(100 if real < 1e9 else 10))
            if card.is_real:
                found(**{f"{name}_lost_bytes": before - after})
                check(before - after < 32 << 20, f"{name}: {before - after} bytes are lost by opening and closing")
            block.close()
            del block


def kills(card: Card) -> None:
    """Kill processes in the midst of a copy to the root's memory; the root goes on. Then kill who shares."""
    memory, times = card.memory, card.times(10)
    block, delays = memory.share(card.size(400 * _MB)), []
    with children(card, times + 1) as (sharing, *copying):
        for child in copying:
            child.ask("open", block.address)
            child.tell("copy_for_ever")
        time.sleep(0.5)
        for number, child in enumerate(copying):
            child.kill()
            began_s = time.perf_counter()
            took_s = max(launches(card, 20))
            other = memory.share(card.size(2 << 20))
            memory.copy(np.full(other.bytes.nbytes, number, np.uint8), other.bytes)
            check(bool((memory.to_host(other.bytes) == number).all()), "the root reads what it has not written")
            other.close()
            delays.append(time.perf_counter() - began_s)
            found(killed=number + 1, slowest_launch_ms=round(1e3 * took_s, 3))
        found(**{f"after_a_kill_{name}": value for name, value in quantiles_us(delays).items()})
        check(bool((memory.to_host(block.bytes) == 7).any()), "nobody was killed in the midst of a copy")
        own = memory.attach(sharing.ask("share", card.size(2 << 20)))
        sharing.kill()
        try:  # nobody promises anything here: what happens is to be known
            memory.copy(np.ones(own.bytes.nbytes, np.uint8), own.bytes)
            memory.finish()
            found(after_the_owner_died="its memory can be written to still")
        except Exception as error:
            found(after_the_owner_died=f"{type(error).__name__}: {error}")


def latency(card: Card) -> None:
    """Time launches in 1, 4 and 8 processes at a time, and in one while others keep the card busy."""
    times = card.times(300)
    most = 8 if card.is_real else 2
    with children(card, most) as all_of_them:
        for count in (1, 4, 8):
            some = all_of_them[:count]
            for child in some:
                child.tell("launches", times)
            took = [one for child in some for one in child.answer()]
            found(**{f"{count}_at_a_time": quantiles_us(took)})
        for count in (1, 3, 7):
            busy = all_of_them[1 : 1 + count]
            for child in busy:
                child.tell("compute", 2.0 if card.is_real else 0.1)
            time.sleep(0.2 if card.is_real else 0.0)
            took = all_of_them[0].ask("launches", min(times, 100))
            found(**{f"beside_{count}_busy": quantiles_us(took)}, products=[child.answer() for child in busy])


def pinned(card: Card) -> None:
    """Lock pages of memory that is shared on the host, in four processes, and copy to and from it."""
    with children(card, 4) as some:
        for kind in ("memfd", "file"):
            shared = SharedMemory.create(card.size(256 * _MB), as_file=kind == "file")
            try:
                found(memory=kind, alone=some[0].ask("pin", shared.address))
                break
            except AssertionError as error:  # a sandbox may keep processes from each other's descriptors
                found(**{f"not_by_{kind}": str(error)})
                shared.close()
        else:
            raise AssertionError("processes cannot share memory on the host")
        for child in some:
            child.tell("pin", shared.address)
        together = [child.answer() for child in some]
        found(together=together)
        shared.close()
        if card.is_real:
            check(all(one["is_pinned"] for one in together), "pages of shared memory are not locked in every process")


def mps(card: Card) -> None:
    """Time launches again under NVIDIA's Multi-Process Service, started for this step and ended with it."""
    control = shutil.which("nvidia-cuda-mps-control")
    if control is None or not card.is_real:
        raise SkipStep("nvidia-cuda-mps-control is not installed" if control is None else "the stand-in has no MPS")
    with tempfile.TemporaryDirectory() as folder:
        own = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
        for path in own.values():
            os.mkdir(path)
        environ = {**os.environ, **own}
        start = subprocess.run([control, "-d"], env=environ, capture_output=True, text=True, timeout=20)
        if start.returncode:
            raise SkipStep(f"MPS does not start here: {(start.stdout + start.stderr).strip()}")
        os.environ.update(own)  # for the children: this process has its card already
        try:
            latency(card)
        finally:
            quit_ = subprocess.run([control], input="quit\n", env=environ, capture_output=True, text=True, timeout=20)
            found(mps_ended=quit_.returncode)
