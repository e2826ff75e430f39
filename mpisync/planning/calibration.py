"""What messages and the root cost, taken from measurements: a benchmark's, or a run's own record."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mpisync.planning.costs import INLINE_BYTES, Costs
from mpisync.records import StepRecord

__all__ = ["costs_from_benchmark", "costs_from_records"]

_PARTS = ("reduce", "update", "publish")


def costs_from_benchmark(result: Mapping[str, Any], gradient_bytes: int, method: str = "shared") -> Costs:
    """Take the costs on one node from what benchmarks/collective.py measured.

    Between the sizes that were measured everything is interpolated. What a round took beyond reduce,
    update and publication is the root's work for its headers; with `messages` that is so for the
    smallest size if gradients ride in their headers there, and what more it is for others is the
    bytes on the link, there and back.

    Args:
        result: The object in the benchmark's last line.
        gradient_bytes: The size to be simulated.
        method: `shared`, or `messages` for workers without shared memory.

    Raises:
        ValueError: This method was not measured.

    Example:
        >>> parts = {"reduce": 15.0, "update": 9.0, "publish": 1.0}
        >>> size = {"ms": {"mpisync shared": {"p50": 26.0, "root": parts}}}
        >>> costs = costs_from_benchmark({"settings": {"workers": 4}, "sizes": {"100000000": size}}, 10**8)
        >>> [round(seconds, 6) for seconds in (costs.pass_s(4), costs.update_s, 4 * costs.header_s)]
        [0.015, 0.009, 0.001]
    """
    name, workers = f"mpisync {method}", int(result["settings"]["workers"])
    found = {int(size): each["ms"][name] for size, each in result["sizes"].items() if name in each["ms"]}
    sizes = sorted(size for size, each in found.items() if "root" in each)
    if not sizes:
        raise ValueError(f"the benchmark must have measured {name}, but its sizes {list(result['sizes'])} lack it")
    parts = {part: [found[size]["root"].get(part, 0.0) for size in sizes] for part in _PARTS}
    rest = [found[size]["p50"] - sum(parts[part][i] for part in _PARTS) for i, size in enumerate(sizes)]
    parts["rest"] = [max(value, 0.0) for value in rest]
    at_s = {part: 1e-3 * float(np.interp(gradient_bytes, sizes, values)) for part, values in parts.items()}
    if method == "shared":
        headers_s = at_s["rest"]
    else:
        headers_s = min(1e-3 * parts["rest"][0], at_s["rest"]) if sizes[0] <= INLINE_BYTES else 0.0
    return Costs(
        shared=method == "shared",
        gradient_bytes=gradient_bytes,
        header_s=headers_s / workers,
        fold_bytes_per_s=_rate((workers + 1) * gradient_bytes, at_s["reduce"]),
        # the first gradient comes in while the other workers are still sent the parameters
        bandwidth_bytes_per_s=_rate((workers + 1) * gradient_bytes, at_s["rest"] - headers_s),
        update_s=at_s["update"],
        publish_s=at_s["publish"],
    )


def costs_from_records(records: Sequence[StepRecord]) -> Costs:
    """Take the costs from the record of a run on one node, by medians over its steps.

    What a gradient took beyond its computation, and what the root took to close a step after its
    last gradient had arrived, is waking up. What was still to be folded then was one gradient.

    Raises:
        ValueError: No gradient tells how long it was computed.

    Example:
        >>> from mpisync.planning.simulation import simulate
        >>> from mpisync.policies import BackupWorkers
        >>> costs = Costs(update_s=0.25, wake_s=0.125)
        >>> records = list(simulate(BackupWorkers(0), np.ones((1, 2)), steps=9, costs=costs))
        >>> measured = costs_from_records(records)
        >>> measured.update_s, measured.wake_s
        (0.25, 0.125)
    """
    beyond = [
        max(arrival.offset_s - arrival.compute_s - (arrival.data_s or 0.0), 0.0)
        for record, fresh in zip(records[1:], map(_accepted, records), strict=False)
        for arrival in record.arrivals
        if arrival.compute_s is not None and arrival.version == record.step and arrival.worker in fresh
    ]
    if not beyond:
        raise ValueError("a record needs two steps, and gradients that tell how long they were computed")
    closing = [record.closed_s - record.opened_s - _last_s(record) for record in records]
    size = max((arrival.bytes for record in records for arrival in record.arrivals), default=0)
    return Costs(
        gradient_bytes=size,
        wake_s=(statistics.median(beyond) + max(statistics.median(closing), 0.0)) / 2,
        fold_bytes_per_s=_rate(2 * size, _median(record.reduce_s for record in records)),
        update_s=_median(record.update_s for record in records),
        publish_s=_median(record.publish_s for record in records),
    )


def _accepted(record: StepRecord) -> set[int]:
    """The workers that begin the next step when it opens."""
    return {worker for worker, _, _ in record.accepted}


def _last_s(record: StepRecord) -> float:
    return max(arrival.offset_s for arrival in record.arrivals if arrival.verdict == "accepted")


def _median(values: Iterable[float]) -> float:
    return max(statistics.median(values), 0.0)


def _rate(moved_bytes: float, took_s: float) -> float:
    return moved_bytes / took_s if moved_bytes and took_s > 0 else math.inf
