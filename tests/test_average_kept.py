"""A moving average outlives its run: a run cut in two has the average of the uncut one, bit for bit."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mpi4py import MPI
from training import DATA, WORKERS, Shared, flat, new_model, sgd, train

import mpisync

BATCHES = [(DATA.tensors[0][at : at + 8], DATA.tensors[1][at : at + 8]) for at in range(0, 64, 8)]


def run(comm, model, steps, kept=None, average=None):
    """Train on; the root's state, on every rank, and what the session calls its average."""
    optimizer = sgd(model)
    if kept:
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        average = kept["average"] if average is None else average
    with mpisync.Session(comm, model, optimizer, ema=0.9, average=average, progress=False) as session:
        for x, y in session.batches(BATCHES, steps=steps, resume=kept and kept["samples"]):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            session.step(loss)
    return comm.bcast(session.state_dict(), root=comm.size - 1), session.average


def check_cut_in_two(comm):
    whole, resumed = new_model(norm=True), new_model(seed=5, norm=True)
    expected, _ = run(comm, whole, 7)
    state, at_the_end = run(comm, new_model(norm=True), 3)
    assert all(torch.equal(state["average"][name], value) for name, value in at_the_end.items())
    after, average = run(comm, resumed, 4, state)
    assert np.array_equal(flat(resumed), flat(whole))
    for name, value in expected["average"].items():
        assert torch.equal(after["average"][name], value) and torch.equal(average[name], value), name
    other, _ = run(comm, new_model(norm=True), 4, {**state, "average": state["model"]})
    assert not torch.equal(other["average"]["0.weight"], after["average"]["0.weight"]), "it matters"
    new_model(norm=True).load_state_dict(state["average"])


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", ["shared", "messages"])
def test_a_run_cut_in_two_has_the_average_of_the_uncut_one(comm, monkeypatch, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    check_cut_in_two(comm)


def test_alone_too():
    check_cut_in_two(MPI.COMM_SELF)


@pytest.mark.parallel(WORKERS + 1)
def test_the_root_alone_has_it_in_the_loop_too_and_without_ema_nobody(comm):
    model, seen = new_model(), []

    def note(record):
        average = session[0].state_dict()["average"]
        seen.append(torch.equal(average["0.weight"], session[0].snapshot(average=True)[0].weight))

    session = []
    with mpisync.Session(comm, model, sgd(model), ema=0.5, on_step=note, progress=False) as own:
        session.append(own)
        for x, y in own.batches(BATCHES, steps=3):
            F.cross_entropy(model(x), y).backward()
            own.step()
            assert "average" not in own.state_dict()
    assert seen == ([True] * 3 if comm.rank == WORKERS else [])
    _, without = train(comm, model, sgd(model), steps=2)
    assert "average" not in without.state_dict()


@pytest.mark.parallel(WORKERS + 1)
def test_tied_frozen_and_compiled_models_go_on(comm):
    torch.manual_seed(0)
    model = torch.compile(Shared().double(), backend="eager")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    _, session = train(comm, model, optimizer, ema=0.5, steps=3)
    for kept in (session.state_dict().get("average"), session.average):  # the model's names, and its wrapper's
        _, again = train(comm, model, optimizer, ema=0.5, average=comm.bcast(kept, root=WORKERS), steps=0)
        tensors = {name: value for name, value in session.average.items() if isinstance(value, torch.Tensor)}
        assert len(tensors) > 8 and all(torch.equal(again.average[name], value) for name, value in tensors.items())


def lacking(average):
    return {name: value for name, value in average.items() if name != "0.bias"}


def cast(average):
    return {name: value.float() for name, value in average.items()}


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lacking, "average has no tensor for parameter '0.bias'"),
        (cast, "average has [8, 6] float32 for parameter '0.weight', which is [8, 6] float64"),
        (lambda average: [average], "average must be what session.state_dict()['average'] was on the root"),
    ],
)
def test_what_is_no_average_of_this_model_is_refused_on_every_rank(comm, change, words):
    model = new_model()
    average = change(model.state_dict()) if comm.rank == WORKERS else None
    with pytest.raises((TypeError, ValueError)) as caught:
        train(comm, model, sgd(model), ema=0.5, average=average)
    assert words in str(caught.value)


def test_an_average_needs_a_decay_to_go_on_with():
    model = new_model()
    with pytest.raises(ValueError, match="ema= is not given"):
        mpisync.Session(MPI.COMM_SELF, model, sgd(model), average=model.state_dict())
