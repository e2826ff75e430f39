"""Sessions of several optimizers: stepped together at the root, each guarded on workers as the only one would be."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mpi4py import MPI
from torch import nn, optim
from torch.amp import GradScaler
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from training import DATA, WORKERS, fails_everywhere, flat, loader, new_model, on_all, on_union, sgd, train

import mpisync
from mpisync.records import read_record
from mpisync.session.accumulation import Accumulation

ROOT = WORKERS
BATCHES = [(DATA.tensors[0][at : at + 8], DATA.tensors[1][at : at + 8]) for at in range(0, 64, 8)]


class Judged(nn.Module):
    """A network, and a criterion with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.net, self.temperature = new_model(), nn.Parameter(torch.ones(()).double())

    def forward(self, x):
        return self.net(x) / self.temperature


def matrices(model):
    return [p for p in model.parameters() if p.ndim == 2]


def others(model):
    return [p for p in model.parameters() if p.ndim != 2]


def muon_and_adamw(model):
    return [optim.Muon(matrices(model), lr=0.02), optim.AdamW(others(model), lr=0.01)]


def two_plain(model):
    """What would be fused if it were one."""
    return optim.SGD(matrices(model), lr=0.1), optim.SGD(others(model), lr=0.05)


def of_the_criterion(model):
    return [sgd(model.net), optim.Adam([model.temperature], lr=0.01)]


KINDS = {
    "muon and adamw": (new_model, muon_and_adamw),
    "two plain": (new_model, two_plain),
    "of the criterion": (Judged, of_the_criterion),
}


def kind_of(name):
    if "muon" in name and not hasattr(optim, "Muon"):
        pytest.skip("this torch has no Muon")
    make, optimizers = KINDS[name]
    model = make()
    return model, optimizers(model)


class Together:
    """Several optimizers under the names of one, as one process steps them."""

    def __init__(self, optimizers):
        self.optimizers = optimizers

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def loss_of(model, x, y):
    return F.cross_entropy(model(x), y)


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", ["shared", "messages"])
@pytest.mark.parametrize("name", KINDS)
def test_they_train_as_in_one_process_on_the_union(comm, monkeypatch, transport, name):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    model, optimizers = kind_of(name)
    train(comm, model, optimizers, steps=6, data=BATCHES, policy=mpisync.BackupWorkers(0))
    alone, theirs = kind_of(name)
    on_union(alone, Together(theirs), BATCHES, loss_of)
    assert np.array_equal(flat(model), flat(alone)), "half a gradient and half another are exact"


@pytest.mark.parametrize("name", KINDS)
def test_alone_they_train_as_without_a_session(name):
    model, optimizers = kind_of(name)
    train(MPI.COMM_SELF, model, optimizers, steps=6, data=BATCHES)
    alone, theirs = kind_of(name)
    on_union(alone, Together(theirs), BATCHES, loss_of, workers=1)
    assert np.array_equal(flat(model), flat(alone))


# -- schedulers, state, record ----------------------------------------------------------------------


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("whose", ["the second", "both", "a plateau"])
def test_schedulers_of_any_are_stepped_once_a_version_everywhere(comm, whose):
    model = new_model()
    optimizers = two_plain(model)
    schedulers = {
        "the second": lambda: StepLR(optimizers[1], 2, 0.5),
        "both": lambda: [StepLR(optimizers[0], 3, 0.1), StepLR(optimizers[1], 2, 0.5)],
        "a plateau": lambda: [ReduceLROnPlateau(optimizers[0], patience=99), StepLR(optimizers[1], 2, 0.5)],
    }[whose]()
    train(comm, model, optimizers, steps=4, data=BATCHES, scheduler=schedulers)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    assert rates == [pytest.approx(0.01 if whose == "both" else 0.1), pytest.approx(0.0125)]


@pytest.mark.parallel(WORKERS + 1)
def test_their_states_are_lists_from_which_a_run_goes_on(comm):
    def run(model, steps, state=None):
        optimizers = [optim.Adam(matrices(model)), optim.SGD(others(model), lr=0.1, momentum=0.9)]
        schedulers = [StepLR(optimizer, 2, 0.5) for optimizer in optimizers]
        if state:
            model.load_state_dict(state["model"])
            for own, kept in zip(optimizers + schedulers, state["optimizer"] + state["scheduler"], strict=True):
                own.load_state_dict(kept)
        settings = {"scheduler": schedulers, "progress": False}
        with mpisync.Session(comm, model, optimizers, **settings) as session:
            for x, y in session.batches(BATCHES, steps=steps, resume=state and state["samples"]):
                loss_of(model, x, y).backward()
                session.step()
        return comm.bcast(session.state_dict(), root=ROOT)

    whole = new_model()
    run(whole, 6)
    state = run(new_model(), 4)
    assert [len(state[name]) for name in ("optimizer", "scheduler")] == [2, 2]
    resumed = new_model()
    run(resumed, 2, state)
    assert np.array_equal(flat(resumed), flat(whole))


@pytest.mark.parallel(WORKERS + 1)
def test_the_record_names_them_all(comm, tmp_path):
    path = comm.bcast(str(tmp_path / "run.jsonl"))
    model = new_model()
    optimizers = two_plain(model)
    train(comm, model, optimizers, steps=2, record=path, scheduler=[StepLR(one, 1) for one in optimizers])
    header, _ = read_record(path)
    assert header.optimizer == "SGD(lr=0.1); SGD(lr=0.05)" and header.scheduler == "StepLR; StepLR"


# -- what is refused --------------------------------------------------------------------------------


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: [sgd(m), optim.Adam(others(m))], "parameter '0.bias' is in two optimizers, optimizer[0] (SGD) and"),
        (lambda m: [sgd(m)] * 2, "'0.weight' is in two optimizers, optimizer[0] (SGD) and optimizer[1] (SGD)"),
        (lambda m: [], "a list of one or more, not an empty list"),
        (lambda m: [sgd(m), "adam"], "a list of them, not str"),
        (lambda m: (one for one in [sgd(m)]), "a list of them, not generator"),
        (lambda m: [optim.SGD(matrices(m)), optim.LBFGS(others(m))], "LBFGS evaluates the loss again"),
    ],
)
def test_what_is_no_list_of_optimizers_is_refused_on_every_rank(comm, make, words):
    model = new_model()
    with pytest.raises((TypeError, ValueError)) as caught:
        train(comm, model, make(model))
    assert words in str(caught.value)


@pytest.mark.parallel(WORKERS + 1)
def test_schedulers_of_no_optimizer_or_given_twice_are_refused(comm):
    model = new_model()
    optimizers = two_plain(model)
    with pytest.raises(ValueError, match="StepLR, is of another optimizer than the session's"):
        train(comm, model, optimizers, scheduler=[StepLR(optimizers[0], 1), StepLR(sgd(new_model()), 1)])
    with pytest.raises(ValueError, match="StepLR, is given twice"):
        train(comm, model, optimizers, scheduler=[StepLR(optimizers[0], 1)] * 2)


def keep_a_view(model, optimizer):
    optimizer.fast = [p.data for p in optimizer.param_groups[0]["params"]]


@pytest.mark.parallel(WORKERS + 1)
def test_a_view_that_the_second_keeps_is_refused(comm):
    model = new_model()
    optimizers = two_plain(model)
    keep_a_view(model, optimizers[1])
    with pytest.raises(ValueError, match=r"the optimizer's 'fast\[0\]' looks into the memory of parameter '0.bias'"):
        train(comm, model, optimizers)


MISUSES = {
    "step": (lambda one: one.step(), "optimizer.step() was called on a worker"),
    "state_dict": (lambda one: one.state_dict(), "optimizer.state_dict() was called on a worker"),
    "rate": (lambda one: one.param_groups[0].update(lr=9.0), "optimizer[1].param_groups[0]['lr'] was changed"),
    "hook": (lambda one: one.register_step_pre_hook(print), "a step hook was added"),
}


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("what", MISUSES)
def test_the_second_is_guarded_as_the_first(comm, what):
    model = new_model()
    optimizers = two_plain(model)
    misuse, words = MISUSES[what]
    with fails_everywhere(comm, RuntimeError, words):
        train(comm, model, optimizers, body=lambda session, x: misuse(optimizers[1]))
    assert "step" not in vars(optimizers[1]) and "zero_grad" not in vars(optimizers[1])


@pytest.mark.parallel(WORKERS + 1)
def test_gradients_of_the_second_that_are_still_scaled_are_refused(comm):
    model, scaler = new_model(), GradScaler("cpu", init_scale=2.0)
    optimizers = two_plain(model)
    with (
        fails_everywhere(comm, RuntimeError, "the gradient is still scaled"),
        mpisync.Session(comm, model, optimizers, progress=False) as session,
    ):
        for x, y in session.batches(BATCHES, steps=3):
            loss = loss_of(model, x, y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizers[0])
            session.step(loss)


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("several", [False, True])
def test_a_left_over_step_behind_the_sessions_own_is_refused(comm, several):
    """On the root the loop body never runs: there is no step to delete."""
    model = new_model()
    optimizers = two_plain(model) if several else sgd(model)
    ran = []
    with (
        fails_everywhere(comm, RuntimeError, "optimizer.step() was called on a worker", "delete this line"),
        mpisync.Session(comm, model, optimizers, progress=False) as session,
    ):
        for x, y in session.batches(BATCHES, steps=5):
            ran.append(comm.rank)
            loss = loss_of(model, x, y)
            loss.backward()
            session.step(loss)
            (optimizers[-1] if several else optimizers).step()
    assert ran in ([], [comm.rank]) and (comm.rank != ROOT or not ran)


# -- accumulation -----------------------------------------------------------------------------------


class Data:
    batch_samples, data_s, fingerprint = 8, 0.0, 0


def begun(zeroed):
    """The samples of a gradient of two batches, where some optimizers were zeroed at the second."""
    model = new_model()
    optimizers = two_plain(model)
    own = Accumulation(list(model.parameters()), optimizers, weighted=True)
    for x, y in BATCHES[:2]:
        own.add(Data, (x, y))
        if x is BATCHES[1][0]:
            for index in zeroed:
                optimizers[index].zero_grad()
        loss_of(model, x, y).backward()
    samples = own.take(None).samples
    own.close()
    assert not any("zero_grad" in vars(optimizer) for optimizer in optimizers)
    return samples


def test_a_gradient_begins_anew_where_all_of_them_are_zeroed():
    assert begun([]) == 16
    assert begun([0]) == begun([1, 1]) == 16, "what the other has is of both batches"
    assert begun([0, 1]) == begun([1, 0]) == 8


# -- parameters that nobody updates -----------------------------------------------------------------


LEFT = "mpisync: parameter '0.bias', '2.bias' of the model is trainable and in no param group of an optimizer"


@pytest.mark.parallel(WORKERS + 1)
def test_trainable_parameters_of_no_optimizer_are_named_once_at_the_root(comm, capfd):
    model = new_model()
    before = flat(model)
    train(comm, model, optim.SGD(matrices(model), lr=0.1), steps=3)
    texts = on_all(comm, capfd.readouterr().err)
    assert [text.count(LEFT) for text in texts] == [0] * WORKERS + [1]
    assert np.array_equal(flat(model)[48:56], before[48:56]), "the first bias"
    for fine in (sgd(model), two_plain(model)):
        train(comm, model, fine, steps=3)
    model[0].bias.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    train(comm, model, optim.SGD(matrices(model), lr=0.1), steps=3)
    assert all("in no param group" not in text for text in on_all(comm, capfd.readouterr().err))


def test_alone_they_are_named_too(capfd):
    model = new_model()
    train(MPI.COMM_SELF, model, optim.SGD(matrices(model), lr=0.1), steps=3)
    assert capfd.readouterr().err.count(LEFT) == 1


@pytest.mark.parallel(WORKERS + 1)
def test_a_slow_update_of_the_second_is_told_too(comm, capfd):
    model = nn.Sequential(nn.Linear(6, 3), nn.Linear(1000, 1000)).double()
    optimizers = [sgd(model[0]), optim.AdamW(model[1].parameters())]
    with mpisync.Session(comm, model, optimizers, progress=False) as session:
        for x, y in session.batches(loader(), steps=1):
            (F.cross_entropy(model[0](x), y) + model[1].weight.sum()).backward()
            session.step()
    assert ("the update of 1.0 million parameters: torch.optim.AdamW" in capfd.readouterr().err) == (comm.rank == ROOT)
