"""A training script that fails, ends or is ended: the job ends in time, says why and leaves nothing."""

import os
import signal
import time

import pytest
from launch import run_script, start_script
from test_faults import ENDS_S, LIMIT_S, check

SCRIPT = """
import os, signal, sys, time
import torch
import torch.nn.functional as F
from mpi4py import MPI
import mpisync

comm = MPI.COMM_WORLD
rank, root = comm.rank, comm.size - 1
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
data = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.long)) for _ in range(12)]

def say(*words):
    print(rank, *words, flush=True)

def fault():
    say("fault", f"{{time.time():.3f}}")

def on_step(record):
    {at_root}

policy = mpisync.BackupWorkers(comm.size - 2)  # one worker suffices
with mpisync.Session(comm, model, optimizer, policy=policy, progress=False, on_step=on_step) as session:
    for count, (x, y) in enumerate(session.batches(data, steps={steps})):
        time.sleep(0.01)
        {in_loop}
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        session.step(loss)
    {behind}
say("done", session.version, f"{{time.time():.3f}}", sum(p.detach().sum().item() for p in model.parameters()))
"""


def script(*, in_loop="pass", behind="pass", at_root="pass", steps=50):
    return SCRIPT.format(in_loop=in_loop, behind=behind, at_root=at_root, steps=steps)


def done(run):
    """The lines with which ranks said that they had come to the end: (rank, version, time, sum)."""
    lines = [line.split() for line in run.stdout.splitlines() if " done " in line]
    return [(int(rank), int(version), float(at_s), float(total)) for rank, _, version, at_s, total in lines]


FAULTS = {
    "in the loop": ({"in_loop": "if count == 5: fault(); raise OSError('by a worker')"}, "OSError: by a worker"),
    "behind the loop": ({"behind": "if rank == 0: fault(); raise OSError('behind it')"}, "OSError: behind it"),
    # the buffers that come with the final parameters do not fit any more
    "in __exit__": (
        {"in_loop": "if rank == 0: break", "behind": "if rank == 0: fault(); model[1].running_mean = torch.zeros(3)"},
        "'1.running_mean' was [4] float32 when the session began",
    ),
    "in on_step": ({"at_root": "if record.step == 5: fault(); raise OSError('by the hook')"}, "OSError: by the hook"),
}


@pytest.mark.parametrize(("places", "says"), FAULTS.values(), ids=FAULTS)
def test_an_exception_ends_the_job_with_its_traceback(places, says):
    run = check(run_script(2, script(**places), timeout_s=LIMIT_S), says, "Traceback")
    assert run.stderr.count("Traceback") == 1, "the other rank says one line"
    if "behind" not in places:
        assert done(run) == []


def test_an_exit_without_an_error_in_the_loop_means_that_this_worker_leaves():
    in_loop = "if rank == 0 and count == 5: sys.exit(0)"
    run = check(run_script(3, script(in_loop=in_loop), timeout_s=LIMIT_S), fails=False)
    assert run.stderr == ""
    assert sorted(one[:2] for one in done(run)) == [(1, 50), (2, 50)]


@pytest.mark.parametrize(("number", "whom"), [(signal.SIGINT, "mpirun"), (signal.SIGTERM, "a worker")])
def test_a_signal_ends_the_job(number, whom):
    with start_script(2, script(in_loop="say('count', count)", steps=100_000)) as job:
        job.wait_for("0 count 5\n")
        os.kill(job.process.pid if whom == "mpirun" else job.ranks()[0], number)
        sent_s = time.monotonic()
        run = check(job.finish(2 * LIMIT_S))
        assert time.monotonic() - sent_s < ENDS_S + 2.0, "and the clean-up may take two"
    assert done(run) == []


def test_a_stopped_worker_delays_nothing_and_is_killed_at_the_end():
    in_loop = "if rank == 0 and count == 5: say('stops', time.time()); os.kill(os.getpid(), signal.SIGSTOP)"
    run = run_script(3, script(in_loop=in_loop, steps=100), timeout_s=LIMIT_S + 15.0)
    ended_s = time.time() - 2.0  # which the clean-up may take
    check(run, "rank 0 (", "did not come to the end of the training at version 100", "killing")
    (worker, root) = sorted(done(run))
    assert worker[:2] == (1, 100) and root[:2] == (2, 100)
    assert worker[3] == root[3], "both had the final parameters"
    stopped_s = next(float(line.split()[2]) for line in run.stdout.splitlines() if " stops " in line)
    trained_s = worker[2]  # the root waits its grace
    assert trained_s - stopped_s < ENDS_S
    assert ended_s - trained_s < ENDS_S
