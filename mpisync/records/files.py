"""The file of a record: one JSON object a line, first the run, then each step as it closed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any

from mpisync.records.lines import intact, load, seal, unseal
from mpisync.records.schema import FORMAT, RunEnd, RunHeader, StepChecker, StepRecord

__all__ = ["RecordReader", "RecordWriter", "read_record"]


class RecordWriter:
    """Writes a record, one whole line at a time.

    Args:
        path: A file that does not exist yet, or is empty: a record holds one run.

    Raises:
        OSError: The file cannot be written.

    Example:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "record.jsonl")
        >>> with RecordWriter(path) as writer:
        ...     writer.header(RunHeader("backup:1", 2, 0, 0.0, "1", ["a", "a"]))
        ...     writer.step(StepRecord(0, 0.0, 0.5, 0.6, 1, 2, [(1, 0, 0)], []))
        >>> header, steps = read_record(path)
        >>> header.workers, steps[0].accepted
        (2, [(1, 0, 0)])
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the file."""
        self.path = os.fspath(path)
        try:
            self._file = open(self.path, "ab", buffering=0)
        except OSError as error:
            raise self._named(error, "give a path in a directory you may write to") from None
        self._begun = False
        if self._file.tell():
            self._file.close()
            raise FileExistsError(
                f"the record {self.path} holds a run already, and a record holds one: "
                "give another path or move it away"
            )

    def header(self, header: RunHeader) -> None:
        """Write the first line."""
        if self._begun:
            raise RuntimeError(f"the record {self.path} has its header already")
        self._begun = True
        self._write({"kind": "run", **header.__dict__})

    def step(self, step: StepRecord) -> None:
        """Write the next step."""
        if not self._begun:
            raise RuntimeError(f"the record {self.path} has no header yet: write it first")
        self._write({"kind": "step", **step.__dict__})

    def end(self, end: RunEnd) -> None:
        """Write the last line."""
        self._write({"kind": "end", **end.__dict__})

    def _write(self, document: dict[str, Any]) -> None:
        line = memoryview(seal(document))
        try:
            while line:  # an unbuffered write may be partial
                line = line[self._file.write(line) :]
        except OSError as error:
            self._file.close()  # a line is torn here: nothing may follow it
            raise self._named(error, "free space on its file system or give another path") from None

    def _named(self, error: OSError, advice: str) -> OSError:
        reason = f"the record cannot be written ({error.strerror}): {advice}"
        return type(error)(error.errno, reason, self.path)

    def close(self) -> None:
        """Close the file; more than once is harmless."""
        self._file.close()

    def __enter__(self) -> RecordWriter:
        """Return the writer."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the file."""
        self.close()


class RecordReader:
    """Reads and checks a record one step at a time, so that a long one needs no memory.

    Iterate over it, once; it may be read while the run goes on.

    Args:
        path: The file.

    Attributes:
        path: The file.
        header: The run.
        end: How the run ended; None if it has no end, or that is not yet reached.
        torn: The number of the last line if that is torn, which is what a run that was killed may
            leave, and one that is writing it; None if it is whole or not yet reached.

    Raises:
        ValueError: It names the line and the rule that it breaks.
        OSError: The file cannot be read.

    Example:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "record.jsonl")
        >>> with RecordWriter(path) as writer:
        ...     writer.header(RunHeader("backup:1", 2, 0, 0.0, "1", ["a", "a"]))
        ...     writer.step(StepRecord(0, 0.0, 0.5, 0.6, 1, 2, [(1, 0, 0)], []))
        >>> reader = RecordReader(path)
        >>> reader.header.policy, [step.step for step in reader], reader.torn
        ('backup:1', [0], None)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the first line."""
        self.path = os.fspath(path)
        self.torn: int | None = None
        self.end: RunEnd | None = None
        self._lines = self._numbered()
        number, line = next(self._lines, (1, b""))
        if not line:
            raise self._problem(1, "the first line must be the run's, but is missing")
        try:
            self.header = _run_header(unseal(line))
        except ValueError as error:
            raise self._problem(number, error) from None

    def __iter__(self) -> Iterator[StepRecord]:
        """Yield the steps that are left."""
        checker = StepChecker(self.header.workers)
        for number, line in self._lines:
            try:
                document = unseal(line)
                if self.end is not None:
                    raise ValueError("nothing may follow the end of the run, but here is another line")
                if document.get("kind") == "end":
                    del document["kind"]
                    self.end = load(RunEnd, document)
                    checker.end(self.end)
                    continue
                step = _step_record(document)
                checker.check(step)
            except ValueError as error:
                raise self._problem(number, error) from None
            yield step

    def _numbered(self) -> Iterator[tuple[int, bytes]]:
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    yield number, line[:-1]
                elif intact(line):  # an editor took the last line's end, and nothing else
                    yield number, line
                else:
                    self.torn = number
                    return

    def _problem(self, number: int, rule: object) -> ValueError:
        return ValueError(f"record {self.path}, line {number}: {rule}")


def read_record(
    path: str | os.PathLike[str], *, strict: bool = False
) -> tuple[RunHeader, list[StepRecord]]:
    """Read and check a whole record.

    Args:
        path: The file.
        strict: Refuse a torn last line, which is what a run that was killed may leave; otherwise it
            is dropped with a warning.

    Returns:
        The run, and its steps in order.

    Raises:
        ValueError: It names the line and the rule that it breaks.
        OSError: The file cannot be read.

    Example:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "record.jsonl")
        >>> with RecordWriter(path) as writer:
        ...     writer.header(RunHeader("async:k=1", 2, 0, 0.0, "1", ["a", "a"]))
        >>> read_record(path)[1]
        []
    """
    reader = RecordReader(path)
    steps = list(reader)
    if reader.torn is not None:
        where = f"record {reader.path}, line {reader.torn}: the line is torn"
        if strict:
            raise ValueError(
                f"{where}, as when a run is killed in the midst of writing: delete it to use the "
                "steps before it"
            )
        warnings.warn(f"{where} and was dropped", RuntimeWarning, stacklevel=2)
    return reader.header, steps


def _run_header(document: dict[str, Any]) -> RunHeader:
    if document.pop("kind", None) != "run":
        raise ValueError("the first line must be the run's, but it is not")
    if document.get("format") != FORMAT:
        raise ValueError(
            f"the record has format {document.get('format')!r}, but this mpisync reads format "
            f"{FORMAT}: read it with the version that wrote it"
        )
    header = load(RunHeader, document)
    if header.workers < 1 or len(header.hosts) != header.workers:
        raise ValueError(
            f"a run has at least 1 worker and a host for each, but here are {header.workers} "
            f"workers and {len(header.hosts)} hosts"
        )
    return header


def _step_record(document: dict[str, Any]) -> StepRecord:
    kind = document.pop("kind", None)
    if kind != "step":
        raise ValueError(f"every line but the first must be a step's or the end's, but this is of kind {kind!r}")
    return load(StepRecord, document)
