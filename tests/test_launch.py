"""The tests' own machinery: ranks that fail, die, hang or linger must not go unseen."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch import ROOT, environment, launcher, run_script, start_script

CONFTEST = "from parallel import comm, pytest_configure\n"
INI = "[pytest]\naddopts = -p no:mpi-pytest --strict-markers\nfilterwarnings = error\n"
BAD = """
import os, signal, subprocess, time
import pytest

pytestmark = pytest.mark.parallel(3)

def test_first_passes(comm):
    assert comm.allreduce(1) == 3

def test_one_rank_fails(comm):
    print("said by", comm.rank)
    assert comm.rank != 1, "the odd one out"

def test_others_wait_for_the_failed(comm):
    assert comm.rank != 2
    comm.Barrier()

@pytest.mark.timeout(2)
def test_one_rank_hangs(comm):
    if comm.rank == 1:
        time.sleep(1000)
    comm.Barrier()

def test_one_rank_is_killed(comm):
    if comm.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.Barrier()

@pytest.mark.parametrize("path", ["a", "b/c d"])
def test_goes_on_after_failures(comm, tmp_path, path):
    assert comm.allreduce(1) == 3
    assert len(set(comm.allgather(tmp_path))) == 3

def test_skips(comm):
    pytest.skip("for a reason")

def test_a_process_outlives_the_job(comm):
    if comm.rank == 0:
        subprocess.Popen(["sleep", "1000"], start_new_session=True).returncode = 0
"""


def pytest_in(folder: Path, command: list[str], timeout_s: float = 100.0) -> str:
    """Run pytest in a folder of test files, by `command`, and return what it printed."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text(INI)
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    run = subprocess.run(
        [*command, sys.executable, "-m", "pytest", "-rA", "--color=no", "-p", "no:cacheprovider"],
        cwd=folder,
        env=environment({"PYTHONPATH": path, "COLUMNS": "200"}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
    return run.stdout


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "test_bad.py").write_text(BAD)
    return pytest_in(folder, [])


def section(output: str, test: str) -> str:
    """Return what pytest's list of failures says of one test."""
    found = re.search(rf"^_+ .*{test} _+$(.*?)^(_|=){{3,}} ", output, re.M | re.S)
    assert found, output
    return found[1]


def test_a_failure_names_its_rank_and_shows_what_it_said(bad):
    text = section(bad, "test_one_rank_fails")
    assert "rank 1 of 3: AssertionError: the odd one out" in text
    assert "said by 1" in text and "said by 0" not in text


def test_a_failure_ends_the_wait_of_the_other_ranks(bad):
    text = section(bad, "test_others_wait_for_the_failed")
    # Where freeing the communicator waits for all, rank 2 has not finished either.
    assert re.search(r"ranks 0, 1(, 2)? of 3 had not finished the test", text)
    assert "rank 2 of 3: assert 2 != 2" in text
    assert text.count("in test_others_wait_for_the_failed") == 2, "stacks of ranks 0 and 1"


def test_a_hang_shows_the_stacks_of_all_ranks(bad):
    text = section(bad, "test_one_rank_hangs")
    assert "timed out after 2 s" in text
    stacks = text.split("--- stacks of rank ")[1:]
    assert [s.split()[0] for s in stacks] == ["0", "1", "2"]
    line = 1 + BAD.splitlines().index("        time.sleep(1000)")
    assert [f"line {line} in test_one_rank_hangs" in s for s in stacks] == [False, True, False]


def test_a_killed_rank_is_reported_with_its_signal(bad):
    text = section(bad, "test_one_rank_is_killed")
    assert re.search(r"mpirun ended; first seen gone: ranks \d(, \d)*;", text)
    assert "signal 9" in text
    if launcher()[0].family == "openmpi":  # MPICH's launcher may blame a rank that it has ended itself
        assert re.search(r"rank\s+2\b.*exited\s+on\s+signal\s+9", text, re.S)


def test_a_process_left_behind_is_an_error(bad):
    assert re.search(r"mpirun ended with 0 after the tests had passed; left: \('\d+ S sleep", bad), bad


def test_each_test_has_its_own_outcome(bad):
    assert "4 passed" in bad and "1 skipped" in bad and "4 failed" in bad and "1 error" in bad, bad


SHARES = """
import os
import pytest

@pytest.mark.parallel(2)
@pytest.mark.parametrize("rank", [0, 1])
def test_passes(comm, rank):
    with open(f"jobs.{comm.rank}", "a") as file:
        print(os.environ["MPITEST_RUN"], file=file)
    assert comm.rank != 1 or FAILS != rank
"""


@pytest.mark.parametrize(("fails", "jobs"), [(None, [0, 0, 0, 0]), (0, [0, 1, 1, 1])])
def test_modules_share_a_job_until_a_test_fails(tmp_path, fails, jobs):
    for name, own in (("a", fails), ("b", None)):
        (tmp_path / f"test_{name}.py").write_text(f"FAILS = {own}\n{SHARES}")
    output = pytest_in(tmp_path, [])
    assert f"{4 - (fails is not None)} passed" in output, output
    for rank in range(2):
        found = (tmp_path / f"jobs.{rank}").read_text().split()
        assert [list(dict.fromkeys(found)).index(job) for job in found] == jobs


WORLD = """
import pytest

def test_serial():
    pass

@pytest.mark.parallel(3)
def test_three():
    from mpi4py import MPI
    assert MPI.COMM_WORLD.allreduce(1) == 3

@pytest.mark.parallel(2)
def test_two_of_three(comm):
    assert comm.allreduce(1) == 2

@pytest.mark.parallel(5)
def test_five(comm):
    raise AssertionError

@pytest.mark.parallel(2)
def test_fails_on_one(comm):
    assert comm.rank != 1
"""


def test_under_mpirun_tests_run_in_that_job(tmp_path):
    (tmp_path / "test_world.py").write_text(WORLD)
    output = pytest_in(tmp_path, [launcher()[0].path, "-n", "3"])
    for name in ("serial", "three", "two_of_three", "fails_on_one"):
        assert f"PASSED test_world.py::test_{name}" in output, output
    assert "it wants mpirun -n 5, and this is -n 3" in output
    assert "rank 1 of 3: test_world.py::test_fails_on_one" in output
    assert "4 passed, 1 skipped" in output


HANG = """
import time
import pytest

@pytest.mark.parallel(2)
@pytest.mark.timeout(1)
def test_hangs(comm):
    time.sleep(1000)
"""


def test_under_mpirun_a_hang_shows_the_stacks_of_all_ranks(tmp_path):
    (tmp_path / "test_hang.py").write_text(HANG)
    output = pytest_in(tmp_path, [launcher()[0].path, "-n", "2"], timeout_s=60)
    for rank in range(2):
        assert f"rank {rank} of 2: test_hang.py::test_hangs took over 1 s" in output, output
    assert output.count("line 8 in test_hangs") == 2


def test_run_script_returns_what_the_job_returned():
    script = (
        "import sys; from mpi4py import MPI; rank = MPI.COMM_WORLD.rank\n"
        "sys.stderr.write(f'err{rank} ') if rank else print(sys.argv[1], MPI.COMM_WORLD.size)\n"
        "sys.exit(7 if rank == 2 else 0)"
    )
    run = run_script(3, script, args=["word"])
    assert (run.returncode, run.timed_out, run.left) == (7, False, ())
    assert "word 3" in run.stdout and "err2" in run.stderr


@pytest.mark.parametrize("compiler", ["", "import torch._dynamo"])
def test_a_script_has_torchs_compiler_only_where_it_imports_it(compiler):
    script = f"""
import sys, torch
{compiler}
optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
optimizer.zero_grad()
print("torch._dynamo" in sys.modules, hasattr(torch.optim.SGD.zero_grad.__wrapped__, "__dynamo_disable"))
"""
    run = run_script(1, script)
    assert run.stdout.split() == 2 * [str(bool(compiler))], run.stderr


def test_run_script_ends_what_hangs_and_shows_where():
    script = (
        "import os, time; from mpi4py import MPI; rank = MPI.COMM_WORLD.rank\n"
        "if rank == 1: os.kill(os.getpid(), 19)\n"
        "time.sleep(1000)"
    )
    started_s = time.monotonic()
    with start_script(3, script) as job:
        run = job.finish(6.0)
        assert job.pids() == [], "no process of the job is left"
    assert run.timed_out and time.monotonic() - started_s < 20
    assert re.search(r"rank 1 .*\n  no answer: state T", run.stderr), run.stderr
    assert run.stderr.count("line 3 in <module>") == 2
    assert not job.folder.exists()


def test_a_job_can_be_met_while_it_runs():
    script = (
        "import time; from mpi4py import MPI; rank = MPI.COMM_WORLD.rank\n"
        "print('up', rank, flush=True); time.sleep(1000)"
    )
    with start_script(2, script) as job:
        job.wait_for("up 1")
        ranks = job.ranks()
        assert sorted(ranks) == [0, 1]
        os.kill(ranks[1], 9)
        run = job.finish(20.0)
    assert run.returncode != 0 and not run.timed_out and run.left == ()


def test_a_killed_starter_takes_its_job_along():
    ranks = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    starter = f"""
import sys, time
from launch import start_script
with start_script(2, {ranks!r}) as job:
    while len(job.output("stdout").split()) < 2:
        time.sleep(0.02)
    print(job.output("stdout"), flush=True)
    time.sleep(60)
"""
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    with subprocess.Popen(
        [sys.executable, "-c", starter], env=environment({"PYTHONPATH": path}), stdout=subprocess.PIPE, text=True
    ) as process:
        pids = [int(process.stdout.readline()) for _ in range(2)]
        process.kill()
    end_s = time.monotonic() + 20.0
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end_s, "the ranks outlived whoever started them"
        time.sleep(0.05)
