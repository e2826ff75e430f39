"""The torch face among real processes: what a training script may rely on."""

import time
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mpisync
from mpisync.policies import read_record

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


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", ["shared", "messages"])
@pytest.mark.parametrize("make", [sgd, lambda m: torch.optim.AdamW(m.parameters(), lr=0.01)], ids=["sgd", "adamw"])
def test_full_synchrony_equals_one_process_on_the_union_of_the_batches(comm, monkeypatch, transport, make):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    drawn, model = [], new_model(seed=comm.rank)  # the root's initial values hold for all
    train(comm, model, make(model), body=lambda s, x: drawn.append(x.clone()), policy=mpisync.BackupWorkers(0))
    batches = on_all(comm, drawn)[:WORKERS]
    alone = new_model(seed=WORKERS)
    optimizer = make(alone)
    targets = {tuple(x.tolist()): int(y) for x, y in DATA}
    for parts in zip(*batches, strict=True):
        x = torch.cat(parts)
        y = torch.tensor([targets[tuple(row.tolist())] for row in x])
        optimizer.zero_grad()
        F.cross_entropy(alone(x), y).backward()
        optimizer.step()
    for other in on_all(comm, flat(model)):
        np.testing.assert_allclose(other, flat(alone), rtol=1e-9, atol=1e-12)


@pytest.mark.parallel(WORKERS + 1)
def test_given_the_mean_the_update_is_torchs_own_to_the_bit(comm):
    model, twin = new_model(), new_model()
    optimizer, reference = sgd(model, weight_decay=0.01), sgd(twin, weight_decay=0.01)

    def replay(record):
        for own, p in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = None if own.grad is None else own.grad.clone()
        reference.step()
        assert np.array_equal(flat(model), flat(twin))

    train(comm, model, optimizer, on_step=replay)


@pytest.mark.parallel(WORKERS + 1)
def test_ranks_seeded_alike_draw_different_data_and_every_epoch_covers_it_once(comm):
    drawn, model = [], new_model()
    train(comm, model, sgd(model), steps=4, body=lambda s, x: drawn.append(x.clone()), policy=mpisync.BackupWorkers(0))
    rows = [tuple(row) for x in sum(on_all(comm, drawn), []) for row in x.tolist()]
    assert len(rows) == len(set(rows)) == 64  # 2 workers, 4 steps of 8 samples


@pytest.mark.parallel(WORKERS + 1)
def test_everyone_goes_on_with_the_final_parameters_in_private_memory(comm):
    model = new_model()
    verdicts, session = train(comm, model, sgd(model), policy=mpisync.BackupWorkers(1), steps=20)
    values = on_all(comm, flat(model))
    assert all(np.array_equal(values[0], other) for other in values)
    assert session.version == 20
    with torch.no_grad():
        model[0].weight.fill_(comm.rank)
    comm.Barrier()
    assert (model[0].weight == comm.rank).all()
    assert sum(v.accepted for v in sum(on_all(comm, verdicts), [])) == 20
    optimizer = sgd(model)
    optimizer.step()  # steps again


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", ["shared", "messages"])
def test_asynchronous_training_reads_whole_versions_and_learns(comm, monkeypatch, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    model = new_model()
    verdicts, session = train(comm, model, sgd(model, lr=0.01), policy=mpisync.Async(1), steps=30)
    assert sum(v.accepted for v in sum(on_all(comm, verdicts), [])) == 30
    values = on_all(comm, flat(model))
    assert all(np.array_equal(values[0], other) for other in values)


@pytest.mark.parallel(WORKERS + 1)
def test_a_left_over_optimizer_step_names_the_line_to_delete(comm):
    model = new_model()
    optimizer = sgd(model)
    with fails_everywhere(comm, RuntimeError, "optimizer.step() was called on a worker", "delete this line"):
        train(comm, model, optimizer, body=lambda s, x: optimizer.step())


@pytest.mark.parallel(WORKERS + 1)
def test_a_left_over_zero_grad_is_harmless(comm):
    model = new_model()
    optimizer = sgd(model)
    with mpisync.Session(comm, model, optimizer, progress=False) as session:
        for x, y in session.batches(loader(), steps=5):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            session.step(loss)
            optimizer.zero_grad()
    assert session.version == 5


@pytest.mark.parallel(WORKERS + 1)
def test_writing_to_shared_parameters_is_seen_and_named(comm):
    model = new_model()

    def write(session, x):
        with torch.no_grad():
            model[0].weight.add_(1.0)

    with fails_everywhere(comm, RuntimeError, "0.weight", "own_copy=True"):
        train(comm, model, sgd(model), body=write)
    model = new_model()
    train(comm, model, sgd(model), body=write, own_copy=True)


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", ["shared", "messages"])
def test_clamping_in_a_step_hook_is_done_before_anyone_sees_the_parameters(comm, monkeypatch, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    model, largest = new_model(), []

    def clamp(optimizer, arguments, keywords):
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.clamp_(-0.01, 0.01)

    optimizer = sgd(model)
    optimizer.register_step_post_hook(clamp)

    def look(session, x):
        if session.version:
            largest.append(np.abs(flat(model)).max())

    train(comm, model, optimizer, body=look, steps=8, ema=0.5)
    assert largest == [0.01] * 7 * (comm.rank < WORKERS)
    assert np.abs(flat(model)).max() == 0.01


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("options", [{}, {"own_copy": True}, {"policy": mpisync.Async(1)}])
def test_parameters_that_are_mapped_read_only_change_nothing_for_who_does_not_write(comm, monkeypatch, capfd, options):
    monkeypatch.setenv("MPISYNC_READ_ONLY", "1")
    model = new_model(norm=True)
    _, session = train(comm, model, sgd(model), ema=0.5, **options)
    model.load_state_dict(session.average)
    with torch.no_grad():
        for p in model.parameters():
            p.data.numpy()[:] = 1.0
    assert ("MPISYNC_READ_ONLY has no effect" in capfd.readouterr().err) == (bool(options) and comm.rank == 0)


@pytest.mark.parallel(WORKERS + 1)
def test_a_gradient_with_nan_is_rejected_and_training_goes_on(comm):
    model = new_model()

    def poison(session, x):
        if session.worker == 0 and session.version == 2:
            poison.times += 1
            if poison.times == 1:
                model[0].weight.grad[0, 0] = float("nan")

    poison.times = 0
    verdicts, session = train(comm, model, sgd(model), body=poison, policy=mpisync.BackupWorkers(0), steps=6)
    rejected = [v for v in sum(on_all(comm, verdicts), []) if "NaN" in v.reason]
    assert len(rejected) == 1 and not rejected[0].accepted and rejected[0].step == 2
    assert np.isfinite(flat(model)).all() and session.version == 6


@pytest.mark.parallel(WORKERS + 1)
def test_batchnorm_statistics_are_the_mean_of_the_accepted_and_late_steps_leave_no_trace(comm):
    model = new_model(norm=True)
    seen = []

    def look(session, x):
        seen.append((session.version, model[1].running_mean.clone().numpy()))

    verdicts, _ = train(comm, model, sgd(model), body=look, policy=mpisync.BackupWorkers(1), steps=15)
    means = on_all(comm, model[1].running_mean.numpy())
    assert all(np.array_equal(means[0], other) for other in means)
    assert on_all(comm, int(model[1].num_batches_tracked)) == [15] * (WORKERS + 1)


@pytest.mark.parallel(WORKERS + 1)
def test_clipping_average_scheduler_and_samples(comm):
    model = new_model()
    optimizer = sgd(model, momentum=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    norms, rates = [], []

    def look(record):
        norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters()])))
        rates.append(optimizer.param_groups[0]["lr"])

    _, session = train(
        comm, model, optimizer, steps=6, scheduler=scheduler, clip_norm=0.01, ema=0.5, weight="samples", on_step=look,
        policy=mpisync.BackupWorkers(0),
    )  # fmt: skip
    if session.worker is None:
        assert max(norms) <= 0.01 + 1e-9
        assert rates == [0.1, 0.05, 0.05, 0.025, 0.025, 0.0125]
    averages = on_all(comm, {name: v.numpy() for name, v in session.average.items()})
    assert all(np.array_equal(averages[0][n], other[n]) for other in averages for n in other)
    assert not np.array_equal(averages[0]["0.weight"], model[0].weight.detach().numpy())


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


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: torch.compile(model, backend="eager")])
def test_the_average_is_a_whole_state_of_the_model_that_can_be_loaded(comm, wrap):
    check_average(comm, wrap(Shared().double()))


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: torch.compile(model, backend="eager")])
def test_alone_too_the_average_can_be_loaded(wrap):
    from mpi4py import MPI

    check_average(MPI.COMM_SELF, wrap(Shared().double()))


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


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", ["shared", "messages"])
def test_after_the_with_a_session_still_answers_and_holds_nothing_open(comm, monkeypatch, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    check_ended(comm, WORKERS)


def test_after_the_with_it_answers_alone_too():
    from mpi4py import MPI

    check_ended(MPI.COMM_SELF, 1)


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
    with pytest.raises(RuntimeError, match="once a session"):
        session.batches(loader())


@pytest.mark.parallel(WORKERS + 1)
def test_a_scheduler_on_a_worker_shows_the_roots_rates(comm):
    """Worker 0 misses versions; before each step it is where the root was when it made that version."""
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2.0, total_steps=31)
    seen, rates = [], {0: scheduler.get_last_lr()[0]}

    def look(session, x):
        if session.worker == 0 and session.version % 3 == 0:
            start_s = time.monotonic()
            while not session.stale() and time.monotonic() < start_s + 10:
                time.sleep(0.001)
        group = optimizer.param_groups[0]
        seen.append((session.version, scheduler.get_last_lr()[0], group["lr"], group["momentum"]))

    def note(record):
        rates[record.step + 1] = scheduler.get_last_lr()[0]

    settings = {"policy": mpisync.BackupWorkers(1), "scheduler": scheduler, "on_step": note}
    train(comm, model, optimizer, steps=30, body=look, **settings)
    rates = comm.bcast(rates, root=WORKERS)
    assert all(rates[version] == shown == lr and momentum < 0.96 for version, shown, lr, momentum in seen)
    assert {(scheduler.last_epoch, scheduler.get_last_lr()[0])} == {(30, rates[30])}
    optimizer.step()
    with fails_everywhere(comm, RuntimeError, "param_groups[0]['lr'] was changed"):
        train(comm, model, optimizer, steps=5, body=lambda s, x: optimizer.param_groups[0].update(lr=0.7))


@pytest.mark.parallel(WORKERS + 1)
def test_a_plateau_scheduler_gets_the_mean_accepted_loss(comm):
    model = new_model()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    heard, rates = [], []

    class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics):
            heard.append(metrics)
            super().step(metrics)

    scheduler = Plateau(optimizer, patience=0, factor=0.5)
    records = []

    def note(record):
        records.append(record)
        rates.append(optimizer.param_groups[0]["lr"])

    with mpisync.Session(comm, model, optimizer, scheduler=scheduler, on_step=note, progress=False) as session:
        for number, (x, y) in enumerate(session.batches(loader(), steps=6)):
            F.cross_entropy(model(x), y).backward()
            session.step([5.0, 4.0, 6.0, 3.0, 2.0, 9.0][number] + session.worker)
    assert heard == ([5.5, 4.5, 6.5, 3.5, 2.5, 9.5] if session.worker is None else [])
    assert rates == ([0.1, 0.1, 0.05, 0.05, 0.05, 0.025] if session.worker is None else [])


@pytest.mark.parallel(WORKERS + 1)
def test_a_plateau_scheduler_without_losses_is_left_alone_with_a_warning(comm):
    model = new_model()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer := sgd(model), patience=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with mpisync.Session(comm, model, optimizer, scheduler=scheduler, progress=False) as session:
            for x, y in session.batches(loader(), steps=6):
                F.cross_entropy(model(x), y).backward()
                session.step()
    texts = [str(w.message) for w in caught if "ReduceLROnPlateau goes by the mean loss" in str(w.message)]
    assert len(texts) == (session.worker is None) and optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parallel(WORKERS + 1)
def test_the_schedule_follows_the_version_where_the_mean_is_refused(comm):
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    records = []

    def huge(session, x):
        if session.version == 0:
            for p in model.parameters():
                p.grad.fill_(3e38 - 1e36 * session.worker)  # finite, and their sum is not

    data = DataLoader(TensorDataset(DATA.tensors[0].float(), DATA.tensors[1]), batch_size=8)
    train(comm, model, optimizer, steps=3, body=huge, scheduler=scheduler, on_step=records.append, data=data)
    if comm.rank == WORKERS:
        assert [record.updated for record in records] == [False, True, True]
    assert scheduler.last_epoch == 3 and np.isfinite(flat(model)).all()


@pytest.mark.parallel(WORKERS + 1)
def test_stop_ends_everywhere_and_break_means_that_this_worker_leaves(comm):
    model = new_model()
    with mpisync.Session(comm, model, sgd(model), policy=mpisync.BackupWorkers(0), progress=False) as session:
        for number, (x, y) in enumerate(session.batches(loader())):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            session.step(loss)
            if session.worker == 0 and number == 3:
                break
            if session.worker == 1 and session.version >= 10:
                session.stop()
    values = on_all(comm, flat(model))
    assert all(np.array_equal(values[0], other) for other in values)
    assert session.version >= 10


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", ["shared", "messages"])
def test_a_root_that_is_kept_out_of_the_loop_is_an_error_everywhere(comm, monkeypatch, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    model = new_model()
    with fails_everywhere(comm, RuntimeError, "the root must go through session.batches too"):
        with mpisync.Session(comm, model, sgd(model), progress=False) as session:
            if session.worker is not None:
                for x, y in session.batches(loader(), steps=3):
                    loss = F.cross_entropy(model(x), y)
                    loss.backward()
                    session.step(loss)


@pytest.mark.parallel(WORKERS + 1)
def test_a_loop_of_no_steps_is_a_loop(comm):
    model = new_model()
    verdicts, session = train(comm, model, sgd(model), steps=0)
    assert verdicts == [] and session.version == 0


# -- several batches a gradient --------------------------------------------------------------------


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


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", ["shared", "messages"])
def test_accumulated_gradients_are_the_mean_over_all_their_batches(comm, monkeypatch, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    rows, records, model = [], [], new_model(seed=comm.rank)
    verdicts, drawn, role = accumulate(
        comm, model, sgd(model), body=lambda s, n, x: rows.append(x.clone()), on_step=records.append, weight="samples"
    )
    batches = on_all(comm, rows)[:WORKERS]
    targets = {tuple(x.tolist()): int(y) for x, y in DATA}
    alone = new_model(seed=WORKERS)
    optimizer = sgd(alone)
    for step in range(6):
        x = torch.cat([part for worker in batches for part in worker[2 * step : 2 * step + 2]])
        y = torch.tensor([targets[tuple(row.tolist())] for row in x])
        optimizer.zero_grad()
        F.cross_entropy(alone(x), y).backward()
        optimizer.step()
    np.testing.assert_allclose(flat(model), flat(alone), rtol=1e-9, atol=1e-12)
    if comm.rank == WORKERS:
        assert [arrival.samples for record in records for arrival in record.arrivals] == [16] * 6 * WORKERS
        accounts = [member.account for member in role._root.members]
        assert [(a.handed, a.used, a.in_flight) for a in accounts] == [(96, 96, 0)] * WORKERS
    else:
        assert drawn == 12 and all(v.accepted for v in verdicts)


@pytest.mark.parallel(WORKERS + 1)
def test_a_replay_of_accumulated_gradients_has_the_same_bits(comm, tmp_path):
    path = comm.bcast(str(tmp_path / "record.jsonl"))

    def run(policy, record=None):
        model = new_model(norm=True)
        accumulate(comm, model, sgd(model), policy=policy, steps=15, record=record, every=3)
        return torch.cat([flat_tensor.flatten() for flat_tensor in model.state_dict().values()]).numpy()

    assert np.array_equal(run(mpisync.BackupWorkers(1), path), run(mpisync.Replay(path)))


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("own_copy", [False, True])
def test_no_new_version_comes_between_the_batches_of_a_gradient(comm, own_copy):
    """Worker 0 is slow in the middle of each: it is late, and its gradients count nowhere."""
    versions, model = [], new_model()

    def slow(session, number, x):
        versions.append((session.version, model[0].weight.sum().item()))
        if session.worker == 0 and number % 2 == 0:
            start_s = time.monotonic()
            while not session.stale() and time.monotonic() < start_s + 10:
                time.sleep(0.001)
            assert session.stale()

    verdicts, drawn, role = accumulate(
        comm, model, sgd(model), policy=mpisync.BackupWorkers(1), steps=30, body=slow, own_copy=own_copy
    )
    if comm.rank < WORKERS:
        for one, other in zip(versions[::2], versions[1::2], strict=False):
            assert one == other if own_copy or comm.rank else one[0] == other[0]
    if comm.rank == 0:
        assert not any(v.accepted for v in verdicts) and all(v.late_by for v in verdicts if v.reason == "late")
        assert drawn - 2 * len(verdicts) in (0, 1)
        assert all(p.grad is None for p in model.parameters()), "nothing is left of what was not ended"
    drawn = comm.allgather(drawn)
    if comm.rank == WORKERS:
        for member, batches in zip(role._root.members, drawn, strict=False):
            account = member.account
            assert account.handed == 8 * batches == account.used + account.discarded + account.lost
            assert account.used == (30 * 16 if member.worker else 0)


@pytest.mark.parallel(WORKERS + 1)
def test_a_worker_that_breaks_between_the_batches_of_a_gradient_has_lost_them(comm):
    model, roles = new_model(), []
    with mpisync.Session(comm, model, sgd(model), policy=mpisync.BackupWorkers(0), progress=False) as session:
        roles.append(session._role)
        for number, (x, y) in enumerate(session.batches(loader(), steps=8)):
            (F.cross_entropy(model(x), y) / 2).backward()
            if session.worker == 0 and number == 6:
                break
            if number % 2:
                session.step()
    if comm.rank == WORKERS:
        first, second = (member.account for member in roles[0]._root.members)
        assert (first.handed, first.used, first.discarded, first.lost) == (56, 48, 0, 8)
        assert (second.handed, second.used, second.discarded, second.lost) == (128, 128, 0, 0)


@pytest.mark.parallel(WORKERS + 1)
def test_a_batch_that_is_passed_over_is_no_part_of_the_next_gradient(comm):
    model, records = new_model(), []
    with mpisync.Session(comm, model, sgd(model), on_step=records.append, progress=False) as session:
        for number, (x, y) in enumerate(session.batches(loader(), steps=6)):
            if number % 3 == 1:
                continue
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            session.step(loss)
    assert [a.samples for record in records for a in record.arrivals] == [8] * 6 * WORKERS * (comm.rank == WORKERS)


@pytest.mark.parallel(WORKERS + 1)
def test_passing_over_a_stale_computation_takes_the_newest_parameters(comm):
    model, accepted = new_model(), 0
    with mpisync.Session(comm, model, sgd(model), policy=mpisync.BackupWorkers(1), progress=False) as session:
        for number, (x, y) in enumerate(session.batches(loader(), steps=40)):
            if session.worker == 0 and number == 0:
                while not session.stale():
                    time.sleep(0.001)
                continue
            if session.worker == 1 and session.version >= 20:
                break  # only worker 0 is left, and it must be up to date to be accepted
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            accepted += session.step(loss).accepted
    counts = on_all(comm, accepted)
    assert session.version == 40 and counts[0] >= 20


def test_accumulation_works_alone_too():
    from mpi4py import MPI

    model, twin = new_model(), new_model()
    rows = []
    accumulate(MPI.COMM_SELF, model, sgd(model), body=lambda s, n, x: rows.append(x.clone()))
    targets = {tuple(x.tolist()): int(y) for x, y in DATA}
    optimizer = sgd(twin)
    for number, x in enumerate(rows):
        (F.cross_entropy(twin(x), torch.tensor([targets[tuple(row.tolist())] for row in x])) / 2).backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert len(rows) == 12 and np.array_equal(flat(model), flat(twin))


@pytest.mark.parallel(WORKERS + 1)
def test_a_forgotten_step_is_warned_about(comm):
    check_forgotten(comm)


def test_a_forgotten_step_is_warned_about_alone_too():
    from mpi4py import MPI

    check_forgotten(MPI.COMM_SELF)


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


@pytest.mark.parallel(WORKERS + 1)
def test_a_step_without_backward_is_an_error(comm):
    model = new_model()
    with fails_everywhere(comm, RuntimeError, "no parameter has a gradient", "loss.backward()"):
        with mpisync.Session(comm, model, sgd(model), progress=False) as session:
            for x, y in session.batches(loader(), steps=3):
                session.step(F.cross_entropy(model(x), y))


def test_a_step_without_backward_is_an_error_alone_too():
    from mpi4py import MPI

    model = new_model()
    with pytest.raises(RuntimeError, match=r"no parameter has a gradient.*loss.backward\(\)"):
        with mpisync.Session(MPI.COMM_SELF, model, sgd(model)) as session:
            for x, y in session.batches(loader(), steps=3):
                session.step(F.cross_entropy(model(x), y))


@pytest.mark.parallel(WORKERS + 1)
def test_a_stale_computation_may_be_given_up_by_a_step_without_backward(comm):
    model, late = new_model(), 0
    with mpisync.Session(comm, model, sgd(model), policy=mpisync.BackupWorkers(1), progress=False) as session:
        for x, y in session.batches(loader(), steps=20):
            while session.worker == 0 and not session.stale():
                time.sleep(0.001)
            if session.worker == 0:
                late += bool(session.step().late_by)
                continue
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            session.step(loss)
    assert session.version == 20 and (late > 0) == (comm.rank == 0)


# -- looking at the model --------------------------------------------------------------------------


@pytest.mark.parallel(WORKERS + 1)
def test_evaluation_and_snapshot_are_private_copies_on_one_worker(comm):
    model = new_model()
    found = []

    def look(session, x):
        twin = session.evaluate(lambda m: m, every=4)
        if twin is not None:
            found.append(session.version)
            with torch.no_grad():
                twin[0].weight.zero_()

    train(comm, model, sgd(model), body=look, policy=mpisync.BackupWorkers(0), steps=13)
    assert on_all(comm, found) == [[4, 8, 12], [], []]
    assert model[0].weight.abs().sum() > 0


@pytest.mark.parallel(WORKERS + 1)
def test_a_record_replays_to_the_same_bits(comm, tmp_path):
    path = comm.bcast(str(tmp_path / "record.jsonl"))

    def run(policy, record=None):
        model = new_model()
        train(comm, model, sgd(model), policy=policy, steps=15, record=record)
        return flat(model)

    first = run(mpisync.BackupWorkers(1), path)
    again = run(mpisync.Replay(path))
    assert np.array_equal(first, again)
    if comm.rank == WORKERS:
        header, steps = read_record(path)
        assert header.workers == WORKERS and [s.step for s in steps] == list(range(15))
        assert all(len(s.accepted) == 1 and s.accepted[0][2] == s.step for s in steps)


@pytest.mark.parallel(WORKERS + 1)
def test_ranks_that_disagree_hear_it_at_once(comm):
    for change, word in ((comm.rank == 0, "differ"),):
        model = nn.Linear(4 + change, 2) if word else None
        with pytest.raises(ValueError, match="weight"):
            with mpisync.Session(comm, model, sgd(model), progress=False):
                pass
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="LBFGS"):
        with mpisync.Session(comm, model, torch.optim.LBFGS(model.parameters()), progress=False):
            pass
    with pytest.raises(ValueError, match="backup"):
        with mpisync.Session(comm, model, sgd(model), policy=mpisync.BackupWorkers(WORKERS), progress=False):
            pass
    with pytest.raises(ValueError, match="nowhere"):
        with mpisync.Session(comm, model, sgd(model), record="/nowhere/at/all.jsonl", progress=False):
            pass


@pytest.mark.parallel(WORKERS + 1)
def test_workers_that_draw_the_same_batches_are_warned_about(comm):
    model = new_model()
    same = ((x, y) for x, y in [(torch.ones(4, 6).double(), torch.zeros(4, dtype=torch.long))] * 20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(comm, model, sgd(model), data=same, steps=3, policy=mpisync.BackupWorkers(0))
    texts = [str(w.message) for w in caught]
    assert any("equal gradients" in text for text in texts) == (comm.rank == WORKERS)


@pytest.mark.parallel(WORKERS + 1)
def test_samples_are_accounted_for(comm, tmp_path):
    path = comm.bcast(str(tmp_path / "record.jsonl"))
    model, roles = new_model(), []
    verdicts, session = train(
        comm, model, sgd(model), policy=mpisync.BackupWorkers(1), steps=20, record=path, roles=roles
    )
    handed = sum(on_all(comm, 8 * len(verdicts)))
    if session.worker is None:
        _, steps = read_record(path)
        used = sum(step.samples_used for step in steps)
        accounts = roles[0]._root.members
        assert used == sum(m.account.used for m in accounts) == 20 * 8
        assert handed == sum(m.account.handed for m in accounts)
        assert all(m.account.in_flight == 0 for m in accounts)


def test_alone_the_same_script_trains_with_a_notice(capfd):
    from mpi4py import MPI

    model = new_model()
    verdicts, session = train(MPI.COMM_SELF, model, sgd(model), policy=mpisync.BackupWorkers(1), steps=7)
    assert session.version == 7 and all(v.accepted for v in verdicts)
    assert "policy backup:1 is ignored" in capfd.readouterr().err


def test_alone_the_record_the_hook_and_the_progress_line_work(tmp_path, capfd):
    from mpi4py import MPI

    path, heard, model = str(tmp_path / "record.jsonl"), [], new_model()
    optimizer = sgd(model)

    def note(record):
        heard.append((record, [p.grad is not None for p in model.parameters()]))
        optimizer.param_groups[0]["lr"] *= 0.5  # the hook runs where updates are made, here too

    def poison(number):
        if number == 2:
            model[0].weight.grad[0, 0] = float("nan")

    with mpisync.Session(MPI.COMM_SELF, model, optimizer, record=path, on_step=note, ema=0.9) as session:
        for number, (x, y) in enumerate(session.batches(loader(), steps=6)):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            poison(number)
            session.step(loss)
    header, steps = read_record(path)
    assert (header.policy, header.workers, len(header.hosts), header.settings["ema"]) == ("backup:0", 1, 1, 0.9)
    assert [record for record, _ in heard] == steps and all(all(grads) for _, grads in heard)
    assert [step.accepted for step in steps] == [[(0, n + (n > 1), n)] for n in range(6)]
    assert [[a.verdict for a in step.arrivals] for step in steps] == [["accepted"]] * 2 + [["rejected", "accepted"]] + [
        ["accepted"]
    ] * 3
    assert all(step.samples_used == 8 and step.arrivals[-1].loss > 0 for step in steps)
    assert all(step.opened_s <= step.closed_s <= step.published_s for step in steps)
    assert steps[-1].counts == {"accepted": 6, "late": 0, "rejected": 1}
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 64)
    assert "step 6/6 | accepted 1/1 | rejected 1 |" in capfd.readouterr().err


@pytest.mark.parallel(2)
def test_a_record_of_one_process_alone_can_be_replayed_by_a_worker(comm, tmp_path):
    path = comm.bcast(str(tmp_path / "record.jsonl"))
    first = new_model()
    if comm.rank == 0:
        from mpi4py import MPI

        train(MPI.COMM_SELF, first, sgd(first), record=path, steps=10)
    comm.Barrier()
    again = new_model()
    train(comm, again, sgd(again), policy=mpisync.Replay(path), steps=10)
    assert np.array_equal(comm.bcast(flat(first)), flat(again))


def test_alone_a_diverged_model_ends_the_training():
    from mpi4py import MPI

    model = new_model()
    with pytest.raises(RuntimeError, match="last 20 gradients all had NaN or Inf: training has diverged at version 3"):
        train(
            MPI.COMM_SELF,
            model,
            sgd(model),
            body=lambda s, x: model[0].weight.grad.fill_(float("nan")) if s.version == 3 else None,
        )


def test_alone_a_plateau_scheduler_gets_the_loss():
    from mpi4py import MPI

    model = new_model()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer := sgd(model), patience=0, factor=0.5)
    with mpisync.Session(MPI.COMM_SELF, model, optimizer, scheduler=scheduler) as session:
        for x, y in session.batches(loader(), steps=4):
            F.cross_entropy(model(x), y).backward()
            session.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)


@pytest.mark.parallel(WORKERS + 1)
def test_a_slow_update_is_told_how_to_be_fast_once_by_the_root(comm, capfd):
    model = nn.Linear(1000, 1000)
    data = [(torch.ones(1, 1000) * number, torch.zeros(1, 1000)) for number in range(4)]
    for options, said in (({}, 1), ({"fused": True}, 0)):
        optimizer = torch.optim.AdamW(model.parameters(), **options)
        with mpisync.Session(comm, model, optimizer, progress=False) as session:
            for x, y in session.batches(data, steps=2):
                loss = F.mse_loss(model(x), y)
                loss.backward()
                session.step(loss)
        text = "mpisync: every step waits for the update of 1.0 million parameters: torch.optim.AdamW(..., fused=True)"
        assert capfd.readouterr().err.count(text) == (said if session.worker is None else 0)


@pytest.mark.parallel(WORKERS + 1)
def test_a_second_loop_says_what_to_write_instead(comm):
    model = new_model()
    with fails_everywhere(comm, RuntimeError, "once a session: give it the steps of all epochs together"):
        with mpisync.Session(comm, model, sgd(model), progress=False) as session:
            for epoch in range(2):
                for x, y in session.batches(loader(), steps=3 * (epoch + 1)):
                    loss = F.cross_entropy(model(x), y)
                    loss.backward()
                    session.step(loss)
