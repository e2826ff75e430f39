"""`mpisync run` as users type it: it finds the launcher, becomes it, and hands everything through."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from launch import environment, launcher

HELLO = """
import os, sys
from mpi4py import MPI
comm = MPI.COMM_WORLD
said = sys.stdin.readline().strip() if comm.rank == 0 else ""
lines = comm.gather((comm.rank, os.environ.get("MPISYNC_POLICY"), sys.argv[1:], said))
for line in lines or []:
    print(*line)
sys.exit(3 if comm.rank == 1 and "fail" in sys.argv else 0)
"""


def mpisync_run(*arguments, cwd, env=None, stdin="word\n", timeout_s=60):
    # Without the harness's own permissions: `run` itself allows root and more ranks than cores.
    plain = {k: v for k, v in environment(env).items() if not k.startswith(("OMPI_", "PRTE_"))}
    return subprocess.run(
        [sys.executable, "-m", "mpisync", "run", *arguments],
        cwd=cwd, env=plain, input=stdin, capture_output=True, text=True, timeout=timeout_s,
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "hello.py").write_text(HELLO)
    return tmp_path


def test_more_ranks_than_cores_with_arguments_input_and_the_policy(folder):
    run = mpisync_run("-n", "5", "--policy", "backup:1", "hello.py", "-n", "x y", cwd=folder)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        f"{rank} backup:1 ['-n', 'x y'] {'word' if rank == 0 else ''}" for rank in range(5)
    ]


def test_the_exit_code_is_the_jobs(folder):
    assert mpisync_run("-n", "2", "hello.py", "fail", cwd=folder).returncode == 3


def test_a_module_is_started_as_python_does(folder):
    run = mpisync_run("-n", "2", "-m", "hello", "word", cwd=folder)
    assert run.returncode == 0 and "1 None ['word']" in run.stdout, run.stderr


def test_a_dry_run_shows_the_command_and_starts_nothing(folder):
    run = mpisync_run("-n", "2", "--dry-run", "--launcher-args", "-v -x", "hello.py", "a b", cwd=folder)
    words = shlex.split(run.stdout)
    assert words[0] == launcher()[0].path
    assert words[-8:] == ["-v", "-x", "-n", "2", sys.executable, "-u", "hello.py", "a b"]


def test_a_signal_reaches_the_job(folder):
    (folder / "wait.py").write_text(
        "import os, time; from mpi4py import MPI; os.write(1, b'up\\n'); time.sleep(1000)"
    )
    command = [sys.executable, "-m", "mpisync", "run", "-n", "2", "wait.py"]
    with subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as job:
        assert job.stdout.readline() == b"up\n"
        started_s = time.monotonic()
        job.send_signal(signal.SIGTERM)
        job.communicate(timeout=30)
    assert job.returncode != 0 and time.monotonic() - started_s < 15


@pytest.mark.parametrize("launch_arguments", ["ulfm"], indirect=True)
@pytest.mark.parametrize("dies", ["os._exit(3)", "os.kill(os.getpid(), 9)", "raise OSError('on purpose')"])
def test_under_ulfm_a_rank_that_ends_before_it_imports_anything_ends_the_job(folder, launch_arguments, dies):
    """The others wait in MPI_Init, where no Python runs, and have not imported mpisync."""
    (folder / "early.py").write_text(
        "import os, time\n"
        f"if os.environ['OMPI_COMM_WORLD_RANK'] == '1': time.sleep(1); {dies}\n"
        "from mpi4py import MPI\n"
        "import mpisync"
    )
    began_s = time.monotonic()
    run = mpisync_run("--ulfm", "-n", "5", "early.py", cwd=folder)
    assert run.returncode != 0 and time.monotonic() - began_s < 20
    assert re.search(r"mpisync: rank 1 \(pid \d+\) did not come to the end: the job is ended\n", run.stderr), run.stderr


def test_under_ulfm_a_good_end_is_a_plain_one(folder, launch_arguments):
    run = mpisync_run(*(["--ulfm"] if launch_arguments else []), "-n", "5", "hello.py", cwd=folder)
    assert run.returncode == 0 and len(run.stdout.splitlines()) == 5 and run.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        (["-n", "2", "missing.py"], {}, "there is no script 'missing.py'"),
        (["-n", "0", "hello.py"], {}, "at least 1, not 0"),
        (["hello.py"], {}, "say how many ranks"),
        (["-n", "2", "--policy", "first:3", "hello.py"], {}, "a policy must be one of backup:B"),
        (["-n", "2", "hello.py"], {"MPI4PY_LIBMPI": "/nowhere.so"}, "cannot load an MPI library"),
        (
            ["-n", "2", "hello.py"],
            {"PMI_RANK": "1", "PMI_SIZE": "4"},
            "already rank 1 of 4 of an MPICH launcher",
        ),
    ],
)
def test_mistakes_are_told_in_one_line_at_once(folder, arguments, env, message):
    run = mpisync_run(*arguments, cwd=folder, env=env)
    assert run.returncode == 1 and run.stdout == ""
    assert message in run.stderr and len(run.stderr.splitlines()) == 1, run.stderr


def test_a_misspelt_setting_is_named(folder):
    env = {"MPISYNC_POLICI": "x"}
    run = mpisync_run("-n", "1", "--dry-run", "hello.py", cwd=folder, env=env)
    assert run.returncode == 0 and "MPISYNC_POLICI is set, and mpisync has no such" in run.stderr


def test_the_ranks_of_an_allocation_are_the_default(folder):
    env = {"SLURM_NTASKS": "3", "SLURM_PROCID": "0"}
    run = mpisync_run("--dry-run", "hello.py", cwd=folder, env=env)
    assert " -n 3 " in run.stdout, run.stderr


def test_the_command_and_the_module_are_one():
    script = os.path.join(os.path.dirname(sys.executable), "mpisync")
    asked = [[script, "--help"], [sys.executable, "-m", "mpisync", "--help"]]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, timeout=60) for command in asked
    )
    assert first.returncode == 0 and first.stdout == second.stdout
