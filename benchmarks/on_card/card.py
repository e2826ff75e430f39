"""A step's card, or the tests' stand-in for one, and what a step says of it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MARK = "FOUND "  # before a line of figures, on standard output
TESTS = Path(__file__).resolve().parent.parent.parent / "tests"


class SkipStep(Exception):
    """A step that cannot be tried here; the text says why."""


def found(**figures: Any) -> None:
    """Say figures at once: what was found before a step hangs counts."""
    print(MARK + json.dumps(figures), flush=True)


def check(is_right: bool, text: str) -> None:
    """End the step as failed where something is not right."""
    if not is_right:
        raise AssertionError(text)


class Card:
    """The first card, as mpisync uses it; with `stand_in` the host's memory in its place, and small sizes.

    Attributes:
        memory: mpisync's.
        device: torch's name of it.
        is_real: Whether it is a card.
    """

    def __init__(self, *, stand_in: bool) -> None:
        self.is_real = not stand_in
        if stand_in:
            sys.path.insert(0, str(TESTS))
            from stand_in import StandIn

            self.memory: Any = StandIn()
            self.device = "cpu"
        else:
            from mpisync.device.cuda import CudaMemory

            self.memory = CudaMemory(0)
            self.device = "cuda:0"

    def size(self, real: int) -> int:
        """Return a size for a card, or a small one in its place."""
        return real if self.is_real else min(real, 4096)

    def times(self, real: int) -> int:
        """Return how often to do something."""
        return real if self.is_real else min(real, 3)

    def array(self, values: np.ndarray, offset: int = 0) -> Any:
        """Return a copy on the card, which begins so many elements behind an aligned address."""
        begin = offset * values.itemsize
        array = self.memory.allocate(begin + max(values.nbytes, 1))[begin : begin + values.nbytes].view(values.dtype)
        self.memory.copy(values, array)
        return array

    def blank(self, size: int, dtype: Any) -> Any:
        """Return zeros on the card."""
        return self.memory.allocate(size * np.dtype(dtype).itemsize).view(np.dtype(dtype))

    def tensor(self, array: Any, dtype: str) -> Any:
        """Return an array as a tensor that shares its memory."""
        from mpisync.model.tensor_layout import tensor_of

        return tensor_of(array, dtype)

    def seconds(self, action: Callable[[], Any], repeats: int) -> float:
        """Return how long an action takes, many in a row and one wait at the end."""
        action()
        self.memory.finish()
        began_s = time.perf_counter()
        for _ in range(repeats):
            action()
        self.memory.finish()
        return (time.perf_counter() - began_s) / repeats

    def patch_sessions(self) -> None:
        """Have sessions take the stand-in for the model's memory, where this is one."""
        if not self.is_real:
            from mpisync.session import distributed_model

            distributed_model.memory_of = lambda model: self.memory


def quantiles_us(times_s: list[float]) -> dict[str, float]:
    """Return the median and the 99th percentile in microseconds."""
    p50, p99 = np.percentile(np.asarray(times_s) * 1e6, [50, 99])
    return {"p50_us": round(float(p50), 1), "p99_us": round(float(p99), 1)}
