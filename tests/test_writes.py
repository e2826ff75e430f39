"""What a worker's loop writes: what the root should is refused, what a first forward pass initialises is everyone's."""

import contextlib
import copy
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import DATA, WORKERS, flat, loader, on_all, on_union, sgd

import mpisync
from mpisync.model.write_sample import MemorySample, TensorSample

TRANSPORTS = ("shared", "messages")
SEEDED = torch.Generator().manual_seed(7)
BATCHES = [(torch.randn(4, 6, generator=SEEDED), torch.randn(4, 3, generator=SEEDED)) for _ in range(12)]

# --- the sample --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 808, 4096, 40_000, 1_000_000, 5_000_000])
def test_a_write_that_is_made_every_time_is_found_wherever_it_is_within_100_samples(size):
    memory = np.zeros(size, np.uint8)
    sample = MemorySample(memory)
    for at in np.random.default_rng(0).integers(size, size=10):
        for turn in range(101):  # noqa: B007 (read below)
            sample.take()
            assert sample.written() is None
            memory[at] += 1
            if (found := sample.written()) is not None:
                break
        assert found == at // 8 * 8 and turn < 100


def test_a_write_of_a_hundredth_in_one_piece_is_found_at_once():
    memory = np.zeros(100 * 100 * 4096, np.uint8)
    sample = MemorySample(memory)
    for start in range(0, memory.size - 101 * 4096, 1_234_567):
        sample.take()
        memory[start : start + 101 * 4096] += 1
        assert sample.written() is not None


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float64, torch.complex64])
def test_tensors_that_move_are_found_within_100_samples(dtype):
    tensors = [torch.zeros(3, 50_000).t().to(dtype), torch.zeros(0, dtype=dtype), torch.zeros((), dtype=dtype)]
    sample = TensorSample(tensors)
    sample.take()
    assert sample.written() is None
    for index, place in ((0, (49_999, 1)), (2, ())):
        for turn in range(101):  # noqa: B007 (read below)
            sample.take()
            tensors[index].data[place] = not tensors[index][place]
            if (found := sample.written()) is not None:
                break
        assert found == index and turn < 100


# --- in a run ----------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(500, 40)  # of which one row is little: 160 bytes of 80 kB
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x))) + self.table.weight.mean()


def every_time(model):
    model.table.weight.data[321].mul_(1.5)


def clamp(model):
    for p in model.parameters():
        p.data.clamp_(-0.01, 0.01)


def update(model):
    for p in model.parameters():
        p.data.add_(p.grad, alpha=-0.1)


def through_numpy(model):
    model.head.weight.detach().numpy()[0, 0] += 1.0


def after_a_look(model):
    with torch.no_grad():
        for p in model.parameters():
            p.data.mul_(1.1)


def in_place(model):
    with torch.no_grad():
        model.body.bias.add_(1.0)


def replaced(model):
    for p in model.parameters():
        p.data = p.data * 1.1


WRITES = {
    "clamp": (clamp, 1), "update": (update, 1), "numpy": (through_numpy, 1), "no_grad": (after_a_look, 1),
    "in place": (in_place, 1), "replaced": (replaced, 8), "a row": (every_time, 100),
}  # fmt: skip


def loop(comm, write, begin, writer=None, at_root=None, steps=110, **more):
    """Train, and have `write` called from the `begin`-th batch on; the version, the calls, the error."""
    model, written = Net(), 0
    hook = (lambda _: at_root(model)) if at_root else None
    error = ""
    try:
        with mpisync.Session(comm, model, sgd(model, lr=0.01), progress=False, on_step=hook, **more) as session:
            for number, (x, y) in enumerate(session.batches(BATCHES, steps=steps)):
                loss = F.mse_loss(model(x), y)
                loss.backward()
                if number >= begin and writer in (None, session.worker):
                    write(model)
                    written += 1
                session.step(loss)
    except (RuntimeError, mpisync.PeerFailed) as caught:
        error = str(caught)
    return session.version, written, error


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", WRITES)
def test_what_the_loop_writes_is_refused_within_a_few_steps(comm, monkeypatch, transport, name):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    write, within = WRITES[name]
    for begin, more in ((0, {}), (5, {}), (5, {"policy": mpisync.Async(1)}), (5, {"on_late": "carry"})):
        _, written, error = loop(comm, write, begin, writer=1, **more)
        words = on_all(comm, error)
        assert all("parameter '" in word for word in words), words
        assert any("register_step_post_hook" in word or "before Session" in word for word in words)
        assert written <= within + 1, (begin, more)


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_own_copies_may_be_written_to_and_a_loop_that_writes_nothing_is_left_alone(comm, monkeypatch, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    for write, more in ((clamp, {"own_copy": True}), (lambda model: None, {}), (lambda model: model.state_dict(), {})):
        version, _, error = loop(comm, write, 0, steps=30, **more)
        assert (version, error) == (30, "")


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("write", [clamp, in_place, after_a_look])
def test_writes_at_the_root_outside_the_update_are_refused(comm, monkeypatch, transport, write):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    version, _, error = loop(comm, lambda model: None, 0, at_root=write)
    assert version <= 3
    assert all("on_step=" in word and "register_step_post_hook" in word for word in on_all(comm, error))


# --- initialisation by the first forward pass --------------------------------------------------


class ActNorm(nn.Module):
    """Glow's: the first batch makes scale and shift; whether it has is a buffer, or nothing that travels."""

    def __init__(self, flag):
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.ones(6))
        self.plain_flag = False
        self.is_buffer = flag == "buffer"
        self.register_buffer("initialised", torch.tensor(False))

    def forward(self, x):
        if not (bool(self.initialised) if self.is_buffer else self.plain_flag):
            self.shift.data.copy_(-x.mean(0))
            with torch.no_grad():
                self.scale.copy_(1 / (x.std(0) + 1e-6))
            self.plain_flag = True
            self.initialised.fill_(True)
        return (x + self.shift) * self.scale


def flow(flag, dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(ActNorm(flag), nn.Linear(6, 3)).to(dtype)


def possible_starts(dtype):
    """The shifts that each worker's first batch would make."""
    starts = []
    for worker in range(WORKERS):
        model = flow("buffer", dtype)
        model(BATCHES[worker][0].to(dtype))
        starts.append(model[0].shift.detach().clone())
    return starts


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("flag", ["buffer", "attribute"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"weight": "samples", "ema": 0.5},
        {"policy": mpisync.BackupWorkers(1)},
        {"policy": mpisync.Async(1)},
        {"on_late": "carry"},
        {"on_late": "requeue", "policy": mpisync.BackupWorkers(1)},
    ],
)
def test_everyone_starts_from_one_workers_initialisation(comm, monkeypatch, transport, flag, more):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    for dtype in (torch.float32, torch.bfloat16):
        model = flow(flag, dtype)
        seen = []
        with mpisync.Session(comm, model, sgd(model, lr=0.0), progress=False, **more) as session:
            for x, y in session.batches([(x.to(dtype), y.to(dtype)) for x, y in BATCHES], steps=8):
                loss = F.mse_loss(model(x), y)
                loss.backward()
                session.step(loss)
                seen.append((session.version, model[0].shift.detach().clone()))
        starts = possible_starts(dtype) if "on_late" not in more or more["on_late"] == "carry" else None
        for version, shift in seen:
            assert torch.equal(shift, model[0].shift) or version == 0, (version, shift)
        if starts:
            assert any(torch.equal(model[0].shift, start) for start in starts)
        assert model[0].initialised and model[0].shift.abs().sum() > 0
        if "ema" in more:
            assert torch.equal(session.average["0.shift"], model[0].shift)
        assert all((values == flat(model.float())).all() for values in on_all(comm, flat(model.float())))


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_after_initialisation_training_is_that_of_one_process_from_there(comm, monkeypatch, capfd, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    model = flow("buffer").double()
    batches = [(x.double(), y.double()) for x, y in BATCHES]
    start = []
    with mpisync.Session(comm, model, sgd(model), progress=False) as session:
        for x, y in session.batches(batches, steps=7):
            if session.version == 1 and not start:
                start.append(copy.deepcopy(model.state_dict()))
            loss = F.mse_loss(model(x), y)
            loss.backward()
            session.step(loss)
    if session.worker == 0:
        alone = flow("buffer").double()
        alone.load_state_dict(start[0])
        optimizer = sgd(alone)
        on_union(alone, optimizer, batches, lambda m, x, y: F.mse_loss(m(x), y), steps=range(1, 7))
        assert np.allclose(flat(model), flat(alone), rtol=0, atol=1e-9)
    comm.barrier()
    is_said = "first forward pass initialised parameter '0.shift' and 1 more" in capfd.readouterr().err
    assert is_said == (comm.rank == WORKERS)


@pytest.mark.parallel(WORKERS + 1)
def test_with_own_copies_a_first_pass_that_initialises_is_said_to_be_lost(comm):
    model = flow("buffer")
    warned = pytest.warns(UserWarning, match=r"'0.shift' was written to before the first gradient, and own_copy=True")
    with warned if comm.rank < WORKERS else contextlib.nullcontext():
        with mpisync.Session(comm, model, sgd(model), own_copy=True, progress=False) as session:
            for x, y in session.batches(BATCHES, steps=3):
                loss = F.mse_loss(model(x), y)
                loss.backward()
                session.step(loss)


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_first_pass_that_comes_late_is_rejected_and_touches_nothing(comm, monkeypatch, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    model, verdicts = flow("attribute"), []
    with mpisync.Session(comm, model, sgd(model, lr=0.0), policy=mpisync.BackupWorkers(1), progress=False) as session:
        for number, (x, y) in enumerate(session.batches(BATCHES, steps=60)):
            if session.worker == 1 and number == 0:
                while not session.stale():  # worker 0 has made version 1
                    pass
                continue  # and the forward pass comes at a later version
            loss = F.mse_loss(model(x), y)
            loss.backward()
            time.sleep(0.02 * (session.worker == 0))  # so that the other one is in time
            verdicts.append(session.step(loss))
    assert any(torch.equal(model[0].shift, start) for start in possible_starts(torch.float32))
    if session.worker == 1:
        assert verdicts[0].late_by or "initialised parameters" in verdicts[0].reason
        assert not verdicts[0].accepted


# --- frozen copies that the loop moves ---------------------------------------------------------


class Target(nn.Module):
    """A network whose slow copy is frozen parameters, or buffers."""

    def __init__(self, as_buffers):
        super().__init__()
        torch.manual_seed(5)
        self.online = nn.Linear(6, 3)
        self.target = copy.deepcopy(self.online).requires_grad_(requires_grad=False)
        if as_buffers:
            for name, value in list(self.target.named_parameters()):
                del self.target._parameters[name]
                self.target.register_buffer(name, value.data)

    def move(self, by_data):
        with torch.no_grad():
            for name in ("weight", "bias"):
                target, online = getattr(self.target, name), getattr(self.online, name)
                (target.data if by_data else target).lerp_(online, 0.1)

    def loss(self, x, y):
        return F.mse_loss(self.online(x), self.target(x) + y)


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("by_data", [False, True])
def test_a_target_of_frozen_parameters_is_refused_and_one_of_buffers_is_right(comm, monkeypatch, transport, by_data):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)

    def run(as_buffers):
        model = Target(as_buffers)
        with mpisync.Session(comm, model, torch.optim.SGD(model.online.parameters(), 0.1), progress=False) as session:
            for x, y in session.batches(BATCHES, steps=6):
                model.move(by_data)
                loss = model.loss(x, y)
                loss.backward()
                session.step(loss)
        return model

    with pytest.raises((RuntimeError, mpisync.PeerFailed), match=r"frozen parameter 'target.(weight|bias)' was ch"):
        run(as_buffers=False)
    model, alone = run(as_buffers=True), Target(as_buffers=True)
    optimizer = torch.optim.SGD(alone.online.parameters(), 0.1)
    on_union(alone, optimizer, BATCHES, Target.loss, before=lambda m, _: m.move(by_data))
    for name, value in alone.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, rtol=0, atol=1e-6), name


def test_a_single_process_keeps_its_own_rules():
    """There the loop's parameters are the model itself: what it writes lasts, as in a plain loop."""
    from mpi4py import MPI

    model = Net()
    with mpisync.Session(MPI.COMM_SELF, model, sgd(model, lr=0.0), progress=False) as session:
        for x, y in session.batches([(x.float(), F.one_hot(y, 3).float()) for x, y in loader(shuffle=False)], steps=3):
            loss = F.mse_loss(model(x), y)
            loss.backward()
            clamp(model)
            session.step(loss)
    assert flat(model).max() == pytest.approx(0.01) and len(DATA) == 64
