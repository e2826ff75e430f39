"""The kernel that folds gradients beside what the machine itself can move."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mpisync.kernels.dtypes import DTYPES
from mpisync.kernels.fold import Reducer, warm

_KERNEL_ELEMENTS = 25_000_000


def _on_threads(action: Callable[[slice], object], elements: int, threads: int) -> None:
    """Run `action` on equal parts, a thread each."""
    edges = np.linspace(0, elements, threads + 1).astype(int)
    parts = [slice(*edge) for edge in zip(edges, edges[1:], strict=False)]
    helpers = [threading.Thread(target=action, args=(part,)) for part in parts[1:]]
    for helper in helpers:
        helper.start()
    action(parts[0])
    for helper in helpers:
        helper.join()


def bandwidth(threads: int) -> dict[str, Any]:
    """Measure bytes read and written a second: folding four gradients, NumPy's copy, its add."""
    gradients = [np.ones(_KERNEL_ELEMENTS, np.float32) for _ in range(4)]
    target = np.ones(_KERNEL_ELEMENTS, np.float32)
    a, b = gradients[:2]
    warm(["float32"])
    found: dict[str, list[float]] = {"fold": [], "copy": [], "add": []}
    with Reducer(threads) as reducer:
        actions: dict[str, tuple[int, Callable[[], Any]]] = {
            "fold": (
                5,
                lambda: reducer.fold(target, gradients, DTYPES["float32"], start=True, divisor=4.0),
            ),
            "copy": (
                2,
                lambda: _on_threads(lambda p: np.copyto(target[p], a[p]), a.size, threads),
            ),
            "add": (
                3,
                lambda: _on_threads(lambda p: np.add(a[p], b[p], out=target[p]), a.size, threads),
            ),
        }
        for _ in range(9):
            for name, (arrays, action) in actions.items():
                begin = time.perf_counter()
                action()
                found[name].append(arrays * a.nbytes / (time.perf_counter() - begin) / 1e9)
    middle = {name: round(statistics.median(each), 2) for name, each in found.items()}
    own = max(middle["copy"], middle["add"])
    return {"threads": threads, "GB_per_s": middle, "fold_of_own": round(middle["fold"] / own, 3)}
