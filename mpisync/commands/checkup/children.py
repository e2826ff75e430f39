"""Programs that may hang or die, run so that neither reaches us: MPI's start, and what imports torch and numba."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpisync.commands.checkup.probes import Probe, Start, Tools
from mpisync.commands.checkup.rank import MARK
from mpisync.launchers import Job, compose

LIMIT_S = 60.0
TRIAL_RANKS = 2
_RANK = str(Path(__file__).with_name("rank.py"))
_TOOLS = """
import json
def tell(**found):
    print(json.dumps(found), flush=True)
try:
    import numba
    from mpisync.kernels import jit
    tell(numba=numba.__version__, cache=str(jit.directory() or ""))
except Exception as error:
    tell(problem=f"{type(error).__name__}: {error}")
try:
    import torch
    tell(torch=torch.__version__, threads=torch.get_num_threads())
    if torch.cuda.is_available():
        tell(gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())])
        from mpisync.device.cuda import CudaMemory
        CudaMemory(0)
except ModuleNotFoundError as error:
    if error.name != "torch":
        tell(problem=str(error))
except ValueError as error:
    tell(device=str(error))
except Exception as error:
    tell(problem=f"{type(error).__name__}: {error}")
"""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program came to its end."""

    out: str
    err: str
    problem: str  # empty where all went well


class _Terminated(BaseException):
    """Raised by SIGTERM, which a launcher sends to all ranks when one of them fails, shortly before SIGKILL."""


@contextlib.contextmanager
def _telling_of_termination() -> Iterator[None]:
    def raise_it(number: int, frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, raise_it)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def limited(command: Sequence[str], limit_s: float, *, own_session: bool = True) -> Ended:
    """Run a program to its end, or to the time limit's, whatever it does.

    Args:
        command: The program and its arguments.
        limit_s: After how many seconds it is ended.
        own_session: Whether its own children are to be ended with it. Not so for a rank, whose launcher must
            still find it.
    """
    # Files, since a pipe would be held open by whoever outlives the program.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=own_session,
                close_fds=False,  # MPICH's launcher speaks to its ranks through one
            )
        except OSError as error:
            return Ended("", "", f"{command[0]} cannot be started: {error.strerror}")
        problem, code = "", 0
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            problem = f"no end after {limit_s:g} s"
        except _Terminated:
            problem = "the launcher ended the job while it started"
        finally:
            _end(process, own_session)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        if problem and gist(texts[1]):
            problem += f": {gist(texts[1])}"
        elif code:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            problem = gist(texts[1]) or gist(texts[0]) or how
        return Ended(texts[0], texts[1], problem)


def _end(process: subprocess.Popen[bytes], whole_session: bool) -> None:
    """End a program that still runs; a launcher, asked politely, ends its ranks."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3.0)
    if whole_session:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.poll() is None:
        process.kill()
    process.wait()


def gist(text: str) -> str:
    """Return the line of an error output that says most, or its first two."""
    lines = [line.strip() for line in text.splitlines() if re.search(r"[A-Za-z]{3}", line)]
    # Open MPI tells the reason in a box, and marks by these what it tells beside it.
    lines = [line for line in lines if not line.startswith(("***", "["))] or lines
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (errors[-1] if errors else " ".join(lines[:2]))[:200]


def find_tools(limit_s: float = LIMIT_S) -> Tools:
    """Ask numba and torch, each of which may be absent or broken."""
    ended = limited([sys.executable, "-c", _TOOLS], limit_s)
    found: dict[str, Any] = {}
    for line in ended.out.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    if ended.problem:
        found.setdefault("problem", ended.problem)
    found["gpus"] = tuple(found.get("gpus", ()))
    return Tools(**found)


def start_rank(probe: Probe, addresses: dict[str, str], limit_s: float = 2 * LIMIT_S) -> list[tuple[Probe, Start]]:
    """Start MPI as the rank that the launcher made of this process; rank 0 gets all that the ranks told.

    Where MPI does not start, this rank is all there is, and its Start has the problem.
    """
    command = _command({"probe": probe.to_json(), "addresses": addresses}, probe)
    with _telling_of_termination():
        ended = limited(command, limit_s, own_session=False)
    told = _told(ended)
    if ended.problem and not told:
        return [(probe, Start(problem=ended.problem))]
    return [(Probe.from_json(fields), start) for fields, start in told]


def start_trial(probe: Probe, addresses: dict[str, str], limit_s: float = LIMIT_S) -> Start:
    """Start MPI on two ranks, as `mpisync run` would; on one where no launcher was found."""
    command = _command({"probe": None, "addresses": addresses}, probe)
    if probe.launcher is not None and probe.mpi is not None:
        command = [*compose(probe.launcher, probe.mpi, Job(TRIAL_RANKS)), *command]
    ended = limited(command, limit_s)
    told = _told(ended)
    if ended.problem or not told:
        return Start(problem=ended.problem or "it said nothing")
    starts = [start for _, start in told]
    return min(starts, key=lambda start: (start.sharing, start.rank))


def _command(told: dict[str, Any], probe: Probe) -> list[str]:
    return [sys.executable, _RANK, json.dumps(told), probe.mpi.path if probe.mpi else ""]


def _told(ended: Ended) -> list[tuple[dict[str, Any], Start]]:
    """Read rank 0's line; what else was printed is noise."""
    lines = ended.out.splitlines()
    said = [line.partition(MARK)[2] for line in lines if MARK in line]
    if not said:
        return []
    noise = "\n".join([*(line for line in lines if MARK not in line), *ended.err.splitlines()]).strip()[:2000]
    return [(fields, Start(**{**start, "noise": noise})) for fields, start in json.loads(said[-1])]
