"""What would help other than backup workers: equal batches, fair shares, fewer workers, data in time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mpisync.planning.diagnosis import slow_events
from mpisync.planning.efficiency import Efficiency
from mpisync.planning.laws import Seconds

__all__ = ["Remedies", "remedies"]


@dataclass(frozen=True)
class Remedies:
    """Gains of full synchronous SGD, each against full synchronous SGD as it is.

    Attributes:
        rebalanced: If each worker's batches were so large that all take the same median time, with
            as many samples in all; weighted by samples.
        shares: The size of each worker's batches then, 1 being as it is.
        excluded: The gain in time to target without the persistently slow workers; 1 if none is.
        equal: If every gradient cost the mean. Nothing can gain more with the same work.
        data_share: How much of what slow times take above the median is waiting for data; NaN where
            that is not known.
        samples_correlation: Of log time with log samples of the batch; NaN where they do not vary.

    Example:
        >>> found = remedies(np.array([[1.0, 1.0, 2.0]] * 9), slow=[2], efficiency=Efficiency(0.0))
        >>> round(found.rebalanced, 2), found.excluded, found.shares.round(2)
        (1.67, 2.0, array([1.2, 1.2, 0.6]))
    """

    rebalanced: float
    shares: Seconds
    excluded: float
    equal: float
    data_share: float
    samples_correlation: float


def remedies(
    times_s: Seconds, slow: list[int], efficiency: Efficiency, *, overhead_s: float = 0.0,
    data_s: Seconds | None = None, samples: Seconds | None = None,
) -> Remedies:
    """Say what other remedies would gain.

    Args:
        times_s: Seconds by step and worker, (steps, workers), all positive.
        slow: The columns of the persistently slow workers.
        efficiency: J(N).
        overhead_s: Of every step, in seconds.
        data_s: How much of the times was waiting for data.
        samples: The number of samples of each gradient.
    """
    workers = times_s.shape[1]
    now_s = _slowest(times_s, overhead_s)
    speeds = 1 / np.median(times_s, axis=0)
    shares = speeds * workers / speeds.sum()
    others = [c for c in range(workers) if c not in slow]
    fewer = efficiency.relative(workers) / efficiency.relative(len(others))
    return Remedies(
        now_s / _slowest(times_s * shares, overhead_s),
        shares,
        float(fewer) * now_s / _slowest(times_s[:, others], overhead_s) if slow else 1.0,
        now_s / (float(times_s.mean()) + overhead_s),
        math.nan if data_s is None else _data_share(times_s, data_s),
        math.nan if samples is None else _correlation(times_s, samples),
    )


def _slowest(times_s: Seconds, overhead_s: float) -> float:
    return float(times_s.max(axis=1).mean()) + overhead_s


def _data_share(times_s: Seconds, data_s: Seconds) -> float:
    known = np.isfinite(data_s)
    events = slow_events(times_s) & known
    if not events.any():
        return math.nan
    beyond = (times_s - np.median(times_s, axis=0))[events].sum()
    waiting = (data_s - np.nanmedian(data_s))[events].sum()
    return float(np.clip(waiting / beyond, 0, 1))


def _correlation(times_s: Seconds, samples: Seconds) -> float:
    known = np.isfinite(samples) & (samples > 0)
    counts = samples[known]
    if len(counts) < 3 or not np.ptp(counts) or not np.ptp(times_s[known]):
        return math.nan
    return float(np.corrcoef(np.log(times_s[known]), np.log(counts))[0, 1])
