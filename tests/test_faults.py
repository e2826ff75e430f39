"""Ranks that fail, end, hang or die under plain mpirun: the job ends, says why and leaves nothing."""

import os
import signal
import subprocess
import sys
import time

import pytest
from launch import run_script, start_script

LIMIT_S = 30.0  # of a job; ENDS_S is what it may take after the fault
ENDS_S = 10.0

HEAD = """
import os, signal, sys, time
import numpy as np
from mpi4py import MPI
from mpisync.policies import BackupWorkers
from mpisync.session.partial_reduce import PartialReduce
comm = MPI.COMM_WORLD
rank, root = comm.rank, comm.size - 1
theta = np.zeros(1000, np.float32)
def say(*words):
    print(rank, *words, flush=True)
def fault(why):
    say("fault", f"{time.time():.3f}")
"""

LOOP = """
with PartialReduce(comm, like=theta, policy=BackupWorkers({backup})) as reduction:
    if reduction.is_root:
        for step in reduction.serve({steps}):
            {at_root}
            theta += step.mean
            step.publish(theta)
    else:
        count = 0
        while reduction.pull(theta):
            {at_worker}
            count += 1
            reduction.push(np.ones_like(theta))
say("done", f"{{time.time():.3f}}", theta[0])
"""


def script(*, before="", at_root="pass", at_worker="pass", backup=0, steps=50):
    loop = LOOP.format(backup=backup, steps=steps, at_root=at_root, at_worker=at_worker)
    return HEAD + before + "\n" + loop


def check(run, *said, fails=True):
    """The job ended in time, as it should, said so, and left no process."""
    ended_s = time.time()
    text = f"{run.stdout}\n{run.stderr}"
    assert not run.timed_out, text
    assert (run.returncode != 0) == fails, f"exit code {run.returncode}\n{text}"
    assert run.left == (), text
    for words in said:
        assert words in run.stderr, f"{words!r} was not said:\n{text}"
    for line in run.stdout.splitlines():
        if " fault " in line:
            assert ended_s - float(line.split()[2]) < ENDS_S + 2.0, "took too long to end"
    return run


def ranks_of(launch_arguments):
    """Two workers and the root; five under ULFM, where MPI_Abort by one of four ranks or more ends only that one."""
    return 5 if launch_arguments else 3


def run_all(launch_arguments, code, timeout_s=LIMIT_S):
    """Run a script on `ranks_of` them."""
    return run_script(ranks_of(launch_arguments), code, timeout_s=timeout_s, launcher_args=launch_arguments)


# Where rank WHO fails, by ENDS, and what the others do meanwhile.
AT = "if rank == {who}: fault(0); {end}"
PLACES = {
    "before all": lambda end: EARLY + AT.format(who=1, end=end) + "\ncomm.Barrier()",
    "before the reduction": lambda end: script(before=AT.format(who=1, end=end)),
    "in a worker": lambda end: script(at_worker=f"if rank == 1 and count == 5: fault(0); {end}", steps=10**6),
    "in the root": lambda end: script(at_root=f"if step.step == 5: fault(0); {end}", steps=10**6),
    "at a barrier": lambda end: script(steps=5) + AT.format(who=0, end=end) + "\ncomm.Barrier()",
    "in finalize": lambda end: script(steps=5) + AT.format(who=0, end="time.sleep(1); " + end),
}
KILLED = ("before the reduction", "in a worker", "in the root", "in finalize")
ENDS = {
    "an exception": "raise OSError('on purpose')",
    "an interrupt": "raise KeyboardInterrupt",
    "an exit": "sys.exit(3)",
    "a bare exit": "os._exit(3)",
    "a kill": "os.kill(os.getpid(), 9)",
}
EARLY = """
import os, sys, time
import mpisync
from mpi4py import MPI
comm = MPI.COMM_WORLD
rank = comm.rank
def fault(why):
    print(rank, "fault", f"{time.time():.3f}", flush=True)
"""


@pytest.mark.parametrize(
    ("place", "end"),
    [
        *((place, end) for place in PLACES for end in ("an exception", "an exit")),
        *((place, "a bare exit") for place in PLACES if place not in KILLED),
        *(pytest.param(place, "a bare exit", marks=pytest.mark.long) for place in KILLED),  # as sudden as a kill
        *((place, "a kill") for place in KILLED),
        ("in a worker", "an interrupt"),
    ],
)
def test_however_and_wherever_a_rank_ends_the_job_does(launch_arguments, place, end):
    code = PLACES[place](ENDS[end])
    run = check(run_all(launch_arguments, code, timeout_s=2 * LIMIT_S))
    assert " fault " in run.stdout
    if end == "an exception":
        assert "OSError: on purpose" in run.stderr and run.stderr.count("Traceback") == 1
    if place != "at a barrier" and place != "in finalize":
        assert "done" not in run.stdout


def test_two_ranks_that_fail_at_once_both_say_why(launch_arguments):
    code = script(before="comm.Barrier()\nif rank < 2: fault(0); raise OSError(f'on purpose by {rank}')")
    run = check(run_all(launch_arguments, code))
    assert 1 <= run.stderr.count("OSError: on purpose by") <= 2  # the first may end the job before the second speaks


def test_an_error_at_import_on_one_rank_ends_the_job(launch_arguments):
    code = EARLY.replace("comm =", "if os.environ.get('OMPI_COMM_WORLD_RANK', os.environ.get('PMI_RANK')) == '1':\n"
                         "    import no_such_module\ncomm =") + "comm.Barrier()"
    check(run_all(launch_arguments, code), "ModuleNotFoundError")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_ends_the_job(launch_arguments, number):
    code = script(at_worker="say('count', count)", steps=10**6)
    with start_script(ranks_of(launch_arguments), code, launcher_args=launch_arguments) as job:
        job.wait_for("0 count 5\n")
        os.kill(job.process.pid, number)
        sent_s = time.monotonic()
        run = check(job.finish(2 * LIMIT_S))
        assert time.monotonic() - sent_s < ENDS_S + 2.0
    assert "did not come to the end" not in run.stderr, "nobody is to blame"


def test_what_fails_in_a_fork_of_a_rank_ends_nothing(launch_arguments):
    code = HEAD + """
if rank == 1 and os.fork() == 0:
    try:
        raise OSError("in a fork")
    except OSError:
        sys.excepthook(*sys.exc_info())
    os._exit(0)
comm.Barrier()
time.sleep(1)
say("done")
"""
    run = check(run_all(launch_arguments, code), fails=False)
    assert run.stdout.count("done") == ranks_of(launch_arguments) and "OSError: in a fork" in run.stderr


def test_ending_well_is_silent(launch_arguments):
    run = check(run_all(launch_arguments, script()), fails=False)
    assert run.stderr == "" and run.stdout.count("done") == ranks_of(launch_arguments)


@pytest.mark.parametrize("transport", ["shared", "messages"])
def test_an_exception_in_a_workers_loop_ends_the_job_with_its_traceback(transport):
    at_worker = "if rank == 1 and count == 5: fault(0); raise ZeroDivisionError('by a worker')"
    env = {"MPISYNC_TRANSPORT": transport}
    run = check(
        run_script(4, script(at_worker=at_worker), timeout_s=LIMIT_S, env=env),
        "ZeroDivisionError: by a worker",
        "Traceback",
        "rank 1",
    )
    assert run.stderr.count("Traceback") == 1, "the other ranks say one line each"
    assert "done" not in run.stdout


@pytest.mark.parametrize("transport", ["shared", "messages"])
def test_an_exception_in_the_roots_loop_ends_the_job_with_its_traceback(transport):
    at_root = "if step.step == 5: fault(0); raise ZeroDivisionError('by the root')"
    env = {"MPISYNC_TRANSPORT": transport}
    run = check(
        run_script(3, script(at_root=at_root), timeout_s=LIMIT_S, env=env),
        "ZeroDivisionError: by the root",
        "Traceback",
    )
    assert run.stderr.count("Traceback") == 1
    assert "done" not in run.stdout


def test_a_rank_that_exits_before_the_reduction_is_named(launch_arguments):
    before = "if rank == 1: fault(0); sys.exit(0)"
    run = run_all(launch_arguments, script(before=before))
    check(run, "rank 1", "ended while")
    assert "done" not in run.stdout


def test_an_exit_with_an_error_leaves_nobody_waiting():
    code = script(steps=5) + "if rank == 1: fault(0); sys.exit(7)\ncomm.Barrier()"
    run = check(run_script(3, code, timeout_s=LIMIT_S), "rank 1 exits with 7 and rank 0 (pid")
    assert run.returncode == 7


def test_a_worker_that_outlives_anothers_failure_is_not_killed_for_it():
    code = """
try:
    with PartialReduce(comm, like=theta, policy=BackupWorkers(1)) as reduction:
        if reduction.is_root:
            for step in reduction.serve():
                step.publish(theta)
        count = 0
        while not reduction.is_root and reduction.pull(theta):
            count += 1
            if rank == 1: break
            if rank == 0 and count == 20:
                time.sleep(1)
                raise ValueError("caught")
            reduction.push(np.ones_like(theta))
            time.sleep(0.002)
except (ValueError, RuntimeError) as error:
    if rank == 1: time.sleep(5)  # it saves what it has
    say("saved", type(error).__name__, reduction.parameters[0])
"""
    run = check(run_script(4, HEAD + code, timeout_s=LIMIT_S), fails=False)
    assert run.stdout.count("saved") == 4 and run.stderr == ""


def test_an_exit_that_is_caught_and_one_without_an_error_end_nothing():
    code = """
def leave():
    try:
        sys.exit(7)
    except SystemExit:
        pass
leave()
say("went on")
if rank == 1: sys.exit(0)
time.sleep(4)
"""
    run = check(run_script(3, script(steps=5) + code, timeout_s=LIMIT_S), fails=False)
    assert run.stderr == "" and run.stdout.count("went on") == 3


def test_an_exit_that_waits_for_long_says_for_whom():
    code = script(steps=5) + "from mpisync import ending\nending._ENDED_S = 1.0\nif rank == 1: time.sleep(3)"
    run = run_script(3, code, timeout_s=LIMIT_S)
    check(run, "rank 0 has ended; its exit waits for rank 1 (pid", fails=False)


def test_a_run_after_a_caught_failure_meets_wherever_the_first_had_ended():
    """Rank 1 leaves its loop in the moment of the failure, so that it never says goodbye to the root."""
    code = HEAD + """
def run(fails):
    with PartialReduce(comm, like=theta, policy=BackupWorkers(1)) as reduction:
        if reduction.is_root:
            for step in reduction.serve(None if fails else 20):
                step.publish(theta)
        count = 0
        while not reduction.is_root and reduction.pull(theta):
            count += 1
            if fails and rank == 1: break
            if fails and rank == 0 and count == 20:
                time.sleep(1)
                raise ValueError("caught")
            reduction.push(np.ones_like(theta))
            time.sleep(0.002)
for fails in (True, False):
    try:
        run(fails)
    except (ValueError, RuntimeError) as error:
        say(type(error).__name__)
    else:
        say("fine", fails)
"""
    run = check(run_script(4, code, timeout_s=LIMIT_S), fails=False)
    assert run.stdout.count("fine False") == 4


def test_ranks_outside_of_a_communicator_may_end_before_others_reach_it():
    code = """
from mpi4py import MPI
import sys, time
import numpy as np
from mpisync.policies import BackupWorkers
from mpisync.session.partial_reduce import PartialReduce
world = MPI.COMM_WORLD
comm = world.Split(world.rank % 2, world.rank)
if world.rank % 2 == 0:
    time.sleep(4.0 if world.rank == 0 else 0.0)  # longer than it takes to notice that others have ended
    theta = np.zeros(10, np.float32)
    with PartialReduce(comm, like=theta, policy=BackupWorkers(0)) as reduction:
        for step in reduction.serve(3) if reduction.is_root else ():
            step.publish(theta + 1)
        while not reduction.is_root and reduction.pull(theta):
            reduction.push(theta)
    print(world.rank, "done", flush=True)
"""
    run = check(run_script(5, code, timeout_s=LIMIT_S), fails=False)
    assert run.stdout.count("done") == 3 and run.stderr == ""


def test_a_rank_that_never_comes_is_named_and_the_wait_has_an_end():
    before = "if rank == 1: fault(0); time.sleep(60)"
    env = {"MPISYNC_STALL_REPORT_S": "1", "MPISYNC_START_TIMEOUT_S": "3"}
    run = run_script(3, script(before=before), timeout_s=LIMIT_S, env=env)
    check(run, "waits for 1 s for rank 1 (pid", "after 3 s not all 3 ranks have come", "missing")


@pytest.mark.parametrize("transport", ["shared", "messages"])
def test_a_stopped_worker_delays_nothing_and_is_killed_at_the_end(launch_arguments, transport):
    at_worker = (
        "time.sleep(0.01)\n"
        "            if rank == 1 and count == 9:\n"
        "                say('stops', time.time()); os.kill(os.getpid(), signal.SIGSTOP)"
    )
    code = script(backup=1, steps=100, at_worker=at_worker)
    env = {"MPISYNC_TRANSPORT": transport}
    run = run_script(4, code, timeout_s=LIMIT_S + 15.0, launcher_args=launch_arguments, env=env)
    ended_s = time.time() - 2.0  # which the clean-up may take
    said = ("rank 1 (", "did not come to the end of the training at version 100")
    check(run, *said, fails=True)
    done = [line.split() for line in run.stdout.splitlines() if " done " in line]
    assert sorted(line[0] for line in done) == ["0", "2", "3"], run.stdout
    assert all(line[3] == "100.0" for line in done), "all of them had the final parameters"
    stopped_s = next(float(ln.split()[2]) for ln in run.stdout.splitlines() if " stops " in ln)
    trained_s = max(float(line[2]) for line in done if line[0] != "3")  # the root waits its grace
    assert trained_s - stopped_s < ENDS_S, "a stopped worker must delay nobody"
    assert ended_s - trained_s < ENDS_S


def test_a_worker_that_is_stopped_for_a_while_catches_up():
    at_worker = "time.sleep(0.01); say('count', count)"
    code = script(backup=1, steps=200, at_worker=at_worker)
    with start_script(4, code) as job:
        job.wait_for("1 count 5\n")
        pid = job.ranks()[1]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.5)
        os.kill(pid, signal.SIGCONT)
        run = check(job.finish(LIMIT_S), fails=False)
    assert run.stdout.count("done") == 4


def test_the_stall_report_names_whom_a_step_waits_for():
    at_worker = "time.sleep(3 if rank == 0 and count == 2 else 0)"
    env = {"MPISYNC_STALL_REPORT_S": "1"}
    run = run_script(3, script(at_worker=at_worker, steps=5), timeout_s=LIMIT_S, env=env)
    check(run, "step 2 is open for", "1 of 2 gradients", "rank 0 (", "sleeping", fails=False)


def test_a_collective_of_the_users_in_the_loop_is_guessed_at():
    at_worker = "comm.Barrier() if count == 2 else None"
    env = {"MPISYNC_STALL_REPORT_S": "1"}
    with start_script(3, script(at_worker=at_worker, steps=5), env=env) as job:
        job.wait_for("calls an MPI collective inside the loop", "stderr", LIMIT_S)


def test_an_abort_waits_until_what_was_written_is_read():
    """MPICH's launcher, told of an abort, leaves unread what is still in the pipe: a traceback was lost."""
    code = """
import sys, time
from mpisync import ending
sys.stderr.write("why\\n" * 100)
sys.stderr.flush()
began_s = time.monotonic()
ending._let_the_launcher_read()
print(time.monotonic() - began_s)
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stderr is not None and process.stdout is not None
        assert process.stderr.read(4) == b"why\n"  # from here on it waits
        time.sleep(0.3)
        process.stderr.readall()
        waited_s = float(process.stdout.read())
    assert 0.2 < waited_s < 1.0
