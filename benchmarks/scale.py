"""How long planning takes at scale: whole arrays for 100,000 workers, events for 1,000.

    python benchmarks/scale.py

1,000 steps of each; compute times are lognormal, drawn in blocks of steps as they are used. The
last line is JSON, in seconds of one core.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator

import numpy as np

from mpisync.planning.scale import arrival_times, backup_step_times
from mpisync.planning.simulation import simulate
from mpisync.policies import parse_policy

STEPS, BLOCK = 1000, 10


def blocks(workers: int) -> Iterator[np.ndarray]:
    """Draw compute times, a few steps at a time."""
    random = np.random.default_rng(0)
    for _ in range(STEPS // BLOCK):
        yield random.lognormal(0.0, 0.3, (BLOCK, workers))


def main() -> None:
    """Measure each once."""
    found: dict[str, float] = {}

    def note(name: str, began_s: float) -> None:
        found[name] = round(time.process_time() - began_s, 2)
        print(f"{name}: {found[name]} s", flush=True)

    began_s = time.process_time()
    backup_step_times(blocks(100_000), 4_000)
    note("100,000 workers, late ones going on", began_s)
    began_s = time.process_time()
    arrival_times(blocks(100_000), [90_000, 96_000, 99_000, 100_000])
    note("100,000 workers, interrupted", began_s)
    times_s = np.concatenate(list(blocks(1_000)))
    for policy in ("backup:40", "deadline:2", "deadline:2,mads=4", "async:k=100", "adaptive:noise_scale=1000"):
        began_s = time.process_time()
        for _ in simulate(parse_policy(policy), times_s, steps=STEPS):
            pass
        note(f"1,000 workers, every event, {policy}", began_s)
    about = {"cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 2)}
    print(json.dumps({"benchmark": "scale", "machine": about, "steps": STEPS, "seconds": found}))


if __name__ == "__main__":
    main()
