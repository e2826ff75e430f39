"""Starting MPI jobs from tests: a time limit, the stacks of all ranks, and nothing left behind.

`run_script` starts a user's script under plain mpirun; `start_script` gives the running job, for
tests that kill or stop its ranks. Every process of a job carries the job's own directory in its
environment, which finds those that left the launcher's process group, as ranks do.
"""

import contextlib
import ctypes
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from mpisync import launchers

ROOT = Path(__file__).resolve().parent.parent
TAG = "MPITEST_RUN"
STACKS = signal.SIGRTMIN + 7  # tests/site/sitecustomize.py answers it
# What a launcher left in our own environment would make a job inside believe that it is a rank.
_NOT_INHERITED = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MPI_LOCAL", "HYD", "_MPISYNC_", "PYTHONUNBUFFERED")
_HARNESS = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    # More ranks than cores, none bound, and no noise from the wheel's UCX: Open MPI 5, then 4.
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_osc": "^ucx",
    # In each MPI_Init the wheel's libfabric waits a second for network cards that are not there.
    "OMPI_MCA_btl": "^ofi",
}
# What lies below every test in a stack says nothing about it.
HARNESS_FRAMES = re.compile(r"  File .*(/_pytest/|/pluggy/|/pytest/__main__|<frozen runpy>).*\n")


@dataclass(frozen=True, slots=True)
class CompletedRun:
    """How a job ended; `left` describes the processes that outlived its launcher."""

    returncode: int
    stdout: str
    stderr: str  # ends with the stacks of all ranks where the time limit was reached
    wall_s: float
    timed_out: bool
    left: tuple[str, ...]


@functools.cache
def launcher() -> tuple[launchers.Launcher, launchers.Library]:
    """Return the launcher of the MPI that this interpreter's mpi4py loads, and that MPI."""
    library = launchers.find_library()
    return launchers.find_launcher(library), library


@pytest.fixture(params=["plain", pytest.param("ulfm", marks=pytest.mark.long)])
def launch_arguments(request):
    """The launcher's, without ULFM and with it: there ranks outlive another's death, where this MPI has it."""
    if request.param == "plain":
        return []
    _, library = launcher()
    if library.family != "openmpi" or library.version < (5,):
        pytest.skip("this MPI has no ULFM: Open MPI 5 has")
    return ["--with-ft", "ulfm"]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an environment in which plain `mpirun -n 5 python script.py` works everywhere; see tests/site too."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(_NOT_INHERITED)}
    path = [str(ROOT / "tests/site"), str(ROOT), *filter(None, [inherited.get("PYTHONPATH")])]
    return {**inherited, **_HARNESS, "PYTHONPATH": os.pathsep.join(path), **(extra or {})}


_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _end_with_us() -> None:
    """Have the launcher end its ranks when this process is killed, and could not do it itself."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


class Job:
    """A command that starts ranks, and everything that it started. A context manager."""

    def __init__(self, command: Sequence[str], folder: Path, *, env=None, stdin=None, cwd=None):
        """Start `command`; `folder` is the job's own and is removed by `close`."""
        self.folder = folder
        self.started_s = time.monotonic()
        self.started_unix_s = time.time()
        with open(folder / "stdout", "wb") as out, open(folder / "stderr", "wb") as err:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
                stdout=out,  # files: a pipe would be held open by whoever survives
                stderr=err,
                cwd=cwd,
                env={**environment(env), TAG: str(folder)},
                start_new_session=True,
                preexec_fn=_end_with_us,
            )
        if stdin is not None:
            self.process.stdin.write(stdin.encode())
            self.process.stdin.close()

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def output(self, name: str) -> str:
        """Return what the job has written to "stdout" or "stderr" so far."""
        return (self.folder / name).read_text(errors="replace")

    def ranks(self, *, alive: bool = True) -> dict[int, int]:
        """Return the process ids of the ranks that have started Python and exist, or are gone."""
        found: dict[int, int] = {}
        for file in self.folder.glob("stacks.*"):
            rank, pid = (int(part) for part in file.name.split(".")[1:])
            if (_state(pid) not in "ZX") == alive:
                found[rank] = min(pid, found.get(rank, pid))  # a rank's own children come later
        return dict(sorted(found.items()))

    def wait_for(self, text: str, name: str = "stdout", timeout_s: float = 60.0) -> None:
        """Wait until the job has written `text`; AssertionError where it does not."""
        end_s = time.monotonic() + timeout_s
        while text not in self.output(name):
            ended = self.process.poll() is not None
            assert not ended and time.monotonic() < end_s, (
                f"the job never wrote {text!r} to {name}; it "
                f"{f'ended with {self.process.returncode}' if ended else 'still runs'}:\n"
                f"{self.output('stdout')}\n{self.output('stderr')}\n{self.stacks()}"
            )
            time.sleep(0.02)

    def stacks(self) -> str:
        """Return the stacks of every rank; of one that cannot answer, why."""
        ranks = self.ranks()
        files = {rank: self.folder / f"stacks.{rank}.{pid}" for rank, pid in ranks.items()}
        asked = [rank for rank, pid in ranks.items() if _catches(pid, STACKS)]
        for rank in asked:
            _signal(ranks[rank], STACKS)
        end_s = time.monotonic() + 2.0
        while time.monotonic() < end_s and not all(files[rank].stat().st_size for rank in asked):
            time.sleep(0.02)
        time.sleep(0.1)  # what has begun to be written is soon whole
        parts = []
        for rank, pid in ranks.items():
            why = f"state {_state(pid)}" if rank in asked else "Python has ended, MPI has not"
            text = HARNESS_FRAMES.sub("", files[rank].read_text(errors="replace"))
            text = text or f"  no answer: {why}\n"
            parts.append(f"--- stacks of rank {rank} (pid {pid}) ---\n{text}")
        return "".join(parts) or "--- no rank has started Python, or all are gone ---\n"

    def finish(self, timeout_s: float = 60.0) -> CompletedRun:
        """Wait for the launcher's end, or end it after `timeout_s`; clean up in any case."""
        stacks, timed_out = "", False
        try:
            self.process.wait(max(0.0, self.started_s + timeout_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            stacks, timed_out = f"\nno end after {timeout_s:g} s\n{self.stacks()}", True
        wall_s = time.monotonic() - self.started_s
        left = self.end()
        run = CompletedRun(
            returncode=self.process.returncode,
            stdout=self.output("stdout"),
            stderr=self.output("stderr") + stacks,
            wall_s=wall_s,
            timed_out=timed_out,
            left=() if timed_out else left,
        )
        self.close()
        return run

    def pids(self) -> list[int]:
        """Return every process of this job, wherever its parents have gone."""
        tag = f"{TAG}={self.folder}\0".encode()
        found = []
        for entry in os.scandir("/proc"):
            if entry.name.isdecimal() and _state(int(entry.name)) not in "ZX":
                try:
                    if tag in Path(entry.path, "environ").read_bytes() + b"\0":
                        found.append(int(entry.name))
                except OSError:
                    pass  # gone, or another user's
        return found

    def end(self) -> tuple[str, ...]:
        """End what still runs; return what had outlived the launcher by two seconds."""
        if self.process.poll() is None:
            self.process.terminate()  # the launcher clears its own files when asked politely
            try:
                self.process.wait(3.0)
            except subprocess.TimeoutExpired:
                pass
        end_s = time.monotonic() + 2.0
        while (left := self.pids()) and time.monotonic() < end_s:
            time.sleep(0.05)
        described = tuple(f"{pid} {_state(pid)} {_words(pid)}" for pid in left)
        while left:
            for pid in left:
                _signal(pid, signal.SIGKILL)
            time.sleep(0.02)
            left = self.pids()
        self.process.wait()
        _remove_orphans(self.started_unix_s)
        return described

    def close(self) -> None:
        """End what still runs and remove the job's files."""
        if self.folder.exists():
            self.end()
            shutil.rmtree(self.folder)


def start_script(
    nprocs: int,
    code_or_path: str | Path,
    *,
    args: Sequence[str] = (),
    launcher_args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    cwd: str | Path | None = None,
) -> Job:
    """Start a user's script (its path, or its text) under plain mpirun; see `Job`."""
    folder = Path(tempfile.mkdtemp(prefix="mpisync-test-"))
    script = code_or_path
    if not isinstance(script, Path):
        script = folder / "script.py"
        script.write_text(code_or_path)
    command = [launcher()[0].path, *launcher_args, "-n", str(nprocs), sys.executable]
    return Job([*command, str(script), *args], folder, env=env, stdin=stdin, cwd=cwd)


def run_script(
    nprocs: int, code_or_path: str | Path, *, timeout_s: float = 60.0, **options
) -> CompletedRun:
    """Run a script under plain mpirun to its end; the options are those of `start_script`."""
    with start_script(nprocs, code_or_path, **options) as job:
        return job.finish(timeout_s)


def _state(pid: int) -> str:
    """Return a process's state as the kernel writes it (R, S, T, Z, ...); X where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def _catches(pid: int, number: int) -> bool:
    """Return whether a process has a handler for a signal, which would else kill it."""
    try:
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return False
    return bool(int(caught[1], 16) >> (number - 1) & 1)


def _words(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()[:120]
    except OSError:
        return "?"


def _changed_s(file: Path) -> float:
    """Return when a file was last written; 0 where it is gone."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _remove_orphans(since_unix_s: float) -> None:
    """Remove the MPIs' shared memory, made since then, of which killed ranks were the last users."""
    old_s = time.time() - 1.0  # younger ones may be about to be mapped
    orphans = {
        str(file)
        for pattern in ("mpich_shm_*", "sm_segment.*")
        for file in Path("/dev/shm").glob(pattern)
        if since_unix_s <= _changed_s(file) <= old_s
    }
    for maps in Path("/proc").glob("[0-9]*/maps") if orphans else ():
        try:
            orphans.difference_update(re.findall(r"/dev/shm/\S+", maps.read_text()))
        except OSError:
            pass  # gone
    for file in orphans:
        with contextlib.suppress(OSError):  # gone, or another user's
            Path(file).unlink()


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
