"""What becomes of accepted gradients: weights, clipping, averages, schedules, hooks."""

import time
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import DATA, WORKERS, Shared, check_average, fails_everywhere, flat, loader, new_model, on_all, sgd, train

import mpisync
from mpisync.aggregation.closed_step import ClosedStep


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


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: torch.compile(model, backend="eager")])
def test_the_average_is_a_whole_state_of_the_model_that_can_be_loaded(comm, wrap):
    check_average(comm, wrap(Shared().double()))


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
    assert optimizer.param_groups[0]["lr"] == (0.025 if session.worker is None else 0.1)  # as docs/rules.rst says


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
def test_the_average_moves_from_the_initial_values_by_one_part_in_ten(comm):
    model, seen = new_model(), []
    expected = flat(model)
    _, session = train(comm, model, sgd(model), ema=0.9, on_step=lambda record: seen.append(flat(model)))
    for theta in seen:
        expected = 0.9 * expected + 0.1 * theta
    if comm.rank == WORKERS:
        assert len(seen) == 12
        np.testing.assert_allclose(flat(session.snapshot(average=True)), expected, rtol=1e-12)


UNEQUAL = [
    (DATA.tensors[0][start:stop], DATA.tensors[1][start:stop])
    for start, stop in ((0, 2), (2, 12), (12, 15), (15, 25), (25, 26), (26, 40))
]


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("used", [None, 2])
def test_gradients_weighted_by_samples_are_those_of_one_process_on_the_union(comm, used):
    """As counted from the batches, and as the loop says, of which worker 1 uses two samples only."""
    model, twin = new_model(), new_model()
    settings = {"policy": mpisync.BackupWorkers(0), "weight": "samples", "progress": False}
    with mpisync.Session(comm, model, sgd(model), **settings) as session:
        for x, y in session.batches(UNEQUAL, steps=3):
            count = used if session.worker == 1 else None
            loss = F.cross_entropy(model(x[:count]), y[:count])
            loss.backward()
            session.step(loss, samples=count)
    optimizer = sgd(twin)
    for (x, y), (more_x, more_y) in zip(UNEQUAL[::2], UNEQUAL[1::2], strict=True):
        optimizer.zero_grad()
        union_x, union_y = torch.cat([x, more_x[:used]]), torch.cat([y, more_y[:used]])
        F.cross_entropy(twin(union_x), union_y).backward()
        optimizer.step()
    np.testing.assert_allclose(flat(model), flat(twin), rtol=1e-9, atol=1e-12)


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("cure", ["none", "times the gradients of a mean", "the mean, weighted"])
def test_a_sum_over_samples_is_cured_by_the_number_of_gradients_or_is_made_a_mean(comm, cure):
    """Against one process that sums over the union; a mean differs from that by the samples of it, here 12."""
    sizes = (2, 10) * 5 + (4,)
    batches = list(zip(*(tensor.split(sizes) for tensor in DATA.tensors), strict=True))[:10]
    weighted = cure == "the mean, weighted"
    model, twin = new_model(), new_model()
    settings = {"policy": mpisync.BackupWorkers(0), "weight": "samples" if weighted else "equal", "progress": False}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01 * (12 if weighted else 1))
    with mpisync.Session(comm, model, optimizer, **settings) as session:
        for x, y in session.batches(batches, steps=5):
            loss = F.cross_entropy(model(x), y, reduction="mean" if weighted else "sum")
            (loss * (session.workers if "times" in cure else 1)).backward()
            session.step(loss)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.01)
    for step in range(5):
        optimizer.zero_grad()
        for x, y in batches[2 * step : 2 * step + 2]:
            F.cross_entropy(twin(x), y, reduction="sum").backward()
        optimizer.step()
    assert np.allclose(flat(model), flat(twin), rtol=1e-9, atol=1e-12) == (cure != "none")


@pytest.mark.parallel(WORKERS + 1)
def test_a_parameter_that_no_worker_uses_is_left_alone_by_weight_decay(comm):
    torch.manual_seed(0)
    model = Shared().double()
    model.unused = nn.Linear(3, 3).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    train(comm, model, torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=0.1))
    same = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert same == {"unused.weight", "unused.bias", "last.bias"}
    values = on_all(comm, flat(model))
    assert all(np.array_equal(values[0], other) for other in values)
    assert model.one.weight is model.other.weight


@pytest.mark.parallel(WORKERS + 1)
def test_sessions_in_a_row_with_groups_sixteen_bits_and_a_loaders_processes(comm):
    model = new_model().bfloat16()
    groups = [{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[2].parameters(), "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    data = TensorDataset(DATA.tensors[0].bfloat16(), DATA.tensors[1])
    for number in range(2):
        draws = DataLoader(data, batch_size=8, shuffle=True, num_workers=number)
        train(comm, model, optimizer, data=draws, clip_norm=0.5, ema=0.9, steps=4)
        values = on_all(comm, torch.cat([p.detach().float().flatten() for p in model.parameters()]).numpy())
        assert all(np.array_equal(values[0], other) for other in values) and np.isfinite(values[0]).all()
    if comm.rank == WORKERS:
        assert {int(state["step"]) for state in optimizer.state.values()} == {8}


@pytest.mark.parallel(WORKERS + 1)
def test_an_exception_in_the_hook_ends_the_training_everywhere(comm):
    model = new_model()

    def hook(record):
        if record.step == 2:
            raise KeyError("in the hook")

    with fails_everywhere(comm, KeyError, "in the hook"):
        train(comm, model, sgd(model), on_step=hook)


def plain_sgd(model):
    """Two groups and a scheduler, and nothing that keeps the fold and the update from being one pass."""
    groups = [{"params": model[:1].parameters()}, {"params": model[1:].parameters(), "lr": 0.05}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda version: 1 / (1 + version))


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", ["shared", "messages"])
def test_plain_sgd_folds_and_updates_in_one_pass_with_torchs_own_bits(comm, monkeypatch, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    descents, original = [], ClosedStep.fused_sgd_step
    monkeypatch.setattr(ClosedStep, "fused_sgd_step", lambda *a: descents.append(original(*a)) or descents[-1])
    ended = []
    for hooked in (False, True):  # a hook might want to see the gradients: then torch's own step it is
        model = new_model()
        optimizer, scheduler = plain_sgd(model)
        if hooked:
            optimizer.register_step_pre_hook(lambda *_: None)
        train(comm, model, optimizer, scheduler=scheduler, policy=mpisync.BackupWorkers(0))
        ended.append(flat(model))
    assert np.array_equal(*ended), "with WORKERS == 2 the order of arrival changes no bit"
    assert not np.array_equal(ended[0], flat(new_model()))
    assert descents == ([True] * 12 if comm.rank == WORKERS else [])


@pytest.mark.parallel(WORKERS + 1)
def test_a_sum_that_overflows_never_touches_the_parameters(comm):
    model, records = new_model(), []
    optimizer, _ = plain_sgd(model)

    def inflate(session, x):
        if session.version == 2:
            model[0].weight.grad[0, 0] = 1.5e308  # finite: the sum is not

    def look(record):
        records.append((record.updated, flat(model)))

    train(comm, model, optimizer, body=inflate, on_step=look, steps=5, policy=mpisync.BackupWorkers(0))
    if comm.rank == WORKERS:
        assert [updated for updated, _ in records] == [True, True, False, True, True]
        assert np.array_equal(records[1][1], records[2][1]) and not np.array_equal(records[2][1], records[3][1])
    assert np.isfinite(flat(model)).all()
