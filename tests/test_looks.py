"""What a look at a worker's model shows: one version, whole and compact, whatever the root writes meanwhile."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import DATA, WORKERS, flat, loader, new_model, on_all, sgd

import mpisync
from mpisync.model.looks import Looks

TRANSPORTS = ("shared", "messages")


class Branches(nn.Module):
    """Parts that are called by themselves, one that keeps its parameters in a list, and a frozen one."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.memory = nn.LSTM(4, 4)
        self.still = nn.Linear(4, 4).requires_grad_(requires_grad=False)

    def forward(self, x):
        return self.head(self.memory(self.body(self.still(x)))[0])


X = torch.zeros(3, 4)


def without_gradients(action, mode=torch.no_grad):
    def act(model):
        with mode():
            action(model)

    return act


def evaluating(action):
    def act(model):
        model.eval()
        action(model)
        model.train()

    return act


LOOKS = {
    "state_dict": lambda m: m.state_dict(),
    "a part's state_dict": lambda m: m.head.state_dict(),
    "save": lambda m: torch.save(m, io.BytesIO()),
    "save a part": lambda m: torch.save({"head": m.head}, io.BytesIO()),
    "deepcopy": copy.deepcopy,
    "deepcopy a part": lambda m: copy.deepcopy([m.body]),
    "pickle": pickle.dumps,
    "no_grad": without_gradients(lambda m: m(X)),
    "no_grad, a part": without_gradients(lambda m: m.body(X)),
    "no_grad, an LSTM": without_gradients(lambda m: m.memory(X)),
    "inference_mode": without_gradients(lambda m: m(X), torch.inference_mode),
    "set_grad_enabled": without_gradients(lambda m: m(X), lambda: torch.set_grad_enabled(mode=False)),
    "eval": evaluating(lambda m: m(X)),
    "average": without_gradients(lambda m: torch.optim.swa_utils.AveragedModel(Branches()).update_parameters(m)),
    "norms": without_gradients(lambda m: [p.norm() for p in m.parameters()]),
    "one parameter": without_gradients(lambda m: m.head.weight.norm()),
    "named_parameters": without_gradients(lambda m: dict(m.named_parameters())),
}
NO_LOOKS = {
    "train": lambda m: m(X).sum().backward(),
    "zero_grad": lambda m: m.zero_grad(),
    "clip": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1.0),
    "penalty": lambda m: sum(p.square().sum() for p in m.parameters()).backward(),
    "train and eval": lambda m: m.eval().train(),
    "a part in evaluation": lambda m: (m.head.eval(), m(X), m.head.train()),
    "functional_call": lambda m: torch.func.functional_call(m, dict(m.named_parameters()), X),
    "count": lambda m: sum(p.numel() for p in m.parameters()),
}


@pytest.fixture
def watched():
    model, seen = Branches(), []
    looks = Looks(model, lambda: seen.append(1))
    yield model, seen
    looks.undo()
    assert all(type(module._parameters) is dict for module in model.modules())


@pytest.mark.parametrize("what", LOOKS)
def test_looks_are_seen(watched, what):
    model, seen = watched
    LOOKS[what](model)
    assert seen


@pytest.mark.parametrize("what", NO_LOOKS)
def test_what_trains_is_no_look(watched, what):
    model, seen = watched
    NO_LOOKS[what](model)
    assert not seen


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_watched_by_nobody(watched, copied):
    model, seen = watched
    twin = copied(model)
    del seen[:]
    twin.state_dict()
    with torch.no_grad():
        assert torch.equal(twin(X), twin(X))
    assert not seen and all(type(module._parameters) is dict for module in twin.modules())


def test_a_compiled_model_is_looked_at_and_is_not_compiled_again_for_it():
    model, seen = nn.Sequential(nn.Linear(4, 4)), []
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    looks = Looks(compiled, lambda: seen.append(1))
    compiled(X).sum().backward()
    assert not seen
    with torch.no_grad():
        compiled(X)
    assert len(seen) == 1
    with torch.compiler.set_stance("fail_on_recompile"), torch.no_grad():
        compiled(X)
    assert len(seen) == 2
    looks.undo()
    with torch.no_grad():
        compiled(X)
    assert len(seen) == 2


# --- in a run ----------------------------------------------------------------------------------

PARTS, ELEMENTS = 40, 20_000


class Numbered(nn.Module):
    """Every element of every parameter is the version's number, if each gradient is -1 and the rate 1."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Embedding(1, ELEMENTS) for _ in range(PARTS))
        for part in self.parts:
            nn.init.zeros_(part.weight)

    def forward(self):
        return [part(torch.zeros(1, dtype=torch.long)) for part in self.parts]


def loaded(save):
    file = io.BytesIO()
    save(file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def evaluated(model):
    model.eval()
    values = [value.detach() for value in model()]
    model.train()
    return values


def quietly(look, mode=torch.no_grad):
    def act(model):
        with mode():
            return look(model)

    return act


VALUES = [
    lambda m: list(m.state_dict().values()),
    lambda m: [v for part in m.parts for v in part.state_dict().values()],
    lambda m: list(loaded(lambda file: torch.save(m.state_dict(), file)).values()),
    lambda m: list(loaded(lambda file: torch.save(m, file)).parameters()),
    lambda m: list(copy.deepcopy(m).parameters()),
    lambda m: list(pickle.loads(pickle.dumps(m)).parameters()),
    quietly(lambda m: m()),
    quietly(lambda m: m(), torch.inference_mode),
    quietly(lambda m: [nn.utils.parameters_to_vector(m.parameters())]),
    quietly(lambda m: [p.clone() for p in m.parameters()]),
    evaluated,
]


def torn_looks(comm, least):
    """Look in turn in every way, at all moments of a step, until `least` looks; those that showed two versions."""
    model = Numbered()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    looks, torn = 0, []
    with mpisync.Session(comm, model, optimizer, policy=mpisync.BackupWorkers(1), progress=False) as session:
        for _ in session.batches([torch.ones(1)] * 6):
            for moment in range(3):
                if session.worker == 0:
                    values = VALUES[looks % len(VALUES)](model)
                    shown = {float(x) for value in values for x in (value.detach().min(), value.detach().max())}
                    looks += 1
                    if len(shown) > 1:
                        torn.append((looks, sorted(shown)))
                if moment == 1:
                    for p in model.parameters():
                        p.grad = -torch.ones_like(p)
                    session.step()
            if looks >= least:
                session.stop()
        version = session.version
    assert flat(model).min() == flat(model).max() == version
    return looks, torn


@pytest.mark.parallel(3)
@pytest.mark.timeout(500)
@pytest.mark.parametrize("least", [330, pytest.param(10_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_no_look_is_torn(comm, monkeypatch, transport, least):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    looks, torn = torn_looks(comm, least)
    assert not torn and (looks >= least or comm.rank != 0)


def saved_bytes(value):
    file = io.BytesIO()
    torch.save(value, file)
    return len(file.getvalue())


def is_compact(model):
    """Whether each parameter has a storage of its own, no larger than it needs, as safetensors wants it."""
    tensors = list(model.state_dict().values())
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors}
    return list(storages.values()) == [value.nbytes for value in tensors]


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_look_is_compact_on_workers_and_at_the_root(comm, monkeypatch, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    model = nn.Sequential(nn.Linear(6, 2000), nn.Linear(2000, 3)).double()
    sizes = []

    def look(_=None):
        sizes.append((is_compact(model), saved_bytes(model[1].bias.detach()), saved_bytes(model[1].state_dict())))

    with mpisync.Session(comm, model, sgd(model), progress=False, on_step=look) as session:
        for x, y in session.batches(loader(), steps=4):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            session.step(loss)
            look()
    look()
    assert len(sizes) == 5
    assert all(compact for compact, *_ in sizes) and max(whole for *_, whole in sizes) < 55_000


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("policy", [mpisync.BackupWorkers(0), mpisync.Async(2)])
def test_looks_change_no_bit_of_the_training(comm, monkeypatch, tmp_path, transport, policy):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    record = str(comm.bcast(tmp_path)) + "/r.jsonl"

    def run(policy, look, **more):
        model = new_model(norm=True)
        with mpisync.Session(comm, model, sgd(model), policy=policy, progress=False, **more) as session:
            for number, (x, y) in enumerate(session.batches(loader(), steps=12)):
                look(model, number)
                loss = F.cross_entropy(model(x), y)
                look(model, number + 1)
                loss.backward()
                session.step(loss)
                look(model, number + 2)
        return model.state_dict()

    kinds = [lambda m: m.state_dict(), copy.deepcopy, quietly(lambda m: m[0](DATA[0][0])), pickle.dumps]
    plain = run(policy, lambda *_: None, record=record)
    comm.barrier()
    seen = run(mpisync.Replay(record), lambda model, number: kinds[number % 4](model))
    assert all(torch.equal(plain[name], seen[name]) for name in plain)


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_before_the_first_batch_and_after_the_loop_a_look_does_not_wait_for_the_root(comm, monkeypatch, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    model = new_model(seed=comm.rank)
    before = flat(model).copy()
    with mpisync.Session(comm, model, sgd(model), progress=False) as session:
        assert (flat(copy.deepcopy(model)) == before).all()
        comm.barrier()  # which the root reaches before it publishes
        for x, y in session.batches(loader(), steps=2):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            session.step(loss)
        after = flat(copy.deepcopy(model))
    assert (after == flat(model)).all()
    assert all((one == after).all() for one in on_all(comm, after))
