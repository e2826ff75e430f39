"""How long reports take, and how large they are: 100 workers × 10,000 steps by default.

    python benchmarks/reports.py
    python benchmarks/reports.py --steps 100000      a record of 2.7 GB

It writes the record of an invented run (exponential jitter, one slow worker, one very slow, a few pauses
and NaNs, batches whose cost is a part of their time) into a temporary folder, then reads it and writes the
report and the timeline, as `mpisync report` and `mpisync timeline` do, each in a process of its own. Time is
wall time, imports included; "cpu" is what the process used of the cores, and tells when others were using
them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mpisync.commands.benching.measuring import machine, report, table, versions
from mpisync.records import ArrivalRecord, RecordWriter, RunEnd, RunHeader, StepRecord

_SEND_S, _REDUCE_S, _UPDATE_S, _PUBLISH_S = 0.004, 0.012, 0.006, 0.004
_GRADIENT_BYTES = 40_000_000


def options() -> argparse.Namespace:
    """Read the command line."""
    about, more = str(__doc__).split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--out", help="append the JSON line to this file")
    return parser.parse_args()


class Invented:
    """A run of BackupWorkers that never was: who arrives when, step by step."""

    def __init__(self, workers: int, steps: int) -> None:
        self.workers, self.steps, self.backup = workers, steps, max(1, workers // 20)
        self._chance = np.random.default_rng(0)
        self._usual_s = np.full(workers, 0.2)
        self._usual_s[workers // 2] *= 1.6
        self._usual_s[-1] *= 3.0
        self._compute_s, self._length = np.zeros(workers), np.zeros(workers)
        self._sequence = np.zeros(workers, int)
        self._version = np.zeros(workers, int)
        self._counts = {"accepted": 0, "late": 0, "rejected": 0}
        self._gradients = np.zeros((2, workers), int)  # all, and those that counted

    def write(self, path: Path) -> None:
        """Write its record."""
        hosts = [f"node{worker // 8:02}" for worker in range(self.workers)]
        opened_s = 0.0
        with RecordWriter(path) as writer:
            writer.header(self._header(hosts))
            self._draw(self._usual_s > 0)
            self._arrives_s = _SEND_S + self._compute_s
            for number in range(self.steps):
                step = self._step(number, opened_s)
                writer.step(step)
                opened_s = step.published_s + 1e-5
                self._go_on(number + 1, opened_s)
            writer.end(self._end())

    def _header(self, hosts: list[str]) -> RunHeader:
        return RunHeader(
            f"backup:{self.backup}", self.workers, 0, 1.7e9, "0", hosts, {"weight": "equal", "on_late": "discard"},
            command=["train.py", "--lr", "0.1"], steps=self.steps, root_host="node99", root_cores=8, root_threads=8,
            transports=["messages"] * self.workers, parameters={"float32": _GRADIENT_BYTES // 4},
            parameters_bytes=_GRADIENT_BYTES, optimizer="SGD(lr=0.1, momentum=0.9)",
            versions={"python": "3.11.7", "torch": "2.13.0", "mpi4py": "4.1.2", "MPI": "Open MPI v5.0.11"},
        )  # fmt: skip

    def _end(self) -> RunEnd:
        given, used = (32 * self._gradients).tolist()
        handed = [n + 32 for n in given]  # the last one is in flight
        discarded = [n - own for n, own in zip(given, used, strict=True)]
        peak_bytes = (self._chance.integers(900, 1100, self.workers + 1) * 1_000_000).tolist()
        nothing = [0] * self.workers
        return RunEnd(self.steps, "", [], handed, used, discarded, nothing, nothing, peak_bytes)

    def _draw(self, chosen: np.ndarray) -> None:
        """Draw the next batch of these workers, and how long it takes."""
        number = int(chosen.sum())
        self._length[chosen] = np.minimum(self._chance.lognormal(5.5, 0.8, number), 2048).round()
        times_s = 1 + self._chance.exponential(0.15, number) + self._length[chosen] / 8000
        times_s[self._chance.random(number) < 0.004] *= 6  # a pause
        self._compute_s[chosen] = self._usual_s[chosen] * times_s

    def _step(self, number: int, opened_s: float) -> StepRecord:
        arrivals, accepted, at_s = [], [], opened_s
        while len(accepted) < self.workers - self.backup:
            worker = int(self._arrives_s.argmin())
            at_s = float(self._arrives_s[worker])
            late_by = number - int(self._version[worker])
            verdict = "late" if late_by else "rejected" if self._chance.random() < 1e-4 else "accepted"
            arrivals.append(self._arrival(worker, verdict, at_s - opened_s, late_by))
            self._counts[verdict] += 1
            self._gradients[0, worker] += 1
            self._gradients[1, worker] += verdict == "accepted"
            if verdict == "accepted":
                accepted.append((worker, int(self._sequence[worker]), number))
                self._arrives_s[worker] = np.inf  # it waits for the next version
            else:
                self._version[worker] = number
                self._draw(np.arange(self.workers) == worker)
                self._arrives_s[worker] = max(at_s, opened_s) + _SEND_S + self._compute_s[worker]
            self._sequence[worker] += 1
        closed_s = max(opened_s, at_s)
        published_s = closed_s + _REDUCE_S + _UPDATE_S + _PUBLISH_S
        return StepRecord(
            number, opened_s, closed_s, published_s, len(accepted), self.workers, accepted, arrivals,
            32 * len(accepted), _REDUCE_S, _UPDATE_S, _PUBLISH_S, counts=dict(self._counts),
        )  # fmt: skip

    def _arrival(self, worker: int, verdict: str, offset_s: float, late_by: int) -> ArrivalRecord:
        version = int(self._version[worker])
        loss = 0.3 + 2.3 * math.exp(-4 * version / self.steps) + 0.15 * self._chance.normal()
        return ArrivalRecord(
            worker, int(self._sequence[worker]), version, verdict, offset_s, late_by,  # type: ignore[arg-type]
            reason="the gradient has NaN or Inf" if verdict == "rejected" else None,
            compute_s=float(self._compute_s[worker]), data_s=0.003, samples=32, loss=loss, bytes=_GRADIENT_BYTES,
            cost=float(self._length[worker]),
        )  # fmt: skip

    def _go_on(self, version: int, opened_s: float) -> None:
        waiting = np.isinf(self._arrives_s)
        self._version[waiting] = version
        self._draw(waiting)
        self._arrives_s[waiting] = opened_s + _SEND_S + self._compute_s[waiting]


def measured(*command: str) -> dict[str, float]:
    """Run a subcommand of mpisync; return its seconds, by the wall and of the cores, and its memory."""
    began_s = time.perf_counter()
    child = os.posix_spawn(sys.executable, [sys.executable, "-m", "mpisync", *command], os.environ)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise RuntimeError(f"mpisync {' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return {
        "s": round(time.perf_counter() - began_s, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "memory_mb": round(usage.ru_maxrss / 1e3),
    }


def main() -> None:
    """Write the record, measure both commands."""
    asked = options()
    with tempfile.TemporaryDirectory(prefix="mpisync-reports-") as folder:
        record = Path(folder, "record.jsonl")
        Invented(asked.workers, asked.steps).write(record)
        sizes = {"record": record.stat().st_size}
        found = {}
        for command, name in (("report", "report.html"), ("timeline", "trace.json")):
            out = Path(folder, name)
            found[command] = measured(command, str(record), "--out", str(out))
            sizes[command] = out.stat().st_size
    print(f"{asked.workers} workers × {asked.steps:,} steps, a record of {sizes['record'] / 1e6:,.0f} MB")
    rows = [[name, *one.values(), f"{sizes[name] / 1e6:.2f}"] for name, one in found.items()]
    print(table(["", "s", "cpu s", "memory MB", "file MB"], rows))
    result = {
        "benchmark": "reports", "workers": asked.workers, "steps": asked.steps, "bytes": sizes,
        "commands": found, "machine": machine(), "versions": versions(),
    }  # fmt: skip
    report(result, asked.out)


if __name__ == "__main__":
    main()
