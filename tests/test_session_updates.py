"""What a session's updates are made of, against the same sums done by hand: averages, weights, presence, buffers."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import DATA, WORKERS, flat, loader, new_model, on_all, sgd, train

import mpisync

ALL = mpisync.BackupWorkers(0)
ROOT = WORKERS
TARGETS = {tuple(x.tolist()): int(y) for x, y in DATA}


def targets_of(x):
    return torch.tensor([TARGETS[tuple(row.tolist())] for row in x])


def copied(tensors):
    return [tensor.detach().clone().double().numpy() for tensor in tensors]


class Counter:
    """How many versions the root has published, for whoever wants to be late on purpose; a file of so many bytes."""

    def __init__(self, comm, folder):
        self._path = Path(comm.bcast(str(folder / "versions"), root=ROOT))
        if comm.rank == ROOT:
            self._path.touch()
        comm.Barrier()

    def count(self):
        with self._path.open("ab") as file:
            file.write(b".")

    def wait_for_more_than(self, version):
        end_s = time.monotonic() + 20.0
        while self._path.stat().st_size <= version:
            assert time.monotonic() < end_s, f"nobody went on from version {version}"
            time.sleep(0.002)


# -- the moving average ----------------------------------------------------------------------------


@pytest.mark.parallel(WORKERS + 1)
def test_the_average_begins_at_version_0_and_keeps_its_decay_of_what_it_was(comm):
    decay, made, looked = 0.9, [], []
    model = new_model(seed=comm.rank)
    versions = [copied(model.parameters())]

    def look(session, x):
        looked.append((session.version, copied(session.snapshot(average=True).parameters())))

    _, session = train(
        comm, model, sgd(model), steps=8, ema=decay, body=look, policy=ALL,
        on_step=lambda record: versions.append(copied(model.parameters())),
    )  # fmt: skip
    versions = comm.bcast(versions, root=ROOT)
    average = versions[0]
    made.append(average)
    for version in versions[1:]:
        average = [decay * old + (1 - decay) * new for old, new in zip(average, version, strict=True)]
        made.append(average)
    assert len(made) == 9
    for name, expected in zip(dict(model.named_parameters()), average, strict=True):
        np.testing.assert_allclose(session.average[name].numpy(), expected, rtol=1e-12)
    for version, seen in looked:  # each worker, before it had sent its gradient
        for one, expected in zip(seen, made[version], strict=True):
            np.testing.assert_allclose(one, expected, rtol=1e-12)
    assert len(looked) == (0 if comm.rank == ROOT else 8)


# -- weights ---------------------------------------------------------------------------------------


def train_on_unequal_batches(comm, weight):
    """Worker 0 takes a part of its batch and says so; the model, and each step's (x of both) as drawn."""
    drawn, records, model = [], [], new_model()
    with mpisync.Session(
        comm, model, sgd(model), progress=False, policy=ALL, weight=weight, on_step=records.append
    ) as session:
        for x, y in session.batches(loader(), steps=6):
            part = 2 if session.worker == 0 else len(x)
            loss = F.cross_entropy(model(x[:part]), y[:part])
            loss.backward()
            session.step(loss, samples=part if session.worker == 0 else None)
            drawn.append(x[:part].clone())
    return model, list(zip(*on_all(comm, drawn)[:WORKERS], strict=True)), comm.bcast(records, root=ROOT)


@pytest.mark.parallel(WORKERS + 1)
def test_gradients_weighted_by_samples_make_the_mean_over_the_union(comm):
    model, steps, records = train_on_unequal_batches(comm, "samples")
    assert [record.samples_used for record in records] == [10] * 6
    twin = new_model()
    optimizer = sgd(twin)
    for parts in steps:
        x = torch.cat(parts)
        assert len(x) == 10
        optimizer.zero_grad()
        F.cross_entropy(twin(x), targets_of(x)).backward()
        optimizer.step()
    np.testing.assert_allclose(flat(model), flat(twin), rtol=1e-9, atol=1e-12)


@pytest.mark.parallel(WORKERS + 1)
def test_gradients_count_alike_unless_weights_are_asked_for(comm):
    model, steps, records = train_on_unequal_batches(comm, "equal")
    assert [record.samples_used for record in records] == [10] * 6
    twin = new_model()
    optimizer = sgd(twin)
    for parts in steps:
        optimizer.zero_grad()
        for x in parts:
            (F.cross_entropy(twin(x), targets_of(x)) / WORKERS).backward()
        optimizer.step()
    np.testing.assert_allclose(flat(model), flat(twin), rtol=1e-9, atol=1e-12)


# -- frozen, tied, unused --------------------------------------------------------------------------


class Parts(nn.Module):
    """Parameters that are tied, frozen, used by one worker only, in some steps only, or never."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.rare, self.single, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.never = nn.Linear(6, 6)
        self.double()

    def forward(self, x, *, rare, single):
        x = self.frozen(self.second(torch.tanh(self.first(x))))
        x = x + self.rare(x) if rare else x
        return self.head(x + self.single(x) if single else x)

    def groups(self):
        """Two groups with rates of their own; momentum and decay move whatever has a gradient, be it zero."""
        late = [*self.head.parameters(), *self.rare.parameters()]
        early = [*self.first.parameters(), self.second.bias, *self.single.parameters(), *self.never.parameters()]
        return torch.optim.SGD(
            [{"params": early, "lr": 0.05, "weight_decay": 0.1}, {"params": late, "lr": 0.2}],
            lr=1.0, momentum=0.9, weight_decay=0.2,
        )  # fmt: skip


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", ["shared", "messages"])
def test_frozen_tied_and_unused_parameters_in_groups_move_as_in_one_process(comm, monkeypatch, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    model, drawn, missing = Parts(comm.rank), [], []

    def look(record):
        missing.append({name for name, p in model.named_parameters() if p.grad is None})

    with mpisync.Session(comm, model, model.groups(), progress=False, policy=ALL, on_step=look) as session:
        for x, y in session.batches(loader(), steps=8):
            drawn.append((x.clone(), session.version % 3 == 0, session.worker == 0))
            loss = F.cross_entropy(model(x, rare=drawn[-1][1], single=drawn[-1][2]), y)
            loss.backward()
            session.step(loss)
    twin = Parts(ROOT)  # the root's values hold, also of what is frozen
    optimizer = twin.groups()
    for parts in zip(*on_all(comm, drawn)[:WORKERS], strict=True):
        optimizer.zero_grad()
        for x, rare, single in parts:
            (F.cross_entropy(twin(x, rare=rare, single=single), targets_of(x)) / WORKERS).backward()
        optimizer.step()
    assert model.second.weight is model.first.weight
    for (name, value), expected in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-12, err_msg=name)
    untouched = Parts(ROOT)
    for name in ("frozen", "never"):
        assert torch.equal(getattr(model, name).weight, getattr(untouched, name).weight), "not moved by a bit"
    if comm.rank == ROOT:
        unused = {f"{name}.{kind}" for name in ("frozen", "never") for kind in ("weight", "bias")}
        rare = {"rare.weight", "rare.bias"}
        assert missing == [unused | (rare if version % 3 else set()) for version in range(8)]


@pytest.mark.parallel(WORKERS + 1)
def test_a_bf16_model_is_updated_by_the_float32_mean_rounded_once(comm):
    model, twin = new_model().bfloat16(), new_model().bfloat16()
    optimizer, sent = sgd(twin), []

    def keep(session, x):
        sent.append([p.grad.float().numpy() for p in model.parameters()])

    train(comm, model, sgd(model), data=Halves(), body=keep, policy=ALL, steps=6)
    for of_step in zip(*on_all(comm, sent)[:WORKERS], strict=True):
        for p, *gradients in zip(twin.parameters(), *of_step, strict=True):
            p.grad = torch.from_numpy(sum(gradients) / np.float32(WORKERS)).bfloat16()
        optimizer.step()
    for own, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert own.dtype is torch.bfloat16 and torch.equal(own, expected)


class Halves:
    """The data in bfloat16, drawn by the global generator that the session seeds for each worker."""

    def __iter__(self):
        while True:
            chosen = torch.randint(len(DATA), (8,))
            x, y = DATA[chosen]
            yield x.bfloat16(), y


# -- buffers ---------------------------------------------------------------------------------------


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize(("transport", "own_copy"), [(t, own) for t in ("shared", "messages") for own in (False, True)])
def test_a_late_step_leaves_no_trace_in_buffers(comm, monkeypatch, tmp_path, transport, own_copy):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    counter = Counter(comm, tmp_path)
    model, after = new_model(norm=True), []
    published = [copied(model.buffers())]

    def publish(record):
        published.append(copied(session.snapshot().buffers()))
        for one, expected in zip(model.buffers(), published[-1], strict=True):
            assert np.array_equal(one.numpy(), np.asarray(expected)), "the root's model is the newest, buffers too"
        counter.count()

    with mpisync.Session(
        comm, model, sgd(model), policy=mpisync.BackupWorkers(1), progress=False, on_step=publish, own_copy=own_copy
    ) as session:
        for number, (x, y) in enumerate(session.batches(loader(), steps=300)):
            loss = F.cross_entropy(model(1000.0 * x if session.worker == 0 else x), y)
            loss.backward()
            if session.worker == 0 and number % 3 == 2:
                counter.wait_for_more_than(session.version)
            verdict = session.step(loss)
            after.append((verdict.accepted, session.version, copied(model.buffers())))
            if session.worker == 0 and number == 11:
                session.stop()
    published = comm.bcast(published, root=ROOT)
    accepted = on_all(comm, [accepted for accepted, *_ in after])[0]
    assert accepted[2:12:3] == [False] * 4, "it was late each time and went on"
    for _, version, buffers in after:
        for one, expected in zip(buffers, published[version], strict=True):
            np.testing.assert_array_equal(one, expected)
