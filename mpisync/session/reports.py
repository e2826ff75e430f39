"""Where every step's record goes: the file, the progress line, the script's own hook."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import mpisync
from mpisync.policies import RecordWriter, RunHeader, StepRecord
from mpisync.session.progress import Progress

if TYPE_CHECKING:
    from mpisync.session.session import Settings


class Reports:
    """Reports of the rank that makes the updates.

    Raises:
        ValueError: The record cannot be written.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._hosts: list[str] = []
        self._progress: Progress | None = None
        self._writer: RecordWriter | None = None
        if settings.record is not None:
            try:
                self._writer = RecordWriter(settings.record)
            except OSError as error:
                raise ValueError(str(error)) from error

    def header(self, policy: str, hosts: Sequence[str]) -> None:
        """Say what is run; `hosts` has one for each worker."""
        self._hosts = list(hosts)
        if self._writer is not None:
            self._writer.header(
                RunHeader(
                    policy=policy,
                    workers=len(hosts),
                    seed=self._settings.seed,
                    started_unix_s=time.time(),
                    version=mpisync.__version__,
                    hosts=self._hosts,
                    settings={
                        "weight": self._settings.weight,
                        "clip_norm": self._settings.clip_norm,
                        "ema": self._settings.ema,
                    },
                )
            )

    def begin(self, steps: int | None) -> None:
        """The loop begins; so many steps are to come."""
        if self._settings.progress:
            self._progress = Progress(steps, self._hosts)

    def step(self, record: StepRecord) -> None:
        """Report a step that was published."""
        if self._writer is not None:
            self._writer.step(record)
        if self._progress is not None:
            self._progress.step(record)
        if self._settings.on_step is not None:
            self._settings.on_step(record)

    def close(self) -> None:
        """No step follows."""
        if self._progress is not None:
            self._progress.close()
        if self._writer is not None:
            self._writer.close()
