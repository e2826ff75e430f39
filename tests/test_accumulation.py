"""Loops that step once in several batches, pass batches over, or forget to step."""

import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training import DATA, WORKERS, accumulate, check_forgotten, fails_everywhere, flat, loader, new_model, on_all, sgd

import mpisync


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
        accounts = role._root.collector.accounts
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
        for worker, (account, batches) in enumerate(zip(role._root.collector.accounts, drawn, strict=False)):
            assert account.handed == 8 * batches == account.used + account.discarded + account.lost
            assert account.used == (30 * 16 if worker else 0)


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
        first, second = roles[0]._root.collector.accounts
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


@pytest.mark.parallel(WORKERS + 1)
def test_a_forgotten_step_is_warned_about(comm):
    check_forgotten(comm)


@pytest.mark.parallel(WORKERS + 1)
def test_a_step_without_backward_is_an_error(comm):
    model = new_model()
    with fails_everywhere(comm, RuntimeError, "no parameter has a gradient", "loss.backward()"):
        with mpisync.Session(comm, model, sgd(model), progress=False) as session:
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
