"""What tests of the torch face train: a small model, its data, and the loops of ordinary scripts."""

import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mpisync

WORKERS = 2
DATA = TensorDataset(torch.randn(64, 6, generator=torch.Generator().manual_seed(1)).double(), torch.arange(64) % 3)


def new_model(seed=0, norm=False):
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Linear(8, 3)).double()


def sgd(model, **more):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **more})


def loader(**more):
    return DataLoader(DATA, **{"batch_size": 8, "shuffle": True, **more})


def train(comm, model, optimizer, steps=12, data=None, body=None, roles=None, **more):
    """Run an ordinary loop; the verdicts that this rank got. `roles` takes what the session was inside."""
    verdicts = []
    with mpisync.Session(comm, model, optimizer, progress=False, **more) as session:
        if roles is not None:
            roles.append(session._role)
        for x, y in session.batches(loader() if data is None else data, steps=steps):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            if body is not None:
                body(session, x)
            verdicts.append(session.step(loss))
    return verdicts, session


def on_union(model, optimizer, batches, loss_of, *, workers=WORKERS, steps=range(6), before=None):
    """Train in one process on the union of the workers' batches, as a list of them is shared out."""
    for step in steps:
        if before is not None:
            before(model, step)
        for worker in range(workers):
            own = batches[worker::workers]
            (loss_of(model, *own[step % len(own)]) / workers).backward()
        optimizer.step()
        optimizer.zero_grad()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()


def on_all(comm, value):
    return comm.allgather(value)


@contextmanager
def fails_everywhere(comm, kind, *words):
    """Every rank gets an error, and the words are in somebody's."""
    with pytest.raises((kind, mpisync.PeerFailed)) as caught:
        yield
    texts = " ".join(comm.allgather(str(caught.value)))
    for word in words:
        assert word in texts


class Shared(nn.Module):
    """With BatchNorm's buffers, a tied weight, a frozen one, and state that is no tensor."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.one.weight
        self.last = nn.Linear(6, 3)
        self.last.bias.requires_grad_(False)

    def forward(self, x):
        return self.last(self.other(self.one(self.norm(x))))

    def get_extra_state(self):
        return {"made": "here"}

    def set_extra_state(self, state):
        assert state == {"made": "here"}


def accumulate(comm, model, optimizer, every=2, steps=6, body=None, **more):
    """An ordinary loop that steps once in `every` batches; the verdicts, and how many batches were drawn."""
    verdicts, drawn, roles = [], 0, []
    with mpisync.Session(comm, model, optimizer, progress=False, **more) as session:
        roles.append(session._role)
        for number, (x, y) in enumerate(session.batches(loader(), steps=steps)):
            drawn += 1
            loss = F.cross_entropy(model(x), y)
            (loss / every).backward()
            if body is not None:
                body(session, number, x)
            if (number + 1) % every == 0:
                verdicts.append(session.step(loss))
    return verdicts, drawn, roles[0]


def check_average(comm, model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    _, session = train(comm, model, optimizer, ema=0.5)
    trained = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    twin = session.snapshot(average=True)
    model.load_state_dict(session.average)
    plain = getattr(model, "_orig_mod", model)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), twin.parameters(), strict=True))
    moved = {name for name, value in model.state_dict().items() if name in trained and not value.equal(trained[name])}
    names = {name.removeprefix("_orig_mod.") for name in moved}
    assert names == {"norm.weight", "norm.bias", "one.weight", "one.bias", "other.weight", "other.bias", "last.weight"}
    kept = {name: value.clone() for name, value in session.average.items() if isinstance(value, torch.Tensor)}
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert all(torch.equal(session.average[name], value) for name, value in kept.items())
    values = comm.allgather({name: value.numpy() for name, value in kept.items()})
    assert all(np.array_equal(values[0][name], other[name]) for other in values for name in other)


def check_ended(comm, workers):
    model = new_model(norm=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer := sgd(model), 5)
    _, session = train(comm, model, optimizer, scheduler=scheduler, ema=0.5, steps=5)
    comm.Barrier()  # nobody is there who could still answer
    with torch.no_grad():
        model[0].weight.fill_(7.0)  # the model is the user's own again
    assert session.stale() and session.version == 5 and session.workers == workers
    session.stop()
    assert (session.snapshot()[0].weight == 7.0).all()
    assert not (session.snapshot(average=True)[0].weight == 7.0).any()
    state = session.state_dict()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state["model"].items())
    assert ("optimizer" in state and "scheduler" in state) == (comm.rank == comm.size - 1)
    found = session.evaluate(lambda twin: twin[0].weight.max().item(), every=1)
    assert found == (7.0 if session.worker == 0 else None)
    with pytest.raises(RuntimeError, match="session has ended"):
        session.step(1.0)
    with pytest.raises(RuntimeError, match="make another session"):
        session.batches(loader())


def check_forgotten(comm):
    model = new_model()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with mpisync.Session(comm, model, sgd(model), progress=False) as session:
            for number, (x, y) in enumerate(session.batches(loader())):
                F.cross_entropy(model(x), y).backward()
                if number == 120:
                    break
    texts = [str(w.message) for w in caught if "100 batches were drawn since" in str(w.message)]
    assert len(texts) == (session.worker is not None)
