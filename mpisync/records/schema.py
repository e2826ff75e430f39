"""What the record of a run holds: the run, then each step as it closed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["ArrivalRecord", "RunEnd", "RunHeader", "StepChecker", "StepRecord"]

FORMAT = 1


@dataclass(frozen=True)
class RunHeader:
    """What was run.

    What follows `format` is for whoever wants to know the run or to repeat it; `Replay` asks for none of it,
    and records of before have none.

    Attributes:
        policy: The policy's command-line form.
        workers: How many workers the run was started with.
        seed: What batches and random numbers follow from, with worker and sequence.
        started_unix_s: When it started, by the wall clock.
        version: Of mpisync.
        hosts: The host of each worker, in their order.
        settings: All settings that an update depends on, by name.
        format: Of the record.
        command: The script and its arguments, as the root had them.
        steps: How many were planned for the first loop; None if it was to end otherwise.
        root_host: The root's host.
        root_cores: How many cores the root's process may use.
        root_threads: How many threads torch has there.
        cores: How many cores all ranks together may use; None where some are on another host than the root.
        transports: How each worker's gradients travel: "shared memory" or "messages"; none for a process that
            trains alone, which is its only worker and makes the updates too.
        parameters: How many elements are trained, by dtype.
        parameters_bytes: Their size.
        optimizer: Its name and settings, but for those that are its defaults.
        scheduler: Its name; "" for none.
        versions: Of Python, torch, mpi4py and the MPI library.

    Example:
        >>> header = RunHeader("backup:1", 2, 0, started_unix_s=0.0, version="1", hosts=["a", "b"])
        >>> header.workers, header.format
        (2, 1)
    """

    policy: str
    workers: int
    seed: int
    started_unix_s: float
    version: str
    hosts: list[str]
    settings: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    command: list[str] = field(default_factory=list)
    steps: int | None = None
    root_host: str = ""
    root_cores: int = 0
    root_threads: int = 0
    cores: int | None = None
    transports: list[str] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)
    parameters_bytes: int = 0
    optimizer: str = ""
    scheduler: str = ""
    versions: dict[str, str] = field(default_factory=dict)


def recorded_late_work(header: RunHeader) -> tuple[str, int | None]:
    """Return what became of late work in a run, as "retry", and its limit; older records have that apart.

    Example:
        >>> header = RunHeader("backup:1", 2, 0, 0.0, "1", ["a", "b"], settings={"on_late": "retry:limit=5"})
        >>> recorded_late_work(header)
        ('retry', 5)
    """
    kind, _, value = str(header.settings.get("on_late", "discard")).partition(":")
    limit = value.rpartition("=")[2]
    older = header.settings.get("late_limit") if kind in ("retry", "carry") else None
    return kind, int(limit) if limit.isdecimal() else older if isinstance(older, int) else None


@dataclass(frozen=True)
class ArrivalRecord:
    """One gradient and its verdict.

    Attributes:
        worker: Who computed it.
        sequence: Which of that worker's computations it is.
        version: The version it was computed at.
        verdict: Its verdict; it has one in the whole record.
        offset_s: When it had arrived whole, since the opening of the step that gave the verdict;
            negative if it was waiting by then.
        late_by: How many versions it was behind, if late.
        tie: Whether chance decided between it and another that arrived at the same time.
        reason: Why it was rejected.
        compute_s: How long it was computed, as its worker says.
        data_s: How long its worker waited for the batch.
        samples: How many samples it is the mean of.
        loss: Their loss, if the worker sent it.
        bytes: How many bytes of it travelled.
        cost: What the loop says that one of its batches costs.
        carried: Sequences of its worker's late gradients that are added in.
        lots: (epoch, number) of each batch that came from the pool.

    Example:
        >>> late = ArrivalRecord(3, sequence=7, version=6, verdict="late", offset_s=0.2, late_by=1)
        >>> late.verdict, late.late_by
        ('late', 1)
    """

    worker: int
    sequence: int
    version: int
    verdict: Literal["accepted", "late", "rejected"]
    offset_s: float
    late_by: int = 0
    tie: bool = False
    reason: str | None = None
    compute_s: float | None = None
    data_s: float | None = None
    samples: int = 0
    loss: float | None = None
    bytes: int = 0
    cost: float | None = None
    carried: list[int] | None = None
    lots: list[tuple[int, int]] | None = None


@dataclass(frozen=True)
class StepRecord:
    """One closed step. Times are by the root's monotonic clock.

    Attributes:
        step: Its number, which is the version it updated.
        opened_s: When it opened.
        closed_s: When its last gradient was accepted.
        published_s: When the next version could be had.
        target: N: how many gradients the policy wanted when it closed.
        alive: How many workers were alive then.
        accepted: (worker, sequence, version) of what counted, in order of acceptance, which is the
            order of summation.
        arrivals: Every gradient that got its verdict while this step was open, in order of verdict.
        samples_used: How many samples the accepted gradients are the mean of.
        reduce_s: How long folding took after the last gradient had arrived.
        update_s: How long the optimizer took.
        publish_s: How long publication took.
        updated: Whether the parameters changed; false where the mean was refused.
        counts: Gradients since the start of the run, by verdict.
        norms: The sum of the squared norms of the accepted gradients, and the squared norm of their
            mean; None where they were not wanted.
        why: Why the policy wanted what it did; None where it decides nothing from step to step.
        metrics: (version, value) of each evaluation of the script's that was known when the step was updated, and
            by which schedulers were stepped; None where there was none.

    Example:
        >>> step = StepRecord(
        ...     step=0, opened_s=0.0, closed_s=0.5, published_s=0.6, target=2, alive=3,
        ...     accepted=[(2, 0, 0), (1, 0, 0)], arrivals=[],
        ... )
        >>> [worker for worker, sequence, version in step.accepted]
        [2, 1]
    """

    step: int
    opened_s: float
    closed_s: float
    published_s: float
    target: int
    alive: int
    accepted: list[tuple[int, int, int]]
    arrivals: list[ArrivalRecord]
    samples_used: int = 0
    reduce_s: float = 0.0
    update_s: float = 0.0
    publish_s: float = 0.0
    updated: bool = True
    counts: dict[str, int] = field(default_factory=dict)
    norms: tuple[float, float] | None = None
    why: str | None = None
    metrics: list[tuple[int, float]] | None = None


@dataclass(frozen=True)
class RunEnd:
    """How a run ended; a record without it is of a run that goes on, or was killed.

    Attributes:
        version: That of the final parameters.
        failure: Why it failed; "" if it did not.
        arrivals: What got its verdict after the last step had closed.
        handed: Samples handed to the loop of each worker, in their order.
        used: Those of accepted gradients.
        discarded: Those of late and rejected ones.
        lost: Those in a worker's hands when it left or died. What is missing to `handed` was in flight still.
        requeued: Those of late gradients that were computed again, by this worker or another.
        peak_rss_bytes: The largest memory of each worker's process, then of the root's; 0 where it did not tell.
        metrics: (version, value) of evaluations that were told after the last step.

    Example:
        >>> end = RunEnd(version=9, failure="", arrivals=[], handed=[80], used=[72], discarded=[8], lost=[0])
        >>> end.handed[0] == end.used[0] + end.discarded[0] + end.lost[0]
        True
    """

    version: int
    failure: str
    arrivals: list[ArrivalRecord]
    handed: list[int]
    used: list[int]
    discarded: list[int]
    lost: list[int]
    requeued: list[int] = field(default_factory=list)
    peak_rss_bytes: list[int] = field(default_factory=list)
    metrics: list[tuple[int, float]] = field(default_factory=list)


class StepChecker:
    """Holds steps that follow one another against the rules of a record.

    The rules: steps are consecutive, workers exist, nothing is accepted before its version, and a
    gradient, which is (worker, sequence), has one verdict.

    Args:
        workers: How many workers the run had; None if that is not known.

    Example:
        >>> checker = StepChecker(workers=2)
        >>> checker.check(StepRecord(0, 0.0, 0.5, 0.6, 1, 2, [(1, 0, 0)], []))
        >>> checker.check(StepRecord(2, 0.6, 0.9, 1.0, 1, 2, [(0, 0, 0)], []))
        Traceback (most recent call last):
        ...
        ValueError: steps must be consecutive, but step 2 comes where step 1 is due
    """

    def __init__(self, workers: int | None = None) -> None:
        """Expect any first step."""
        self._workers = math.inf if workers is None else workers
        self._due: int | None = None
        # A worker's verdicts come in its own order, so this stays small however long the run is.
        self._undecided: dict[int, int] = {}  # each worker's first gradient without a verdict
        self._ahead: set[tuple[int, int]] = set()  # what has one beyond that

    def check(self, record: StepRecord) -> None:
        """Take the next step.

        Raises:
            ValueError: It names the rule that the step breaks.
        """
        if self._due is not None and record.step != self._due:
            raise ValueError(
                f"steps must be consecutive, but step {record.step} comes where step {self._due} "
                "is due"
            )
        if record.step < 0:
            raise ValueError(f"a step's number must not be negative, but it is {record.step}")
        self._due = record.step + 1
        for worker, sequence, version in record.accepted:
            self._gradient(worker, sequence, version, record.step)
        self._metrics(record.metrics or (), record.step)
        accepted = set(record.accepted)
        for arrival in record.arrivals:
            worker, sequence, version = arrival.worker, arrival.sequence, arrival.version
            if arrival.verdict != "accepted":
                self._gradient(worker, sequence, version, record.step)
            elif (worker, sequence, version) not in accepted:
                raise ValueError(
                    f"an accepted arrival must be in its step's list, but worker {worker}'s "
                    f"gradient {sequence} of version {version} is not in step {record.step}'s"
                )

    def end(self, end: RunEnd) -> None:
        """Take the end: no step follows.

        Raises:
            ValueError: It names the rule that the end breaks.
        """
        if self._due is not None and end.version != self._due:
            raise ValueError(f"a run ends at the version of its last step, {self._due}, but here is {end.version}")
        self._metrics(end.metrics, end.version)
        for arrival in end.arrivals:
            if arrival.verdict == "accepted":
                raise ValueError(f"worker {arrival.worker}'s gradient {arrival.sequence} is accepted in no step")
            self._gradient(arrival.worker, arrival.sequence, arrival.version, end.version)
        requeued = end.requeued or [0] * len(end.handed)
        accounts = (end.handed, end.used, end.discarded, end.lost, requeued)
        if any(len(account) != self._workers for account in accounts if self._workers < math.inf):
            raise ValueError(f"an end has an account for each of the {self._workers} workers, but here are others")
        for worker, (handed, *spent) in enumerate(zip(*accounts, strict=True)):
            if min(handed, *spent) < 0 or sum(spent) > handed:
                raise ValueError(f"worker {worker} was handed {handed} samples, but {sum(spent)} are accounted for")

    def _metrics(self, metrics: Iterable[tuple[int, float]], step: int) -> None:
        for version, _ in metrics:
            if not 0 <= version <= step:
                raise ValueError(f"a metric's version must be from 0 to its step, {step}, but here is {version}")

    def _gradient(self, worker: int, sequence: int, version: int, step: int) -> None:
        if not 0 <= worker < self._workers:
            raise ValueError(f"workers are numbered 0 to {self._workers - 1}, but here is {worker}")
        if sequence < 0 or not 0 <= version <= step:
            raise ValueError(
                f"a gradient's version must be from 0 to its step, its sequence not negative, but "
                f"worker {worker}'s has version {version} in step {step} and sequence {sequence}"
            )
        undecided = self._undecided.get(worker, 0)
        if sequence < undecided or (worker, sequence) in self._ahead:
            raise ValueError(
                f"a gradient gets one verdict, but worker {worker}'s gradient {sequence} gets "
                f"another in step {step}"
            )
        if sequence > undecided:
            self._ahead.add((worker, sequence))
            return
        undecided += 1
        while (worker, undecided) in self._ahead:
            self._ahead.remove((worker, undecided))
            undecided += 1
        self._undecided[worker] = undecided
