"""TensorFlow on this machine: a parameter server and workers, each a process of an interpreter that has it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from mpisync.commands.benching import marks

PINNED = "tensorflow-cpu==2.21.0"  # the release this is tested with
_TASK = Path(__file__).with_name("sync_replicas.py")
_START_S, _LIMIT_S = 120, 300  # how long starting, and one order, may take
_LAST_LINES = 5  # of a task's errors
_LOOK_UP_S = 60
_LOOK_UP = "import importlib.util, sys; sys.exit(importlib.util.find_spec('tensorflow') is None)"
# Nothing but errors; CPUs only; and no proxy between one process of this machine and another.
_SETTINGS = {
    "TF_CPP_MIN_LOG_LEVEL": "2", "GRPC_VERBOSITY": "ERROR", "CUDA_VISIBLE_DEVICES": "", "no_grpc_proxy": "127.0.0.1",
}  # fmt: skip


def check_python(python: str) -> None:
    """Refuse an interpreter that has no TensorFlow, without importing it.

    Raises:
        RuntimeError: There is none, or no interpreter; it says how to make one that has it.
    """
    try:
        asked = subprocess.run([python, "-I", "-c", _LOOK_UP], stdin=subprocess.DEVNULL, stderr=-1, timeout=_LOOK_UP_S)
        problem = f"{python} has none" if asked.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = f"{python!r} does not run: {error}"
    if problem:
        raise RuntimeError(
            f"--tensorflow must be a Python interpreter that has TensorFlow, and {problem}; to make one: "
            f"python3 -m venv .venv-tensorflow && .venv-tensorflow/bin/pip install {PINNED}, and then "
            "--tensorflow .venv-tensorflow/bin/python"
        )


def _free_ports(number: int) -> list[int]:
    """Return ports of the loopback interface that nobody listens on."""
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


class Cluster:
    """The processes. A context manager; they end with it, and with this process however it ends.

    Args:
        python: The interpreter.
        workers: How many workers.

    Attributes:
        workers: How many workers.
        version: TensorFlow's.

    Raises:
        RuntimeError: A process ended, or took too long; with the last lines it wrote.
    """

    def __init__(self, python: str, workers: int) -> None:
        self.workers, self._turn = workers, 0
        at = [f"127.0.0.1:{port}" for port in _free_ports(workers + 1)]
        task: dict[str, Any] = {
            "cluster": {"ps": at[:1], "worker": at[1:]},
            "parent": os.getpid(), "limit_s": _LIMIT_S, "places": marks.PLACES,
        }  # fmt: skip
        self._names = ["the parameter server", *(f"worker {worker}" for worker in range(workers))]
        self._errors: list[IO[bytes]] = []
        self._tasks: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []
        self._lines: queue.Queue[tuple[int, str]] = queue.Queue()
        try:
            for number in range(workers + 1):
                job, index = ("worker", number - 1) if number else ("ps", 0)
                self._start(python, {**task, "job": job, "index": index})
            self.version = str(self._answers(range(workers + 1), _START_S)[0]["version"])
        except BaseException:
            self.close()
            raise

    def _start(self, python: str, task: dict[str, Any]) -> None:
        errors = tempfile.TemporaryFile()  # has no name, so nothing is left of it
        process = subprocess.Popen(
            [python, "-I", str(_TASK), json.dumps(task)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**os.environ, **_SETTINGS},
        )  # fmt: skip
        number = len(self._tasks)
        self._tasks.append(process)
        self._errors.append(errors)
        reader = threading.Thread(target=self._read, args=(number, process.stdout), daemon=True)
        reader.start()
        self._readers.append(reader)

    def _read(self, number: int, output: IO[str]) -> None:
        with output:
            for line in output:
                self._lines.put((number, line))
        self._lines.put((number, ""))

    def play(self, *, sleep_s: float, **order: Any) -> list[dict[str, Any]]:
        """Give every worker an order, the last one that of sleeping before every gradient.

        Returns:
            Their answers (see sync_replicas.py).
        """
        self._turn += 1
        for number, process in enumerate(self._tasks[1:], 1):
            assert process.stdin is not None
            own = {**order, "name": f"turn{self._turn}", "sleep_s": sleep_s if number == self.workers else 0.0}
            try:
                process.stdin.write(json.dumps(own) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                raise self._failure(number) from None
        return self._answers(range(1, self.workers + 1), _LIMIT_S)

    def _answers(self, numbers: Sequence[int], limit_s: float) -> list[dict[str, Any]]:
        """Wait for a line of each."""
        got: dict[int, dict[str, Any]] = {}
        end_s = time.monotonic() + limit_s
        while len(got) < len(numbers):
            try:
                number, line = self._lines.get(timeout=max(0.0, end_s - time.monotonic()))
            except queue.Empty:
                late = next(number for number in numbers if number not in got)
                raise RuntimeError(f"TensorFlow gave no answer in {limit_s:.0f} s: {self._said(late)}") from None
            if not line:
                raise self._failure(number)
            got[number] = json.loads(line)
        return [got[number] for number in numbers]

    def _failure(self, number: int) -> RuntimeError:
        code = self._tasks[number].wait()
        return RuntimeError(f"TensorFlow ended with exit code {code}: {self._said(number)}")

    def _said(self, number: int) -> str:
        """Quote the last lines a process wrote to its standard error."""
        file = self._errors[number].fileno()
        written = os.pread(file, os.fstat(file).st_size, 0)  # where the process writes on stays as it is
        lines = written.decode(errors="replace").strip().splitlines()[-_LAST_LINES:]
        return f"{self._names[number]} said " + ("\n".join(["", *lines]) if lines else "nothing")

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for process in self._tasks:
            process.kill()  # the servers of TensorFlow have no end of their own
        for process, reader, errors in zip(self._tasks, self._readers, self._errors, strict=True):
            process.wait()
            reader.join()
            errors.close()
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # of an order that nobody took
                process.stdin.close()
