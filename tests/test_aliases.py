"""Tensors that look into a parameter's memory are refused by name; what only seems to is not."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import DATA, WORKERS, fails_everywhere, flat, train

import mpisync
from mpisync.model.aliases import ComputedViews, check_aliases
from mpisync.model.flat import FlatModel
from mpisync.model.validation import check_model_and_optimizers

CURE = "make the view where it is used (in forward), or tie the two by assigning the same Parameter to both"


class Two(nn.Module):
    """Two layers, and what a test adds."""

    def __init__(self, add=lambda model: None):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)
        self.double()
        add(self)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def sgd(model, **more):
    return torch.optim.SGD(model.parameters(), lr=0.1, **more)


def flattened(model):
    """The parameters are pieces of one tensor, which is kept."""
    model.whole = torch.cat([p.data.flatten() for p in model.parameters()])
    start = 0
    for p in model.parameters():
        p.data = model.whole[start : start + p.numel()].view(p.shape)
        start += p.numel()


LOOKS = {
    "buffer 'codebook'": lambda m: m.register_buffer("codebook", m.a.weight.data),
    "buffer 'a.row'": lambda m: m.a.register_buffer("row", m.a.weight.data[3, 2:4], persistent=False),
    "attribute 'wt'": lambda m: setattr(m, "wt", m.a.weight.data.t()),
    "attribute 'b.kept['w'][1][0]'": lambda m: setattr(m.b, "kept", {"w": [1, (m.a.weight.detach(),)]}),
    "attribute 'whole'": flattened,
    "attribute 'last'": lambda m: setattr(m, "last", m.a.weight.data.view(-1)[-1:]),
}


@pytest.mark.parametrize("what", LOOKS)
def test_whatever_looks_into_a_trained_parameter_is_refused_by_name(what):
    model = Two(LOOKS[what])
    with pytest.raises(ValueError, match="looks into the memory of parameter") as caught:
        check_aliases(model, [sgd(model)])
    said = str(caught.value)
    assert said.replace('"', "'").startswith(f"{what} looks into the memory of parameter 'a.") and CURE in said


@pytest.mark.parametrize("what", ["buffer 'codebook'", "attribute 'wt'"])
@pytest.mark.parallel(WORKERS + 1)
def test_every_rank_says_so_at_the_start(comm, what):
    model = Two(LOOKS[what])
    with fails_everywhere(comm, ValueError, f"{what} looks into the memory of parameter 'a.weight'", CURE):
        train(comm, model, sgd(model))


class Keeping(torch.optim.SGD):
    """An optimizer that keeps views of the parameters, and wraps nothing."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        self.fast = [p.data for group in self.param_groups for p in group["params"]]


def test_an_optimizer_that_keeps_views_is_refused():
    model = Two()
    with pytest.raises(ValueError, match=r"the optimizer's 'fast\[0\]' looks into the memory of parameter 'a.weight'"):
        check_aliases(model, [Keeping(model.parameters())])
    optimizer = sgd(model, momentum=0.9)
    model(DATA.tensors[0][:4]).sum().backward()
    optimizer.step()
    check_aliases(model, [optimizer])


def test_a_frozen_parameter_in_a_trained_ones_memory_is_refused():
    model = Two()
    model.frozen = nn.Parameter(model.a.weight.data[1:2], requires_grad=False)
    with pytest.raises(ValueError, match=r"'a.weight' and 'frozen' share memory"):
        FlatModel(model)
    model.frozen = nn.Parameter(model.a.weight.data[1:3], requires_grad=False)
    model.none = nn.Parameter(model.a.weight.data[1:1], requires_grad=False)  # between them
    with pytest.raises(ValueError, match="share memory"):
        FlatModel(model)


class Remade(Two):
    """Makes a view of its weight afresh in every forward pass, and keeps it."""

    def forward(self, x):
        self.view = self.a.weight.t()
        return self.b(torch.tanh(x @ self.view + self.a.bias))


def two_views(model):
    """Two buffers of one memory, one buffer under two names, a plain view of a buffer: all move together."""
    model.register_buffer("one", torch.zeros(4).double())
    model.register_buffer("other", model.one[:2])
    model.a.register_buffer("again", model.one)
    model.seen = model.one[1:]


def spectral(model):
    model.a = nn.utils.spectral_norm(model.a)  # its `weight` begins as a view of its parameter


def tied(model):
    model.a.also = model.a.weight
    model.every = [model.a.weight, model.b.weight]


def frozen(model):
    model.still = nn.Parameter(torch.ones(2), requires_grad=False)
    model.view_of_still = model.still.data[:1]


RIGHT = {"two views": two_views, "spectral": spectral, "tied": tied, "frozen": frozen, "plain": lambda model: None}


@pytest.mark.parametrize("kind", RIGHT)
def test_what_moves_along_passes(kind):
    model = Two(RIGHT[kind])
    check_model_and_optimizers(model, [sgd(model)])
    check_aliases(model, [sgd(model)])
    ComputedViews(model).check()


@pytest.mark.parametrize("layer", [nn.LSTM(2, 3, 2, bidirectional=True), nn.GRU(2, 3), nn.MultiheadAttention(4, 2)])
def test_layers_that_list_their_parameters_pass(layer):
    check_aliases(layer, [sgd(layer)])


def one_process(make, steps, batches):
    torch.manual_seed(0)
    model = make()
    optimizer = sgd(model)
    for _ in range(steps):
        optimizer.zero_grad()
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("transport", ["shared", "messages"])
@pytest.mark.parallel(WORKERS + 1)
def test_views_that_are_made_afresh_are_right_whenever_the_first_was_made(comm, monkeypatch, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    x, y = DATA.tensors
    batches = [(x[:8], y[:8]), (x[8:16], y[8:16])]
    for make in (Remade, lambda: Two(two_views), lambda: Two(tied)):
        torch.manual_seed(0)
        model = make()
        model(x[:2])  # leaves a view, which is replaced
        train(comm, model, sgd(model), steps=3, data=batches, policy=mpisync.BackupWorkers(0))
        assert np.abs(flat(model) - flat(one_process(make, 3, batches))).max() < 1e-6


@pytest.mark.parallel(WORKERS + 1)
def test_a_computed_view_that_no_forward_pass_replaces_is_said(comm):
    model = Two(lambda m: setattr(m, "first", m.a.weight[0]))
    with fails_everywhere(comm, RuntimeError, "attribute 'first' looks into the memory of parameter 'a.weight'", CURE):
        train(comm, model, sgd(model))


# -- embeddings that rescale ------------------------------------------------------------------------


class Words(nn.Module):
    """An embedding of words, rescaled in forward or not."""

    def __init__(self, kind=nn.Embedding, **more):
        super().__init__()
        self.words, self.last = kind(64, 4, **more), nn.Linear(4, 3)
        self.double()

    def forward(self, index):
        found = self.words(index)
        return self.last(found if found.dim() == 2 else found.mean(1))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_that_rescales_in_forward_is_refused(kind):
    model = Words(kind, max_norm=1.5, norm_type=1.0)
    with pytest.raises(TypeError, match=rf"module 'words' is an {kind.__name__}\(max_norm=1.5\).*renorm_\(1, 0, 1.5\)"):
        check_model_and_optimizers(model, [sgd(model)])
    check_model_and_optimizers(plain := Words(kind), [sgd(plain)])


@pytest.mark.parametrize("transport", ["shared", "messages"])
@pytest.mark.parallel(WORKERS + 1)
def test_the_cure_that_it_names_is_right(comm, monkeypatch, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    generator = torch.Generator().manual_seed(3)
    index = torch.arange(64)[torch.randperm(64, generator=generator)].view(2, 4, 8)  # no word is in two batches
    batches = [(part, torch.arange(4) % 3) for part in index]

    def made(**more):
        torch.manual_seed(0)
        model = Words(**more)
        model.words.weight.data.renorm_(2, 0, 0.9)
        return model

    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    optimizer.register_step_post_hook(lambda *_: model.words.weight.data.renorm_(2, 0, 0.9))
    train(comm, model, optimizer, steps=5, data=batches, policy=mpisync.BackupWorkers(0))
    own = made(max_norm=0.9)
    others = torch.optim.SGD(own.parameters(), lr=2.0)
    for _ in range(5):
        others.zero_grad()
        F.cross_entropy(own(index.view(8, 8)), torch.arange(4).repeat(2) % 3).backward()
        others.step()
    own(index.view(8, 8))
    assert np.abs(flat(model) - flat(own)).max() < 1e-6
    free = made()
    train(comm, free, torch.optim.SGD(free.parameters(), lr=2.0), steps=5, data=batches)
    assert np.abs(flat(free) - flat(own)).max() > 1e-3, "it matters"


class Rescaled(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.words, self.call = nn.Parameter(torch.ones(6, 4)), call

    def forward(self, index):
        return self.call(self.words, index)


@pytest.mark.parametrize("own_copy", [False, True])
@pytest.mark.parametrize("call", [
    lambda words, index: F.embedding(index, words, max_norm=1.0),
    lambda words, index: F.embedding_bag(index, words, max_norm=1.0),
    lambda words, index: F.embedding(index, words[1:3], max_norm=1.0),  # of a view
])  # fmt: skip
@pytest.mark.parallel(2)
def test_a_parameter_that_a_function_rescales_is_refused(comm, call, own_copy):
    model = Rescaled(call)
    session = mpisync.Session(comm, model, sgd(model), own_copy=own_copy, progress=False)
    with pytest.raises((RuntimeError, mpisync.PeerFailed), match=r"rescales parameter 'words' in forward.*renorm_\(2"):
        with session:
            for index in session.batches([torch.tensor([[0, 1]])], steps=3):
                loss = model(index).sum()
                loss.backward()
                session.step(loss)
    call(model.words, torch.tensor([[0, 1]]))  # after the session it may
    assert float(model.words[1].detach().norm()) < 1.01 < float(model.words[5].detach().norm())


@pytest.mark.parametrize("own_copy", [False, True])
@pytest.mark.parallel(2)
def test_what_is_no_parameter_may_be_rescaled(comm, own_copy):
    table = torch.ones(6, 4)
    model = nn.Linear(4, 2)
    with mpisync.Session(comm, model, sgd(model), own_copy=own_copy, progress=False) as session:
        for index in session.batches([torch.tensor([0, 1])], steps=3):
            loss = model(F.embedding(index, table, max_norm=1.0)).sum()
            loss.backward()
            session.step(loss)
            looked = session.snapshot()
            F.embedding(index, looked.weight, max_norm=1e-3)
    assert session.version == 3 and (session.worker is None or float(table[0].norm()) < 1.01)
