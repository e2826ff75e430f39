"""snapshot, evaluate and state_dict of models of which copy.deepcopy makes no copy."""

import threading
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from training import DATA, WORKERS, Shared, flat, sgd, train

import mpisync
from mpisync.model.copies import copy_of, state_of

ROOT = WORKERS


class Odd(nn.Module):
    """Holds what cannot be copied, in plain attributes and in containers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.cached = self.nested = None
        self.lock, self.event = threading.RLock(), threading.Event()
        self.me = weakref.ref(self)
        self.register_forward_hook(self.counted)
        self.calls = 0

    def counted(self, *_):
        with self.lock:
            self.calls += 1

    def forward(self, x):
        self.cached = torch.tanh(self.a(x))
        self.nested = {"all": [self.cached, (self.cached * 2,)]}
        return self.b(self.cached)


def weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3))


def pruned():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    prune.l1_unstructured(model[0], "weight", 0.3)
    return model


class Recurrent(nn.Module):
    """Its LSTM holds its parameters in a list, too."""

    def __init__(self):
        super().__init__()
        self.lstm, self.last = nn.LSTM(2, 4, num_layers=2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.lstm(x.view(-1, 3, 2))[0][:, -1])


MODELS = {
    "odd": Odd,
    "weight_norm": weight_norm,
    "spectral_norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3)),
    "parametrized": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)),
        nn.Tanh(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3)),
    ),
    "pruned": pruned,
    "recurrent": Recurrent,
    "shared": Shared,
}


def made(name):
    torch.manual_seed(0)
    return MODELS[name]().double()


def trainable(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def batches():
    return [(torch.stack([x for x, _ in part]), torch.tensor([y for _, y in part])) for part in
            ([DATA[8 * n + i] for i in range(8)] for n in range(WORKERS))]  # fmt: skip


def one_process(name, steps):
    """Train on the union of the workers' batches; predictions after each step, and the model."""
    model = made(name)
    optimizer, found = trainable(model), []
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        found.append(predicted(model))
    return model, found


def predicted(model):
    """Without a trace: a forward pass of a copy in eval mode, or of the model itself."""
    mode, calls = model.training, getattr(model, "calls", 0)
    with torch.no_grad():
        result = model.eval()(DATA.tensors[0][:5]).numpy()
    model.train(mode)
    if calls:
        model.calls = calls
    return result


@pytest.mark.parametrize("transport", ["shared", "messages"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "shared"])
@pytest.mark.parallel(WORKERS + 1)
def test_a_snapshot_computes_with_the_newest_parameters_of_its_own(comm, monkeypatch, transport, name):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    model = made(name)
    reference, expected = one_process(name, 4)
    seen, rooted = [], []

    def look(session, x):
        if session.worker == 0:
            twin, state = session.snapshot(), session.state_dict()["model"]
            before = flat(model)
            seen.append((predicted(twin), session.evaluate(predicted, every=1)))
            fresh = made(name)
            fresh.load_state_dict(state)
            assert np.array_equal(predicted(fresh), seen[-1][0])
            assert np.array_equal(flat(model), before)
            for p in twin.parameters():  # its own: the model does not follow
                p.data.zero_()
            assert np.array_equal(flat(model), before)

    holder = []

    def look_at_root(record):
        rooted.append(predicted(copy_of(model, holder[0].newest(average=False)[1])))

    train(
        comm, model, trainable(model), steps=4, data=batches(), body=look, policy=mpisync.BackupWorkers(0),
        roles=holder, on_step=look_at_root,
    )  # fmt: skip
    # Looks come before each step, so they are of versions 0 to 3.
    for (twins, evaluated), then in zip(seen[1:], expected, strict=False):
        assert np.abs(twins - then).max() < 1e-6
        assert np.array_equal(evaluated, twins)
    assert len(seen) == (4 if comm.rank == 0 else 0)
    assert len(rooted) == (4 if comm.rank == ROOT else 0)
    assert all(np.abs(now - then).max() < 1e-6 for now, then in zip(rooted, expected, strict=False))
    values = model.state_dict()
    assert all((values[key] - value).abs().max() < 1e-6 for key, value in reference.state_dict().items())


@pytest.mark.parallel(WORKERS + 1)
def test_a_state_dict_is_the_models_own_ties_and_hooks_included(comm):
    model, states = Shared().double(), []
    model.register_buffer("scratch", torch.zeros(3), persistent=False)
    model.big = torch.zeros(1000)  # no part of it
    model.register_buffer("corner", torch.arange(100.0)[:2])  # of a large memory
    hooked = []

    def rename(module, state, prefix, metadata):
        state["first"] = state.pop("norm.weight")
        state["half"] = state["one.weight"][:3]
        state["live"] = module.last.weight
        hooked.append(module)

    model.register_state_dict_post_hook(rename)

    def look(session, x):
        if not states:
            states.append(session.state_dict())
            states.append(states[0]["model"]["one.weight"].clone())

    _, session = train(comm, model, trainable(model), steps=3, body=look)
    states = states or [session.state_dict(), model.one.weight.detach().clone()]
    state = states[0]["model"]
    assert list(state) == list(model.state_dict()) and "scratch" not in state and hooked[0] is model
    assert state["_extra_state"] == {"made": "here"} and state._metadata == model.state_dict()._metadata
    assert state["one.weight"].data_ptr() == state["other.weight"].data_ptr()
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)
    assert not any(t.requires_grad for t in tensors)
    live = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert not live & {t.untyped_storage().data_ptr() for t in tensors}
    assert torch.equal(states[1], state["one.weight"]), "it does not go on with the training"
    assert torch.equal(state["half"], state["one.weight"][:3]) and torch.equal(state["live"], state["last.weight"])


# -- without ranks ---------------------------------------------------------------------------------


def test_locks_are_made_anew_and_what_was_computed_loses_its_graph():
    model = Odd().double()
    model(DATA.tensors[0][:2])
    with model.lock:
        twin = copy_of(model, [(model.a.weight, torch.ones(8, 6).double())])
        done = threading.Thread(target=twin, args=(DATA.tensors[0][:2],), daemon=True)
        done.start()
        done.join(10)
    assert not done.is_alive() and (model.calls, twin.calls) == (1, 2), "its hook is its own, and so is its lock"
    assert (twin.a.weight == 1).all() and not (model.a.weight == 1).any()
    again = copy_of(model, [])
    assert torch.equal(again.cached, model.cached) and again.cached.is_leaf and not again.cached.requires_grad
    assert again.nested["all"][0] is again.cached and again.nested["all"][1][0].is_leaf
    assert again.nested["all"][0] is not model.cached and not model.cached.is_leaf


@pytest.mark.parametrize(
    ("make", "kind"), [(lambda: open("/dev/null"), "TextIOWrapper"), (lambda: iter(x for x in "ab"), "generator")]
)
def test_what_cannot_be_copied_is_shared_and_named(make, kind):
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].odd = {"kept": [make()]}
    with pytest.warns(UserWarning, match=rf"shares with the model .*: .0.odd\['kept'\]\[0\]. .*{kind}"):
        twin = copy_of(model, [(model[0].bias, torch.ones(2))])
    assert twin[0].odd["kept"][0] is model[0].odd["kept"][0] and (twin[0].bias == 1).all()
    if kind == "TextIOWrapper":
        twin[0].odd["kept"][0].close()
    state = state_of(model, [(model[0].bias, torch.ones(2))])  # needs no copy of the model
    assert (state["0.bias"] == 1).all() and not (model[0].bias == 1).all()


class Unwilling(nn.Linear):
    """A module that refuses to be copied."""

    def __deepcopy__(self, memo):
        raise ValueError("not me")


def test_a_module_that_cannot_be_copied_is_named():
    model = nn.Sequential(nn.Linear(2, 2), Unwilling(2, 2))
    with pytest.raises(TypeError, match=r"module '1' \(a .*Unwilling\) cannot be copied \(not me\).*state_dict"):
        copy_of(model, [])
    assert list(state_of(model, [])) == list(model.state_dict())


class Forgetful(nn.Linear):
    """A module that copies itself in its own way."""

    def __deepcopy__(self, memo):
        return Forgetful(self.in_features, self.out_features)


def test_values_reach_a_module_that_copies_itself():
    model = nn.Sequential(Forgetful(2, 2))
    assert (copy_of(model, [(model[0].weight, torch.ones(2, 2))])[0].weight == 1).all()


def test_a_replaced_parameter_is_said():
    model = nn.Linear(2, 2)
    old, model.bias = model.bias, nn.Parameter(torch.zeros(2))
    with pytest.raises(RuntimeError, match=r"a tensor of the model, \[2\], was taken out of it or replaced"):
        copy_of(model, [(old, torch.ones(2))])


class Failing(nn.Module):
    """A module whose state fails."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def get_extra_state(self):
        raise OSError("nothing there")


def test_the_model_has_its_own_values_again_whatever_its_state_does():
    model = Failing()
    place = model.weight.data_ptr()
    with pytest.raises(OSError, match="nothing there"):
        state_of(model, [(model.weight, torch.ones(2))])
    assert model.weight.data_ptr() == place and (model.weight == 0).all()


def test_alone_too():
    from mpi4py import MPI

    model, seen = made("odd"), []
    train(
        MPI.COMM_SELF, model, sgd(model), steps=2,
        body=lambda session, x: seen.append((predicted(session.snapshot()), session.state_dict()["model"])),
    )  # fmt: skip
    assert len(seen) == 2 and not np.array_equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[0][1]["a.weight"], seen[1][1]["a.weight"])
