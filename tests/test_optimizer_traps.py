"""Optimizers that wrap others, that switch between two points, and what a worker may ask of its own."""

import copy
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim import lr_scheduler
from training import DATA, WORKERS, fails_everywhere, flat, new_model, sgd, train

import mpisync
from mpisync.model import update
from mpisync.model.optimizer_traps import OptimizerTrap, layers
from mpisync.model.validation import check_model_and_optimizers

ROOT = WORKERS


class Wrapped(torch.optim.Optimizer):
    """Forwards all to the optimizer that it wraps, and never calls Optimizer.__init__, as some libraries do."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)

    def train(self):
        self.optimizer.train()

    def eval(self):
        self.optimizer.eval()


class Averaging(torch.optim.Optimizer):
    """SGD at a point between z and the mean of all z, as schedule-free methods do; eval() goes to the mean."""

    def __init__(self, parameters, lr=0.1, beta=0.9):
        super().__init__(parameters, {"lr": lr, "beta": beta, "train_mode": False, "k": 0})

    @torch.no_grad()
    def _move(self, weight, mode):
        for group in self.param_groups:
            if group["train_mode"] != mode:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], weight(group["beta"]))
                group["train_mode"] = mode

    def eval(self):
        self._move(lambda beta: 1 - 1 / beta, False)

    def train(self):
        self._move(lambda beta: 1 - beta, True)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"], "not in train mode"
            group["k"] += 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                x = p.lerp(z, 1 - 1 / group["beta"])
                z.sub_(p.grad, alpha=group["lr"])
                x.lerp_(z, 1 / group["k"])
                p.copy_(x.lerp(z, 1 - group["beta"]))


def batches():
    x, y = DATA.tensors
    return [(x[8 * n : 8 * n + 8], y[8 * n : 8 * n + 8]) for n in range(WORKERS)]


def one_process(make, steps, after=lambda model, optimizer: None):
    model = new_model()
    optimizer = make(model)
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        after(model, optimizer)
    return model, optimizer


def averaging(model):
    optimizer = Averaging(model.parameters())
    optimizer.train()
    return optimizer


WRAPPED = {
    "adamw": lambda model: Wrapped(torch.optim.AdamW(model.parameters(), lr=0.01)),
    "sgd": lambda model: Wrapped(torch.optim.SGD(model.parameters(), lr=0.1)),
    "twice": lambda model: Wrapped(Wrapped(sgd(model))),
    "averaging": lambda model: Wrapped(averaging(model)),
}


@pytest.mark.parametrize("transport", ["shared", "messages"])
@pytest.mark.parallel(WORKERS + 1)
def test_an_optimizer_that_wraps_another_trains_as_in_one_process(comm, monkeypatch, tmp_path, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    for name, make in WRAPPED.items():
        model = new_model()
        optimizer = make(model)
        _, session = train(
            comm, model, optimizer, steps=4, data=batches(), policy=mpisync.BackupWorkers(0), clip_norm=10.0,
            record=str(tmp_path / f"{name}.jsonl"),
        )  # fmt: skip
        reference, other = one_process(make, 4)
        assert np.abs(flat(model) - flat(reference)).max() < 1e-6
        if comm.rank == ROOT:
            assert session.state_dict()["optimizer"]["state"].keys() == other.state_dict()["state"].keys()


def test_layers_end_where_an_optimizer_wraps_itself():
    optimizer = Wrapped(sgd(new_model()))
    assert list(layers(optimizer)) == [optimizer, optimizer.optimizer]
    optimizer.optimizer = optimizer
    assert list(layers(optimizer)) == [optimizer]


class Bare(torch.optim.Optimizer):
    """An optimizer without groups."""

    def __init__(self):
        pass


def test_an_optimizer_without_groups_is_refused():
    with pytest.raises(TypeError, match="Bare has no param_groups, so the session cannot see what it trains"):
        check_model_and_optimizers(new_model(), [Bare()])


def test_plain_sgd_is_told_by_its_type_and_where_torch_has_other_names_it_is_not_plain(monkeypatch):
    model = new_model()
    assert update._is_plain(plain := sgd(model))
    assert not update._is_plain(Wrapped(sgd(model)))
    lr_scheduler.StepLR(plain, 1)
    assert update._is_plain(plain)
    del plain._optimizer_step_pre_hooks
    assert not update._is_plain(plain)
    monkeypatch.delattr(sys.modules["torch.optim.optimizer"], "_global_optimizer_post_hooks")
    assert not update._is_plain(sgd(model))


# -- optimizers with two points --------------------------------------------------------------------


def test_it_must_be_in_the_mode_for_training():
    model = new_model()
    for optimizer in (Averaging(model.parameters()), Wrapped(Averaging(model.parameters()))):
        with pytest.raises(ValueError, match=r"mode for evaluation, .* call optimizer.train\(\) before Session"):
            check_model_and_optimizers(model, [optimizer])
        optimizer.train()
        check_model_and_optimizers(model, [optimizer])


@pytest.mark.parametrize("transport", ["shared", "messages"])
@pytest.mark.parallel(WORKERS + 1)
def test_a_hook_at_the_root_sees_the_other_point(comm, monkeypatch, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    model, seen, expected = new_model(), [], []
    optimizer = averaging(model)

    def look(one, into):
        def hook(optimizer, *_):
            optimizer.eval()
            into.append(flat(one).copy())
            optimizer.train()

        return hook

    optimizer.register_step_post_hook(look(model, seen))
    train(comm, model, optimizer, steps=4, data=batches(), policy=mpisync.BackupWorkers(0))
    reference, other = one_process(averaging, 4, lambda one, optimizer: look(one, expected)(optimizer))
    assert np.abs(flat(model) - flat(reference)).max() < 1e-6
    other.eval()
    if comm.rank == ROOT:
        assert len(seen) == 4 and all(np.abs(a - b).max() < 1e-6 for a, b in zip(seen, expected, strict=True))
        optimizer.eval()
        assert np.abs(flat(model) - flat(reference)).max() < 1e-6
    else:
        with pytest.warns(UserWarning, match=r"optimizer.eval\(\) was called on a rank that was a worker.*last rank"):
            optimizer.eval()
        optimizer.eval()  # said once
        optimizer.train()


# -- what a worker asks ----------------------------------------------------------------------------

ASKED = {
    r"optimizer.eval() was called on a worker: this optimizer's other point": (averaging, lambda o: o.eval()),
    r"optimizer.train() was called on a worker": (WRAPPED["averaging"], lambda o: o.train()),
    r"optimizer.state_dict() was called on a worker: its state is empty or old": (sgd, lambda o: o.state_dict()),
    r"optimizer.load_state_dict() was called on a worker: it has no effect": (sgd, lambda o: o.load_state_dict({})),
    r"optimizer.state was read on a worker": (sgd, lambda o: o.state.get("momentum_buffer")),
    r"the optimizer has 2 param_groups on a worker": (
        sgd,
        lambda o: o.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]}),
    ),
}


@pytest.mark.parametrize("words", ASKED)
@pytest.mark.parallel(WORKERS + 1)
def test_a_worker_is_told_what_its_optimizer_cannot_answer(comm, words):
    model = new_model()
    make, ask = ASKED[words]
    optimizer = make(model)
    with fails_everywhere(comm, RuntimeError, words):
        train(comm, model, optimizer, body=lambda session, x: ask(optimizer) if session.worker == 0 else None)


@pytest.mark.parallel(WORKERS + 1)
def test_after_the_session_a_workers_state_dict_warns_once(comm):
    model = new_model()
    optimizer = sgd(model)
    _, session = train(comm, model, optimizer, steps=3, body=lambda session, x: optimizer.zero_grad)
    if comm.rank == ROOT:
        assert len(optimizer.state_dict()["state"]) == 4
        assert len(session.state_dict()["optimizer"]["state"]) == 4
    else:
        with pytest.warns(UserWarning, match=r"rank that was a worker: its state is empty or old.*last rank"):
            assert optimizer.state_dict()["state"] == {}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.load_state_dict(optimizer.state_dict())
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            assert len(optimizer.state_dict()["state"]) == 4


@pytest.mark.parametrize("make", [sgd, WRAPPED["adamw"], WRAPPED["twice"]])
def test_the_trap_gives_everything_back(make):
    model = new_model()
    optimizer = make(model)
    model(DATA.tensors[0]).sum().backward()
    optimizer.step()
    before, state = [dict(vars(one)) for one in layers(optimizer)], copy.deepcopy(optimizer.state_dict())
    trap = OptimizerTrap(optimizer)
    for name in ("__len__", "items", "__iter__", "get"):
        with pytest.raises(RuntimeError, match="state was read on a worker"):
            getattr(optimizer.state, name)()
    trap.undo()
    trap.undo()
    with pytest.warns(UserWarning, match="that was a worker"):
        assert str(optimizer.state_dict()) == str(state)
    assert [dict(vars(one)) for one in layers(optimizer)] == before
    assert all(vars(one).get("state") is old.get("state") for one, old in zip(layers(optimizer), before, strict=True))


def test_alone_an_optimizer_may_be_asked_anything():
    from mpi4py import MPI

    model = new_model()
    optimizer, seen = averaging(model), []

    def look(session, x):
        optimizer.eval()
        seen.append(len(optimizer.state_dict()["state"]))
        optimizer.train()

    train(MPI.COMM_SELF, model, optimizer, steps=3, body=look)
    assert seen == [4, 4, 4]
