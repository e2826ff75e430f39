"""The watcher of a node's ranks, under launchers that do nothing about a rank's end, as under ULFM; no MPI needed."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch import ROOT, environment

from mpisync import watcher

# Starts ranks, and then ends well when it is asked to; {name} is what its process is called.
LAUNCHER = """
import os, signal, subprocess, sys, time
from mpisync import siblings
siblings.mark(sys.argv[1])
def rank(number):
    variables = dict(OMPI_COMM_WORLD_RANK=number, OMPI_COMM_WORLD_SIZE=3, OMPI_COMM_WORLD_LOCAL_SIZE=3,
                     OMPI_MCA_mpi_ft_enable=1, PMIX_NAMESPACE="job")
    env = {**os.environ, **{key: str(value) for key, value in variables.items()}}
    return subprocess.Popen([sys.executable, "-c", sys.argv[2]], env=env, start_new_session=True)
ranks = [rank(number) for number in range(3)]
def asked(number, frame):
    print("launcher asked", flush=True)
    for process in ranks:
        process.kill()
    sys.exit(9)
signal.signal(signal.SIGTERM, asked)
for process in ranks:
    process.wait()
if sys.argv[1] == "prted":
    time.sleep(60)  # it stays as long as the job does
"""
RANK = """
import os, signal, subprocess, sys, time
{before}
import mpisync
rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
{behind}
"""
STAYS = "time.sleep(60 if rank != 1 else 0)"


def start(behind, *, before="", name="mpirun"):
    """Run a job to its end: exit code, seconds, what it printed; nothing of it is left."""
    began_s = time.monotonic()
    env = {**environment(), "WATCHED": f"{os.getpid()}-{began_s}"}
    script = RANK.format(before=before, behind=behind)
    command = [sys.executable, "-c", LAUNCHER, name, script]
    try:
        job = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=25)
        took_s = time.monotonic() - began_s
        end_s = time.monotonic() + 2.0
        while left := _with(f"WATCHED={env['WATCHED']}"):
            assert time.monotonic() < end_s, f"left behind: {left}"
            time.sleep(0.05)
    finally:
        for pid in _with(f"WATCHED={env['WATCHED']}"):
            os.kill(pid, 9)
    return job, took_s


def _with(entry):
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if entry.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes()[:80]
        except OSError:
            pass
    return found


def test_a_good_end_is_left_alone():
    job, took_s = start("time.sleep(0.5 * rank)")
    assert (job.returncode, job.stdout, job.stderr) == (0, "", "")


@pytest.mark.parametrize("end", ["os._exit(3)", "os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_a_rank_that_is_gone_without_a_goodbye_ends_the_job(end):
    job, took_s = start(f"time.sleep(1); {end} if rank == 1 else time.sleep(60)")
    assert job.returncode == 9 and job.stdout.count("launcher asked") == 1
    assert "rank 1 (pid" in job.stderr and "did not come to the end: the job is ended" in job.stderr
    assert job.stderr.count("\n") == 1 and took_s < 12


def test_ranks_that_are_past_python_are_ended_too():
    """As in MPI_Finalize: they have said goodbye, and run nothing of ours any more."""
    behind = "import ctypes; mpisync.ending._at_exit(); ctypes.PyDLL(None).sleep(60)"
    job, took_s = start(f"time.sleep(1)\nif rank == 1: os._exit(3)\n{behind}")
    assert job.returncode == 9 and took_s < 12


def test_ranks_that_never_come_to_python_are_ended_too():
    """As in MPI_Init, which holds the interpreter's lock; one rank has come, and watches."""
    before = "import ctypes; r = os.environ['OMPI_COMM_WORLD_RANK']; r == '1' and ctypes.PyDLL(None).sleep(60)"
    job, took_s = start("os._exit(3) if rank == 2 else time.sleep(60)", before=before)
    assert job.returncode == 9 and "rank 2 (pid" in job.stderr and took_s < 12


def test_a_rank_that_dies_before_it_imports_mpisync_ends_the_job():
    before = "os.environ['OMPI_COMM_WORLD_RANK'] == '2' and (time.sleep(2), os._exit(1))"
    job, took_s = start("time.sleep(60)", before=before)
    assert job.returncode == 9 and "rank 2 (pid" in job.stderr and took_s < 14


def test_a_rank_that_was_never_seen_ends_the_job():
    before = "os.environ['OMPI_COMM_WORLD_RANK'] == '2' and os._exit(1); time.sleep(1)"
    job, took_s = start("time.sleep(60)", before=before)
    assert job.returncode == 9 and "1 of the 3 ranks that were started here" in job.stderr and took_s < 16


@pytest.mark.parametrize("behind", ["raise OSError('on purpose')", "sys.exit(7)"])
def test_an_error_ends_the_job_without_mpi(behind):
    job, took_s = start(f"time.sleep(1)\nif rank == 1: {behind}\ntime.sleep(60)")
    said = "OSError: on purpose" if "raise" in behind else "rank 1 exits with 7 and rank 0 (pid"
    assert job.returncode == 9 and said in job.stderr and "did not come" not in job.stderr and took_s < 14


def test_a_daemon_of_another_node_is_ended_last():
    """mpirun's exit code would be 0, so other nodes are given time to notice by themselves."""
    ranks = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    job, took_s = start(f"time.sleep(1)\nif rank == 1: os._exit(3)\n{ranks}", name="prted")
    assert job.returncode == 9 and job.stdout.count("launcher asked") == 1 and 6 < took_s < 16


def test_a_rank_below_a_wrapper_and_two_programs_in_a_row_are_understood():
    script = RANK.format(before="", behind="time.sleep(0.5 + 0.5 * rank)")
    before = f"for _ in range(2): subprocess.run([sys.executable, '-c', {script!r}])\nraise SystemExit"
    job, _ = start("", before=before)
    assert (job.returncode, job.stdout, job.stderr) == (0, "", "")


def test_what_a_rank_starts_is_no_rank():
    """Neither forks nor programs say hello or goodbye for their rank, nor end the job by their own end."""
    behind = """
if os.fork() == 0:
    raise OSError("a fork's own")
os.wait()
for code in ("import mpisync", "import mpisync, sys; sys.exit(3)", "import mpisync; raise OSError('its own')"):
    subprocess.run([sys.executable, "-c", code])
time.sleep(2 + rank)
"""
    job, took_s = start(behind)
    assert job.returncode == 0 and job.stderr.count("OSError: its own") == 3 and "mpisync:" not in job.stderr


def test_the_launchers_death_ends_the_ranks():
    job, took_s = start("rank == 1 and (time.sleep(1), os.kill(os.getppid(), 9)); time.sleep(60)")
    assert job.returncode == -9 and took_s < 10


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_what_other_users_tell_is_not_heard():
    """A socket in the abstract name space has no owner, and "failed" ends a job."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        sock.bind(f"\0mpisync-test-{os.getpid()}")
        one = watcher.Watcher(sock, os.getpid())
        one._hear("hello", 0, os.getpid())
        tell = (
            "import os, socket, sys; os.setuid(int(sys.argv[1]));"
            "socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(sys.argv[2].encode(), chr(0) + sys.argv[3])"
        )
        for user, heard in ((65534, set()), (os.getuid(), {0})):
            words = f"failed 0 {os.getpid()}"
            subprocess.run([sys.executable, "-c", tell, str(user), words, f"mpisync-test-{os.getpid()}"], check=True)
            one._look(0.2)
            assert one._failed == heard
