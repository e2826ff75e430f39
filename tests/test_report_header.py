"""What a session tells of itself in the first line of a record, and that a replay does not ask for it."""

import doctest
import os
import socket
import sys

import pytest
import torch
from torch import nn
from training import WORKERS, new_model, sgd, train

import mpisync
from mpisync.records import read_record
from mpisync.session import run_info
from mpisync.session.run_info import cores_of, optimizer_text


@pytest.fixture
def alone():
    """A communicator of one process; MPI is not started before a test wants it."""
    from mpi4py import MPI

    return MPI.COMM_SELF


def test_examples():
    assert doctest.testmod(run_info).failed == 0


def test_a_session_tells_what_it_takes_to_repeat_it(alone, tmp_path, monkeypatch):
    hostile = ["train.py", "--name", "\ud800</script>\x00"]
    monkeypatch.setattr(sys, "argv", hostile)
    path = tmp_path / "record.jsonl"
    model = new_model()
    model.append(nn.Linear(3, 3).double())
    model[-1].weight.requires_grad_(False)
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    train(alone, model, optimizer, steps=7, record=str(path), scheduler=scheduler)
    header, _ = read_record(path)
    assert (header.command, header.steps) == (hostile, 7)
    assert (header.optimizer, header.scheduler) == ("SGD(lr=0.1, momentum=0.9)", "StepLR")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (header.parameters, header.parameters_bytes) == ({"float64": trained}, 8 * trained)
    cores = len(os.sched_getaffinity(0))
    assert (header.root_host, header.root_cores, header.cores) == (socket.gethostname(), cores, cores)
    assert header.root_threads == torch.get_num_threads() and header.transports == []
    assert header.versions.keys() == {"python", "torch", "mpi4py", "MPI"}
    assert header.versions["torch"] == torch.__version__ and "\n" not in header.versions["MPI"]


def test_a_session_that_never_trained_has_a_record_that_can_be_read(alone, tmp_path):
    path = tmp_path / "record.jsonl"
    with (
        pytest.raises(KeyError),
        mpisync.Session(alone, model := new_model(), sgd(model), record=str(path), progress=False),
    ):
        raise KeyError
    header, steps = read_record(path)
    assert header.steps is None and header.command == sys.argv and steps == []


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", ["shared", "messages"])
def test_the_root_tells_how_gradients_travel_and_which_cores_there_are(comm, tmp_path, monkeypatch, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    path = comm.bcast(str(tmp_path / "record.jsonl"))
    model = new_model()
    train(comm, model, sgd(model), steps=3, record=path)
    cores = set().union(*comm.allgather(os.sched_getaffinity(0)))
    if comm.rank < WORKERS:
        return  # the root has written it
    header, _ = read_record(path)
    assert header.transports == [{"shared": "shared memory", "messages": "messages"}[transport]] * WORKERS
    assert header.cores == len(cores)
    assert header.steps == 3 and header.parameters_bytes == 8 * sum(p.numel() for p in model.parameters())


@pytest.mark.parallel(WORKERS + 1)
def test_a_replay_does_not_ask_for_what_is_only_told(comm, tmp_path, monkeypatch):
    path = comm.bcast(str(tmp_path / "record.jsonl"))
    model = new_model()
    train(comm, model, sgd(model), steps=6, record=path)
    monkeypatch.setattr(sys, "argv", ["another.py"])
    monkeypatch.setenv("MPISYNC_TRANSPORT", "messages")
    other = new_model()
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    _, session = train(
        comm, other, optimizer, steps=4, policy=mpisync.Replay(path), scheduler=scheduler, record=f"{path}.again"
    )
    assert session.version == 4
    if comm.rank < WORKERS:
        return
    told, again = (read_record(one)[0] for one in (path, f"{path}.again"))
    assert told.command != again.command and told.optimizer != again.optimizer and told.transports != again.transports


class Peer:
    """A process as `cores_of` sees one."""

    def __init__(self, pid, *, visible=True):
        self.pid, self.visible = pid, visible

    def sees(self, other):
        return other.visible


def test_cores_of_ranks_that_are_out_of_sight_are_not_known(monkeypatch):
    cores = {1: {0, 1}, 2: {1, 2}, 3: {7}}

    def affinity(pid):
        if pid not in cores:
            raise ProcessLookupError(pid)
        return cores[pid]

    monkeypatch.setattr(os, "sched_getaffinity", affinity)
    here = Peer(3)
    assert cores_of([Peer(1), Peer(2), here], here) == 4, "those that ranks share count once"
    assert cores_of([Peer(1), Peer(2, visible=False), here], here) is None
    assert cores_of([Peer(1), Peer(99), here], here) is None


class Odd(torch.optim.SGD):
    """Hides its settings' defaults behind **others."""

    def __init__(self, parameters, **others):
        super().__init__(parameters, **others)
        self.defaults["hook"] = list(range(10_000))


def test_an_optimizers_settings_are_told_in_few_letters():
    weight = nn.Parameter(torch.zeros(2))
    assert optimizer_text(torch.optim.SGD([weight], lr=torch.tensor(0.5))) == "SGD(lr=0.5)"
    text = optimizer_text(torch.optim.Adam([weight], lr=0.01, betas=(0.8, 0.9), amsgrad=True))
    assert text == "Adam(lr=0.01, betas=(0.8, 0.9), amsgrad=True)"
    assert optimizer_text(torch.optim.SGD([weight], 0.001)) == "SGD(lr=0.001)", "the rate is told, default or not"
    odd = optimizer_text(Odd([weight], lr=0.1))
    assert odd.startswith("Odd(lr=0.1, ") and len(odd) < 300
