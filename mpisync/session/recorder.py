"""The destinations of every step's record: the file, the progress line, the script's own hook."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mpisync.aggregation.account import Account
from mpisync.aggregation.late_work import late_work_of
from mpisync.model.scheduler import Schedule
from mpisync.policies import Replay
from mpisync.records import ArrivalRecord, RecordWriter, RunEnd, RunHeader, StepRecord
from mpisync.records.schema import recorded_late_work
from mpisync.session.options import Options
from mpisync.session.progress import Progress
from mpisync.session.sample_summary import summary
from mpisync.version import __version__


def _recorded(options: Options) -> dict[str, Any]:
    """Return the settings that an update depends on, beside the model and the seed."""
    return {
        "weight": options.weight,
        "clip_norm": options.clip_norm,
        "clip_value": options.clip_value,
        "ema": options.ema,
        "on_late": str(options.on_late),
    }


def check_replay(options: Options) -> None:
    """Raise ValueError where a record is to be replayed under other settings than its run had."""
    header = options.policy.header if isinstance(options.policy, Replay) else None
    if header is None:
        return
    recorded = {"seed": header.seed, **header.settings}
    if "on_late" in recorded:
        kind, limit = recorded_late_work(header)
        recorded["on_late"] = str(late_work_of(kind if limit is None else f"{kind}:{limit}"))
    for name, here in {"seed": options.seed, **_recorded(options)}.items():
        if name in recorded and recorded[name] != here:
            raise ValueError(
                f"the record was made with {name}={recorded[name]!r} and this session has {name}={here!r}: a replay "
                "repeats a run only with the settings that it had"
            )


class Recorder:
    """The recorder of the rank that makes the updates.

    Raises:
        ValueError: The record cannot be written.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._hosts: list[str] = []
        self._is_alive: Callable[[int], bool] = lambda _: True
        self._progress: Progress | None = None
        self._header: RunHeader | None = None  # until it is written
        self._writer: RecordWriter | None = None
        if options.record is not None:
            try:
                self._writer = RecordWriter(options.record)
            except OSError as error:
                raise ValueError(str(error)) from error

    def watch(self, is_alive: Callable[[int], bool]) -> None:
        """Take what says whether a gradient may still come from a worker."""
        self._is_alive = is_alive

    def header(self, policy: str, hosts: Sequence[str], **about: Any) -> None:  # noqa: ANN401 (as RunHeader has them)
        """Take what is known of the run; `hosts` has one for each worker, `about` other fields of a RunHeader."""
        self._hosts = list(hosts)
        self._header = RunHeader(
            policy=policy,
            workers=len(hosts),
            seed=self._options.seed,
            started_unix_s=time.time(),
            version=__version__,
            hosts=self._hosts,
            settings=_recorded(self._options),
            **about,
        )

    def _write_header(self, steps: int | None) -> None:
        """Write the record's header, once it is known how many steps are planned."""
        if self._writer is not None and self._header is not None:
            header, self._header = self._header, None
            self._write(lambda writer: writer.header(replace(header, steps=steps)), "is empty")

    def _write(self, line: Callable[[RecordWriter], object], otherwise: str) -> None:
        """Write a line; where that fails, say so once and go on without a record."""
        if self._writer is None:
            return
        try:
            line(self._writer)
        except OSError as error:
            print(
                f"mpisync: the record {self._writer.path} {otherwise}, and the run goes on without: {error.strerror}",
                file=sys.stderr,
                flush=True,
            )
            self._writer.close()
            self._writer = None

    def begin(self, steps: int | None) -> None:
        """Begin the record and the progress line, at the loop's beginning; `steps` are to come."""
        self._write_header(steps)
        if self._options.progress:
            self._progress = Progress(steps, self._hosts, is_alive=self._is_alive)

    def step(self, record: StepRecord, metrics: list[tuple[int, float]]) -> None:
        """Report a published step, and the metrics that its schedulers were stepped by."""
        if metrics:
            record = replace(record, metrics=metrics)
        self._write(lambda writer: writer.step(record), f"ends before step {record.step}")
        if self._progress is not None:
            self._progress.step(record)
        if self._options.on_step is not None:
            self._options.on_step(record)

    def close(self) -> None:
        """End the progress line: no step follows."""
        if self._progress is not None:
            self._progress.close()

    def end(
        self,
        version: int,
        failure: str,
        arrivals: Sequence[ArrivalRecord],
        accounts: Sequence[Account],
        by_cost: Mapping[int, Account],
        peak_rss_bytes: Sequence[int],
        metrics: Sequence[tuple[int, float]],
    ) -> None:
        """Say what became of the last gradients and of all samples, and close the record: everyone has left."""
        self._write_header(None)  # where the loop was never begun
        if self._progress is not None:
            print(summary(accounts, by_cost), file=sys.stderr, flush=True)
        end = RunEnd(
            version,
            failure,
            list(arrivals),
            handed=[account.handed for account in accounts],
            used=[account.used for account in accounts],
            discarded=[account.discarded for account in accounts],
            lost=[account.lost for account in accounts],
            requeued=[account.requeued for account in accounts],
            peak_rss_bytes=list(peak_rss_bytes),
            metrics=list(metrics),
        )
        self._write(lambda writer: writer.end(end), "lacks its last line")
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def tell_of_no_metric(schedule: Schedule) -> None:
    """Say at the end of a run that what was to go by a metric had none."""
    if schedule.lacks_metric:
        print(
            "mpisync: metric_scheduler= was never stepped, since no metric came: call session.evaluate(fn, every=..., "
            "metric=True) behind session.step, with an every= that the run reaches",
            file=sys.stderr,
            flush=True,
        )
