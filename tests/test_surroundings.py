"""What a machine may lack (shared memory, a compiler, space, letters), and what is said of it."""

import errno
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from launch import environment
from training import WORKERS, fails_everywhere, new_model, on_all, sgd, train

from mpisync.commands.main import COMMANDS
from mpisync.device.shared_memory import SharedMemory
from mpisync.kernels import jit
from mpisync.records import read_record
from mpisync.records.files import RecordWriter
from mpisync.session.partial_reduce import PartialReduce
from mpisync.transport.peers import Peer


def short(comm, size, steps=3):
    theta = np.zeros(size, np.float32)
    reduction = PartialReduce(comm, like=theta)
    if reduction.is_root:
        for step in reduction.serve(steps):
            theta += step.mean
            step.publish(theta)
    else:
        while reduction.pull(theta):
            reduction.push(np.ones_like(theta))
    reduction.free()


@pytest.mark.parallel(4)
def test_workers_on_other_machines_are_named_once_and_in_words(comm, monkeypatch, capfd):
    here = Peer.here

    def away(rank):
        return replace(here(rank), host=f"node{rank}", boot="another") if rank in (0, 2) else here(rank)

    attach = SharedMemory.attach

    def attached(address):
        if comm.rank in (0, 2):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), address)
        return attach(address)

    monkeypatch.setattr(Peer, "here", staticmethod(away))
    monkeypatch.setattr(SharedMemory, "attach", staticmethod(attached))
    for _ in range(2):
        short(comm, 1000)
    said = capfd.readouterr().err
    told = [line for line in said.splitlines() if "travel by messages" in line]
    assert len(told) == (comm.rank == 3)
    if told:
        assert told[0].startswith("mpisync: workers 0, 2 on node0, node2, not on the root's machine ")
        assert "Errno" not in told[0] and "cannot share" not in told[0]


@pytest.mark.parallel(3)
def test_containers_with_a_dev_shm_of_their_own_are_told_what_to_do(comm, monkeypatch, capfd):
    attach = SharedMemory.attach

    def attached(address):
        if comm.rank == 1:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), address)
        return attach(address)

    monkeypatch.setattr(SharedMemory, "attach", staticmethod(attached))
    short(comm, 1000)
    said = capfd.readouterr().err
    if comm.rank == 2:
        assert "mpisync: worker 1 cannot share memory with the root (No such file or directory), so gradients" in said
        assert "give containers the host's process ids or its /dev/shm (docker run --ipc=host --pid=host)" in said


@pytest.mark.parallel(WORKERS + 1)
def test_without_the_compiler_every_rank_hears_what_to_unset(comm, monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    monkeypatch.setattr(jit.config, "DISABLE_JIT", 1)
    with fails_everywhere(comm, ValueError, "NUMBA_DISABLE_JIT=1 turns off the compiler", "unset it"):
        short(comm, 10)
    model = new_model()
    with fails_everywhere(comm, ValueError, "NUMBA_DISABLE_JIT=1 turns off the compiler", "unset it"):
        train(comm, model, sgd(model))


@pytest.mark.parallel(WORKERS + 1)
def test_where_the_disk_is_full_the_record_ends_and_the_training_goes_on(comm, tmp_path, monkeypatch, capfd):
    path = comm.bcast(str(tmp_path / "run.jsonl"))
    write = RecordWriter._write

    def full(writer, document):
        if document.get("step") == 5:
            os.dup2(os.open("/dev/full", os.O_WRONLY), writer._file.fileno())
        write(writer, document)

    monkeypatch.setattr(RecordWriter, "_write", full)
    for record, steps, said in ((path, 5, f"{path} ends before step 5"), ("/dev/full", 0, "/dev/full is empty")):
        model = new_model()
        _, session = train(comm, model, sgd(model), record=record)
        assert session.version == 12
        told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("mpisync: the record")]
        ours = f"mpisync: the record {said}, and the run goes on without: the record cannot be written (No space left"
        assert [line.startswith(ours) for line in told] == [True] * (comm.rank == WORKERS), told
        if steps and comm.rank == WORKERS:
            assert len(read_record(path)[1]) == steps
    assert on_all(comm, True)


ASCII = [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"}]


@pytest.mark.parametrize("settings", ASCII, ids=["C", "ascii"])
def test_commands_speak_where_there_are_no_other_letters(settings):
    def typed(*arguments):
        command = [sys.executable, "-m", "mpisync", *arguments]
        done = subprocess.run(command, capture_output=True, env=environment(settings), timeout=120)
        assert done.returncode == 0 and done.stdout.isascii(), done.stderr
        return done.stdout.decode()

    said = typed("plan", "--workers", "10", "--delay", "exponential:mean=2")
    assert "x1.000" in said and "?" not in said
    for command in COMMANDS:
        assert f"mpisync {command.NAME}" in typed(command.NAME, "--help")
