"""Idioms of training scripts that cannot mean in a session what they mean in one process: it says so."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_idioms import BATCHES, Idiom, backward, check_equal, mlp
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from training import WORKERS, fails_everywhere, loader, new_model, on_all, sgd, train

import mpisync
from mpisync.model.origins import shared_elsewhere
from mpisync.records import RecordReader

ROOT = WORKERS


def said(comm, capfd):
    """Everything that the ranks have printed to standard error."""
    return "".join(on_all(comm, capfd.readouterr().err))


# -- values and memory from before the session ------------------------------------------------------


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("alike", [True, False])
def test_ranks_that_begin_with_other_values_are_named(comm, capfd, alike):
    model = new_model(seed=0 if alike else comm.rank)
    train(comm, model, sgd(model), steps=2)
    notice = "ranks 0, 1 came with other initial parameters than rank 2, the root, whose hold for all. A checkpoint"
    assert said(comm, capfd).count(notice) == (not alike)


@pytest.mark.parallel(WORKERS + 1)
def test_a_checkpoint_on_one_rank_alone_is_noticed(comm, capfd):
    model = new_model()
    if comm.rank == 0:
        with torch.no_grad():
            model[2].bias.add_(1.0)
    train(comm, model, sgd(model), steps=2)
    assert "rank 0 came with other initial parameters than rank 2" in said(comm, capfd)


@pytest.mark.parallel(WORKERS + 1)
def test_a_view_from_before_that_lives_on_is_named(comm, capfd):
    model = new_model()
    kept = {"weight": model[0].weight.detach()}
    train(comm, model, sgd(model), steps=2)
    assert not torch.equal(kept["weight"], model[0].weight)
    assert said(comm, capfd).count("other tensors look into the memory of parameter '0.weight': a state_dict") == 1
    again = new_model()
    copies = {name: value.clone() for name, value in again.state_dict().items()}
    train(comm, again, sgd(again), steps=2)
    assert copies and "other tensors" not in said(comm, capfd)


class Codes(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.register_buffer("seen", self.one.weight.data[0])

    def forward(self, x):
        return self.one(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(4, 4),
        lambda: nn.TransformerEncoderLayer(4, 2),
        lambda: torch.compile(nn.Linear(4, 4), backend="aot_eager"),
        lambda: torch.fx.symbolic_trace(nn.Linear(4, 4)),
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
        lambda: nn.Linear(4, 4).share_memory(),
        Codes,
    ],
)
def test_a_models_own_ways_with_memory_are_nobody_elses(make):
    model = make()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters())
    out = model(torch.randn(3, 2, 4) if isinstance(model, nn.LSTM | nn.TransformerEncoderLayer) else torch.randn(3, 4))
    (out[0] if isinstance(out, tuple) else out).sum().backward()
    optimizer.step()
    del out
    assert twin is not model and shared_elsewhere(list(model.named_parameters()), model) == ""


@pytest.mark.parametrize("keep", [nn.Module.state_dict, lambda m: [p.detach() for p in m.parameters()]])
def test_who_else_looks_into_a_models_memory_is_seen(keep):
    model = nn.Linear(4, 4)
    kept = keep(model)
    assert kept is not None and "'weight', 'bias':" in shared_elsewhere(list(model.named_parameters()), model)


# -- gradients --------------------------------------------------------------------------------------


@pytest.mark.parallel(WORKERS + 1)
def test_a_gradient_from_before_of_what_was_frozen_since_is_none_of_the_sessions(comm):
    def freeze(model, optimizer):
        backward(model, *BATCHES[5], 0)
        model[0].requires_grad_(False)

    check_equal(comm, Idiom(prepare=freeze, optimizer=lambda m: torch.optim.SGD(m[2].parameters(), 0.1)))


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", ["shared", "messages"])
def test_a_graph_that_was_built_at_an_older_version_cannot_be_gone_through(comm, monkeypatch, transport):
    """As in one process, where the optimizer writes in place: hidden states that nobody detached."""
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    model, hidden = mlp(), torch.zeros(4, 3).double()
    with (
        fails_everywhere(comm, RuntimeError, "modified by an inplace operation"),
        mpisync.Session(comm, model, sgd(model), progress=False) as session,
    ):
        for x, y in session.batches(BATCHES, steps=4):
            hidden = model(x + hidden.repeat(1, 2))
            F.cross_entropy(hidden, y).backward(retain_graph=True)
            session.step()


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_batch_whose_gradient_was_taken_away_has_no_weight(comm, tmp_path, set_to_none):
    """A loop that begins with zero_grad() and skips the steps whose gradient it does not like."""
    path = comm.bcast(str(tmp_path / "record.jsonl"))
    model = mlp()
    optimizer = sgd(model)
    with mpisync.Session(comm, model, optimizer, weight="samples", record=path, progress=False) as session:
        for number, (x, y) in enumerate(session.batches(BATCHES, steps=4)):
            optimizer.zero_grad(set_to_none=set_to_none)
            backward(model, x, y, 0)
            if session.worker == 0 and number % 2 == 0:
                continue
            session.step()
    comm.Barrier()
    reader = RecordReader(path)
    assert [step.samples_used for step in reader] == [8] * 4
    end = reader.end
    assert list(end.used) == [16, 16] and all(
        handed == used + discarded + lost
        for handed, used, discarded, lost in zip(end.handed, end.used, end.discarded, end.lost, strict=True)
    )
    assert "zero_grad" not in vars(optimizer), "the optimizer is the user's own again"


@pytest.mark.parallel(WORKERS + 1)
def test_an_optimizer_that_steps_within_backward_is_a_write(comm):
    model = mlp()
    inner = {parameter: torch.optim.SGD([parameter], 0.1) for parameter in model.parameters()}

    def step(parameter):
        inner[parameter].step()
        inner[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    with fails_everywhere(comm, RuntimeError, "written to on a worker", "register_step_post_hook"):
        train(comm, model, sgd(model), data=BATCHES)


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda o: o.load_state_dict({}), "optimizer.load_state_dict() was called on a worker"),
        (lambda o: setattr(o, "state", {}), "the optimizer's state was replaced on a worker"),
        (lambda o: o.register_step_post_hook(lambda *of: None), "a step hook was added to the optimizer"),
        (lambda o: o.register_step_pre_hook(lambda *of: None), "a step hook was added to the optimizer"),
    ],
)
def test_what_a_loop_does_to_a_workers_optimizer_is_refused(comm, change, words):
    model = new_model()
    optimizer = sgd(model)
    with fails_everywhere(comm, RuntimeError, words, "before Session, on every rank"):
        train(comm, model, optimizer, body=lambda session, x: change(optimizer))


@pytest.mark.parametrize(
    ("loss", "kind", "words"),
    [
        (torch.ones(8), TypeError, r"not a Tensor of shape \[8\]; reduce it first, as loss.mean\(\) does"),
        ({"total": 1.0}, TypeError, "loss must be one number"),
        ("low", TypeError, "loss must be one number"),
    ],
)
def test_what_is_no_loss_is_refused_by_what_it_is(loss, kind, words):
    from mpi4py import MPI

    model = new_model()
    with mpisync.Session(MPI.COMM_SELF, model, sgd(model), progress=False) as session:
        for x, y in session.batches(loader(), steps=1):
            F.cross_entropy(model(x), y).backward()
            with pytest.raises(kind, match=words):
                session.step(loss)
            session.step(np.float32(1.0))
    assert session.version == 1


# -- buffers ----------------------------------------------------------------------------------------


class Queue(nn.Module):
    """A queue of what was computed last, as momentum contrast keeps one."""

    def __init__(self, *, as_buffer):
        super().__init__()
        self.inner, self.norm = mlp(), nn.BatchNorm1d(6).double()
        if as_buffer:
            self.register_buffer("queue", torch.zeros(4, 3).double())
        else:
            self.queue = torch.zeros(4, 3).double()

    def forward(self, x):
        out = self.inner(self.norm(x))
        self.queue[:] = out.detach()
        return out


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("as_buffer", [True, False])
def test_buffers_that_become_a_mean_without_meaning_are_named_once(comm, capfd, as_buffer):
    torch.manual_seed(0)
    model = Queue(as_buffer=as_buffer)
    train(comm, model, sgd(model), data=BATCHES, steps=6)
    assert said(comm, capfd).count("buffer 'queue' differs between workers: all go on with the mean") == as_buffer


# -- data -------------------------------------------------------------------------------------------


class Growing(Dataset):
    def __init__(self):
        self.rows = list(range(32))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return torch.full((6,), index / 32.0).double(), index % 3


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("on_late", ["discard", "requeue"])
@pytest.mark.parametrize("kind", ["data set", "list"])
def test_data_that_grow_are_refused(comm, on_late, kind):
    """A replay memory, samples that were labelled meanwhile: the shares are those of the beginning."""
    rows = Growing()
    data = DataLoader(rows, batch_size=4, shuffle=True) if kind == "data set" else list(BATCHES)
    before = "data set had 32 samples" if kind == "data set" else "list had 12 batches"

    def grow(session, x):
        (rows.rows if kind == "data set" else data).append(data[0] if kind == "list" else 0)

    model = new_model()
    with fails_everywhere(comm, RuntimeError, before, "pass batches an iterable of your own"):
        train(comm, model, sgd(model), data=data, steps=50, body=grow, on_late=on_late)


class Progress:
    """As tqdm: an iterable around another one."""

    def __init__(self, iterable):
        self.iterable = iterable

    def __iter__(self):
        yield from self.iterable


@pytest.mark.parallel(WORKERS + 1)
def test_a_loader_inside_of_something_else_is_not_shared_out_and_that_is_said(comm, capfd):
    inside, outside, model = [], [], new_model()
    train(comm, model, sgd(model), data=Progress(loader()), steps=8, body=lambda s, x: inside.extend(x.tolist()))
    assert said(comm, capfd).count("put the Progress around session.batches(loader) instead") == 1
    with mpisync.Session(comm, model, sgd(model), progress=False) as session:
        for x, y in Progress(session.batches(loader(), steps=4)):
            outside.extend(x.tolist())
            F.cross_entropy(model(x), y).backward()
            session.step()
    assert "Progress" not in said(comm, capfd)
    drawn = [{tuple(row) for row in rows} for rows in on_all(comm, outside)[:WORKERS]]
    assert len(drawn[0]) == len(drawn[1]) == 32 and not drawn[0] & drawn[1]
    assert len({tuple(row) for row in inside}) == (64 if session.worker is not None else 0)


@pytest.mark.parallel(WORKERS + 1)
def test_a_late_batch_that_the_loop_has_changed_in_place_comes_again_as_it_was(comm):
    seen, model = [], mlp()
    ones = TensorDataset(torch.ones(64, 6).double(), torch.zeros(64).long())
    with mpisync.Session(
        comm, model, sgd(model), policy=mpisync.BackupWorkers(1), on_late="retry", progress=False
    ) as session:
        verdicts = []
        for x, y in session.batches(DataLoader(ones, batch_size=4), steps=300):
            x.div_(2.0)  # as pictures are scaled, or words masked
            seen.append(x[0, 0].item())
            backward(model, x, y, 0)
            if session.worker == 0:
                while not session.stale():
                    pass
            verdicts.append(session.step().accepted)
            if len(verdicts) == 5 and session.worker == 0:
                session.stop()
    if session.worker == 0:
        assert verdicts[:4] == [False] * 4
    assert set(seen) <= {0.5}
