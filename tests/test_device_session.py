"""Sessions whose gradients stay on a device, on a stand-in for it: the protocol is the same, only memory differs."""

import gc
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from launch import run_script
from stand_in import StandIn
from torch import nn
from training import DATA, WORKERS, flat, new_model, on_union, sgd, train

import mpisync
from mpisync.aggregation import participant
from mpisync.device import placement
from mpisync.session import distributed_model
from mpisync.transport.shared import SharedRootLink, SharedWorkerLink
from mpisync.transport.wire import Kind

BATCHES = [DATA[8 * number : 8 * number + 8] for number in range(8)]
STEPS = 6


def loss_of(model, x, y):
    return F.cross_entropy(model(x), y)


@pytest.fixture
def device(monkeypatch):
    """Have every model be on a stand-in device, of its own in each process; return it."""
    memory = StandIn()
    monkeypatch.setattr(distributed_model, "memory_of", lambda model: memory)
    return memory


def equals_one_process(comm, **more):
    """Train a model, and its twin as one process does, on the union of the batches; return the session."""
    model, twin = new_model(), new_model()
    verdicts, session = train(comm, model, sgd(model, momentum=0), STEPS, BATCHES, **more)
    on_union(twin, sgd(twin, momentum=0), BATCHES, loss_of)
    assert all(verdict.accepted for verdict in verdicts)
    assert np.abs(flat(model) - flat(twin)).max() < 1e-6
    return session


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("root_device", ["auto", "cpu"])
@pytest.mark.parametrize("transport", ["shared", "messages"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_training_equals_one_process(comm, monkeypatch, device, root_device, transport, momentum):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    monkeypatch.setenv("MPISYNC_DEVICE", root_device)
    model, own = new_model(), new_model()
    verdicts, session = train(comm, model, sgd(model, momentum=momentum), STEPS, BATCHES)
    on_union(own, sgd(own, momentum=momentum), BATCHES, loss_of)
    assert all(verdict.accepted for verdict in verdicts)
    assert np.abs(flat(model) - flat(own)).max() < 1e-6
    if session.worker is None:  # else it proves nothing
        on_device = transport == "shared" and root_device == "auto"
        assert (device.counts["fold"] + device.counts["fused_sgd_step"] >= STEPS) == on_device
        assert (device.counts["fused_sgd_step"] >= STEPS) == (on_device and momentum == 0)


@pytest.mark.parallel(5)
@pytest.mark.timeout(120)
def test_five_processes_train_with_backups_while_one_is_slow(comm, device):
    """As on the CPU: every update is the mean of N gradients, all computed at the parameters that it updates."""
    records = []

    def body(session, x):
        if session.worker == 0:
            torch.manual_seed(session.version)  # nothing: it only takes time
            for _ in range(200):
                torch.randn(64, 64) @ torch.randn(64, 64)

    model = new_model()
    more = {"policy": mpisync.BackupWorkers(1), "on_step": records.append}
    train(comm, model, sgd(model), 20, BATCHES, body=body, **more)
    for record in records:
        assert len(record.accepted) == 3 and {version for _, _, version in record.accepted} == {record.step}
    assert np.ptp(np.stack(comm.allgather(flat(model))), axis=0).max() == 0, "all ranks end with the same parameters"


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes_give_the_hosts_bits(comm, monkeypatch, device, dtype):
    def trained():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)
        data = [(x.to(dtype), y) for x, y in BATCHES]
        train(comm, model, sgd(model), 8, data)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    on_device = trained()
    monkeypatch.setattr(distributed_model, "memory_of", lambda model: None)
    assert torch.equal(on_device, trained())


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.two(self.norm(self.one(x)))


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("policy", ["backup:0", "async:k=1"])
def test_buffers_averages_and_snapshots_are_those_of_the_host(comm, monkeypatch, device, policy):
    """Under Async several versions may be read at a time; what counts then is not determined."""
    seen = []

    def trained():
        torch.manual_seed(0)
        model, looks = Normed().double(), []
        more = {"policy": mpisync.policies.parse_policy(policy), "ema": 0.9, "clip_norm": 0.5}
        _, session = train(
            comm, model, sgd(model), 8, BATCHES, body=lambda s, x: looks.append(s.snapshot().state_dict()), **more
        )
        state = {**model.state_dict(), **{f"average {name}": value for name, value in session.average.items()}}
        seen.append(looks)
        return state

    on_device = trained()
    monkeypatch.setattr(distributed_model, "memory_of", lambda model: None)
    on_host = trained()
    if policy == "backup:0":
        assert all(torch.equal(value, on_host[name]) for name, value in on_device.items())
        for one, other in zip(*seen, strict=True):
            assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert all(bool(torch.isfinite(value).all()) for value in on_device.values())


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("root_device", ["auto", "cpu"])
def test_nothing_is_told_before_it_is_done(comm, monkeypatch, device, root_device):
    """A device works while the host goes on: what another process is told of has happened there."""
    monkeypatch.setenv("MPISYNC_DEVICE", root_device)
    told = []

    def tells(kind, name, of):
        real = getattr(kind, name)

        def tell(self, *arguments):
            busy_before = device.is_busy
            result = real(self, *arguments)
            if of(arguments):
                told.append((name, busy_before, device.is_busy))
            return result

        monkeypatch.setattr(kind, name, tell)

    tells(SharedWorkerLink, "send", lambda arguments: arguments[0].kind == Kind.GRADIENT)
    tells(SharedRootLink, "publish", lambda arguments: arguments[0] > 0)
    tells(SharedWorkerLink, "read", lambda arguments: True)
    equals_one_process(comm)
    assert told and not any(after for _, _, after in told)
    needed = {"send"} if comm.rank < WORKERS else {"publish"} if root_device == "auto" else set()
    assert needed <= {name for name, before, _ in told if before}, "else there was nothing to wait for"


@pytest.mark.parallel(5)
def test_a_device_moves_each_gradient_once_and_each_version_once(comm, device):
    torch.manual_seed(0)
    model = nn.Linear(512, 512)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    data = [(torch.randn(4, 512), torch.randn(4, 512)) for _ in range(8)]
    before = {}

    def run(optimizer, steps):
        with mpisync.Session(comm, model, optimizer, progress=False) as session:
            for x, y in session.batches(data, steps=steps):
                loss = F.mse_loss(model(x), y)
                loss.backward()
                session.step(loss)

    per_step = []
    for momentum in (0.0, 0.9):
        for steps in (2, 12):
            device.counts.clear()
            run(torch.optim.SGD(model.parameters(), lr=0.01, momentum=momentum), steps)
            before[momentum, steps] = dict(device.counts)
        one, more = before[momentum, 2], before[momentum, 12]
        names = ("read", "written", "in", "out")
        per_step.append({name: (more.get(name, 0) - one.get(name, 0)) / 10 / size for name in names})
        assert more.get("opened", 0) == (2 if comm.rank < 4 else 0), "a slot and the versions, once a run"
    slack = 0.15  # extras, samples, words
    for moved, rounds in zip(per_step, (4 + 2, 4 + 1), strict=True):
        if comm.rank == 4:
            assert moved["read"] + moved["written"] <= rounds + slack, moved
        else:  # torch packs on the device; a version is read from the root's and written to one's own
            assert moved["read"] <= 1 + slack and moved["written"] <= 1 + slack, moved
        assert moved["in"] <= slack and moved["out"] <= slack, "nothing goes by the host"


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.timeout(120)
def test_sessions_in_a_row_leave_nothing_behind(comm, device):
    model = new_model()
    for number in range(100):
        train(comm, model, sgd(model), 1, BATCHES)
        if number == 20:
            first = len(os.listdir("/proc/self/fd"))
    gc.collect()
    assert device.counts["open"] == 0
    assert len(os.listdir("/proc/self/fd")) <= first


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("who", [0, WORKERS], ids=["a worker", "the root"])
def test_where_a_device_cannot_be_reached_gradients_come_to_the_host(comm, monkeypatch, device, capfd, who):
    """A worker that may not open the root's memory, or a root that cannot share its own."""
    def refuse(*_, **__):
        raise OSError(12, f"rank {who} has no more")

    if comm.rank == who:
        monkeypatch.setattr(device, "attach" if who < WORKERS else "share", refuse)
    session = equals_one_process(comm)
    if session.worker is None:
        assert device.counts["fold"] + device.counts["fused_sgd_step"] == 0
        said = capfd.readouterr().err
        assert f"not all workers reach stand-in:0, which is the root's (rank {who} has no more)" in said
        assert "gradients come to host memory" in said


@pytest.mark.parallel(WORKERS + 1)
def test_where_gradients_stay_is_said_and_recorded(comm, device, capfd, tmp_path):
    participant._tell_once.cache_clear()  # another test may have had it said
    path = comm.bcast(str(tmp_path / "record.jsonl"))
    session = equals_one_process(comm, record=path)
    if session.worker is None:
        assert "gradients stay on stand-in:0, where workers put them by stand-in" in capfd.readouterr().err
        header, _ = mpisync.records.read_record(path)
        assert header.transports == ["stand-in"] * WORKERS


@pytest.mark.parallel(WORKERS + 1)
def test_a_device_without_room_leaves_the_reduction_to_the_host(comm, monkeypatch, device, capfd):
    monkeypatch.setattr(device, "free_bytes", lambda: 3000.0)
    session = equals_one_process(comm)
    if session.worker is None:
        said = capfd.readouterr().err
        assert "stand-in:0 has 0 MB free, so the root reduces in the host's memory" in said
        assert device.counts["fused_sgd_step"] == device.counts["fold"] == 0


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("root_device", ["auto", "cpu"])
def test_what_a_loop_writes_to_its_parameters_is_refused_there_too(comm, monkeypatch, device, root_device):
    monkeypatch.setenv("MPISYNC_DEVICE", root_device)
    model = new_model()

    def body(session, x):
        if session.version == 3:
            model[0].weight.data.add_(1.0)

    with pytest.raises((RuntimeError, mpisync.PeerFailed), match="was written to on a worker"):
        train(comm, model, sgd(model), 12, BATCHES, body=body)


@pytest.mark.parallel(WORKERS + 1)
def test_a_device_that_one_rank_cannot_use_is_refused_on_all(comm, monkeypatch):
    def memory_of(model):
        if comm.rank == 0:
            raise ValueError("CuPy is missing")
        return StandIn()

    monkeypatch.setattr(distributed_model, "memory_of", memory_of)
    with pytest.raises(ValueError, match="rank 0: CuPy is missing"):
        train(comm, model := new_model(), sgd(model), 2, BATCHES)


@pytest.mark.parallel(WORKERS + 1)
def test_a_device_that_is_none_is_refused_on_all(comm, monkeypatch):
    monkeypatch.setenv("MPISYNC_DEVICE", "gpu")
    with pytest.raises(ValueError, match="MPISYNC_DEVICE='gpu': must be auto, cpu, or a card as cuda:0"):
        train(comm, model := new_model(), sgd(model), 2, BATCHES)


def test_the_host_is_taken_where_the_script_or_the_user_says_so(monkeypatch):
    own = StandIn()
    assert placement.memory_of(nn.Linear(2, 2)) is None
    assert placement.placed(own, 100) is own and placement.placed(None, 100) is None
    monkeypatch.setenv("MPISYNC_DEVICE", "cpu")
    assert placement.placed(own, 100) is None


DIES = """
import os, sys, time
sys.path.insert(0, {tests!r})
import torch
from mpi4py import MPI
import mpisync
from mpisync.session import distributed_model
from stand_in import StandIn
memory = StandIn()
distributed_model.memory_of = lambda model: memory
comm = MPI.COMM_WORLD
torch.manual_seed(0)
model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = [(torch.ones(2, 4), torch.ones(2, 2))] * 8
with mpisync.Session(comm, model, optimizer, policy=mpisync.BackupWorkers(1), progress=False) as session:
    for x, y in session.batches(data, steps=10**6):
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        if comm.rank == 1 and session.version >= 5:
            {end}
        session.step(loss)
"""


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "raise OSError('on purpose')"], ids=["a kill", "an error"])
def test_a_rank_that_ends_in_the_midst_ends_the_job(end):
    run = run_script(5, DIES.format(tests=os.path.dirname(__file__), end=end), timeout_s=60)
    assert run.returncode != 0 and not run.timed_out and run.left == ()
    assert end.startswith("os.") or "OSError: on purpose" in run.stderr
