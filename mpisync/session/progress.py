"""The progress line of a run: how far it is, how fast, and which worker holds it up."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TextIO

from mpisync import settings
from mpisync.records.schema import ArrivalRecord, StepRecord

_RECENT_STEPS = 100  # what "lately" means
_RECENT_GRADIENTS = 9  # of a worker, for its usual time
_FEWEST_GRADIENTS = 5  # before a worker is compared: first ones load, compile and allocate
_REDRAW_S = 0.2  # of a terminal's line
_LOOK_S = 1.0  # for slow workers
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 60.0  # between lines where there is no terminal
_SLOW_FACTOR, _SLOW_EXCESS_S = 2.0, 0.01  # both exceeded: a slow worker, not a jittery one
_SILENT_FACTOR, _SILENT_STEPS = 3.0, 3


@dataclass
class _Pace:
    """The speed of one worker, as far as it is known."""

    spent_s: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_GRADIENTS))
    waited_s: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_GRADIENTS))
    last_s: float = 0.0  # when its newest gradient got its verdict
    last_step: int = 0
    slow_since_s: float | None = None
    named_at_s: float = 0.0
    pause_s: float = _FIRST_PAUSE_S  # until it is named again

    def see(self, arrival: ArrivalRecord, at_s: float, step: int) -> None:
        """Take note of a gradient that has its verdict."""
        self.last_s, self.last_step = at_s, step
        if arrival.compute_s is not None:
            self.spent_s.append(arrival.compute_s + (arrival.data_s or 0.0))
            self.waited_s.append(arrival.data_s or 0.0)


class Progress:
    """A run's progress line; give its `step` to a session as `on_step`, at the root.

    On a terminal one line is rewritten a few times a second; elsewhere lines follow at growing
    intervals. A slow worker gets lines of its own, while it is slow. All times are those of the
    records, so that a scripted run prints what a real one does.

    Args:
        total_steps: How many steps there will be; None if nobody knows.
        hosts: The host of each worker, in their order.
        stream: Where to print; the standard error stream unless given.
        is_alive: Says of a worker whether it still takes part: one that has left is not slow.

    Example:
        >>> progress = Progress(4, ["a", "a"], stream=sys.stdout)
        >>> progress.step(StepRecord(0, 10.0, 10.05, 10.1, 1, 2, [(1, 0, 0)], [], samples_used=32))
        step 1/4 | accepted 1/2 | wait p50 50 ms p95 50 ms | 320 samples/s | ETA 0:00
    """

    def __init__(
        self,
        total_steps: int | None,
        hosts: Sequence[str],
        stream: TextIO | None = None,
        *,
        is_alive: Callable[[int], bool] = lambda _: True,
    ) -> None:
        self._total, self._hosts, self._is_alive = total_steps, list(hosts), is_alive
        self._stream = sys.stderr if stream is None else stream
        # launchers read the ranks' output through pipes, behind which there may be a terminal
        columns = settings.read("MPISYNC_COLUMNS") if stream is None else None
        is_terminal = self._stream.isatty() or columns is not None
        self._rewrites = is_terminal and os.environ.get("TERM") != "dumb"
        self._columns = columns if isinstance(columns, int) else None
        self._pause_s = _REDRAW_S if self._rewrites else _FIRST_PAUSE_S
        self._next_s: float | None = None
        self._look_s = 0.0
        self._paces = [_Pace() for _ in self._hosts]
        # of each recent step: (opened, published, samples), its wait, who was late
        self._spans: deque[tuple[float, float, int]] = deque(maxlen=_RECENT_STEPS)
        self._waits_s: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._late: deque[list[int]] = deque(maxlen=_RECENT_STEPS)
        self._is_drawn = False

    def step(self, record: StepRecord) -> None:
        """Take the next closed step, and print the line if it is due."""
        if self._next_s is None:
            self._begin(record)
        self._spans.append((record.opened_s, record.published_s, record.samples_used))
        self._waits_s.append(record.closed_s - record.opened_s)
        self._late.append([a.worker for a in record.arrivals if a.verdict == "late"])
        for arrival in record.arrivals:
            at_s = record.opened_s + max(0.0, arrival.offset_s)
            if arrival.verdict == "accepted":
                at_s = record.published_s
            self._paces[arrival.worker].see(arrival, at_s, record.step)
        if record.published_s >= self._look_s:
            self._look_s = record.published_s + _LOOK_S
            self._name_slow(record)
        is_last = self._total is not None and record.step + 1 >= self._total
        if record.published_s >= (self._next_s or 0.0) or is_last:
            self._print(record)
        if is_last:
            self.close()

    def close(self) -> None:
        """End the line that is being rewritten."""
        if self._is_drawn:
            self._is_drawn = False
            self._write("\n")

    def _begin(self, record: StepRecord) -> None:
        self._next_s = self._look_s = record.published_s
        for pace in self._paces:
            pace.last_s, pace.last_step = record.opened_s, record.step

    def _print(self, record: StepRecord) -> None:
        line = self._line(record)
        if self._rewrites:
            columns = self._columns or shutil.get_terminal_size().columns
            self._write(f"\r{line[: columns - 1]}\x1b[K")
            self._is_drawn = True
        else:
            self._write(f"{line}\n")
        self._next_s = record.published_s + self._pause_s
        if not self._rewrites:
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def _line(self, record: StepRecord) -> str:
        done = record.step + 1
        parts = [
            f"step {done}" if self._total is None else f"step {done}/{self._total}",
            f"accepted {len(record.accepted)}/{len(self._hosts)}",
        ]
        if record.alive < len(self._hosts):
            parts.append(f"alive {record.alive}")
        late = Counter(worker for workers in self._late for worker in workers)
        if late:
            most = ", ".join(f"worker {worker} ×{n}" for worker, n in late.most_common(3))
            parts.append(f"late lately: {most}")
        if rejected := record.counts.get("rejected"):
            parts.append(f"rejected {rejected}")
        waits_s = sorted(self._waits_s)
        p50_s, p95_s = (waits_s[int(q * (len(waits_s) - 1) + 0.5)] for q in (0.5, 0.95))
        parts.append(f"wait p50 {_short(p50_s)} p95 {_short(p95_s)}")
        took_s = max(self._spans[-1][1] - self._spans[0][0], 1e-9)
        parts.append(f"{sum(samples for *_, samples in self._spans) / took_s:,.0f} samples/s")
        if self._total is not None:
            parts.append(f"ETA {_clock((self._total - done) * took_s / len(self._spans))}")
        return " | ".join(parts)

    # -- slow workers ------------------------------------------------------------------------------

    def _name_slow(self, record: StepRecord) -> None:
        for notice in self._notices(record.published_s, record.step):
            self._write(f"\r\x1b[K{notice}\n" if self._rewrites else f"{notice}\n")

    def _notices(self, now_s: float, step: int) -> list[str]:
        """Name each slow worker when it becomes slow, then at growing intervals while it is."""
        usual = [median(pace.spent_s) for pace in self._paces if pace.spent_s]
        if len(self._paces) < 2 or not usual:
            return []
        # The lower median: of two workers the slower one is not the measure.
        typical_s = sorted(usual)[(len(usual) - 1) // 2]
        notices = []
        for worker, pace in enumerate(self._paces):
            fault = _silence(pace, now_s, step, typical_s) or _slowness(pace, typical_s)
            if fault and not self._is_alive(worker):
                fault = ""
            if not fault:
                pace.slow_since_s, pace.pause_s = None, _FIRST_PAUSE_S
                continue
            if pace.slow_since_s is None:
                pace.slow_since_s = pace.named_at_s = now_s
            elif now_s < pace.named_at_s + pace.pause_s:
                continue
            else:
                pace.named_at_s = now_s
                pace.pause_s = min(2 * pace.pause_s, _LONGEST_PAUSE_S)
            lasts_s = now_s - pace.slow_since_s
            lasting = f", for {_short(lasts_s)} now" if lasts_s else ""
            notices.append(f"slow: worker {worker} on {self._hosts[worker]} {fault}{lasting}")
        return notices


def _silence(pace: _Pace, now_s: float, step: int, typical_s: float) -> str:
    """Say what a worker does that has not been heard of for long; "" where all is well."""
    silent_s, steps = now_s - pace.last_s, step - pace.last_step
    limit_s = max(_SILENT_FACTOR * typical_s, _SLOW_EXCESS_S)
    if silent_s < limit_s or steps < _SILENT_STEPS:
        return ""
    if pace.spent_s and silent_s <= _SLOW_FACTOR * median(pace.spent_s):
        return ""  # it is slow as it always is, and that says more
    return (
        f"has been computing one gradient for {_short(silent_s)} and {steps} steps; "
        f"the median is {_short(typical_s)}"
    )


def _slowness(pace: _Pace, typical_s: float) -> str:
    """Say how a worker compares with the others; "" where it keeps up."""
    if len(pace.spent_s) < _FEWEST_GRADIENTS:
        return ""
    own_s = median(pace.spent_s)
    if own_s <= _SLOW_FACTOR * typical_s or own_s - typical_s <= _SLOW_EXCESS_S:
        return ""
    data = ", mostly waiting for data" if 2 * median(pace.waited_s) > own_s else ""
    return (
        f"takes {_short(own_s)} a gradient{data}, {own_s / max(typical_s, 1e-9):.1f} times "
        f"the median of {_short(typical_s)}"
    )


def _short(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.1f} s"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
