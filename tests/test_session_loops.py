"""What ordinary loops bring and look at: loaders, compiled models, groups that change, snapshots, states, exits."""

import os
import shutil

import numpy as np
import pytest
import torch
from test_session_updates import ALL, ROOT, Counter
from torch.utils.data import DataLoader
from training import DATA, WORKERS, fails_everywhere, flat, loader, new_model, on_all, sgd, train

import mpisync


def rows_of(batches):
    return [tuple(row) for x in batches for row in x.tolist()]


def drawn_by(comm, data, steps=4):
    """Train on `data`; each worker's rows, in order."""
    drawn, model = [], new_model()
    train(comm, model, sgd(model), data=data, steps=steps, body=lambda s, x: drawn.append(x.clone()), policy=ALL)
    return [rows_of(batches) for batches in on_all(comm, drawn)[:WORKERS]]


# -- loaders and models ----------------------------------------------------------------------------


@pytest.mark.parallel(WORKERS + 1)
def test_a_loader_with_processes_of_its_own_works_after_mpi_has_started(comm):
    rows = drawn_by(comm, loader(num_workers=2))
    assert len(sum(rows, [])) == len(set(sum(rows, []))) == len(DATA), "an epoch is every sample once"
    assert rows == drawn_by(comm, loader()), "and the processes change nothing"


@pytest.mark.parallel(WORKERS + 1)
def test_a_sampler_of_ones_own_is_respected(comm):
    chosen = [list(range(60, -1, -4)), list(range(1, 64, 4))]
    mine = chosen[comm.rank % WORKERS]
    rows = drawn_by(comm, DataLoader(DATA, batch_size=8, sampler=mine), steps=2)
    assert rows == [rows_of([DATA[one][0]]) for one in chosen]


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "c++"))),
    reason="torch.compile needs a C++ compiler, and there is none",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of importing what compiles
def test_a_compiled_model_trains_like_a_plain_one_and_is_compiled_once(comm):
    from torch._dynamo.utils import counters

    plain, model = new_model(), new_model()
    train(comm, plain, sgd(plain), policy=ALL, steps=6)
    compiled, before = torch.compile(model), counters["stats"]["unique_graphs"]
    train(comm, compiled, sgd(compiled), policy=ALL, steps=6)
    np.testing.assert_allclose(flat(model), flat(plain), rtol=1e-9, atol=1e-12)
    assert counters["stats"]["unique_graphs"] - before == (comm.rank != ROOT), "new versions are no reason to compile"


@pytest.mark.parallel(WORKERS + 1)
def test_a_group_changed_on_a_worker_is_named_on_every_rank(comm):
    model = new_model()
    optimizer = sgd(model)

    def change(session, x):
        if session.worker == 1 and session.version == 3:
            optimizer.param_groups[0]["lr"] = 0.01

    with fails_everywhere(comm, RuntimeError, "param_groups[0]['lr'] was changed from 0.1 to 0.01", "scheduler="):
        train(comm, model, optimizer, body=change)


# -- looking ---------------------------------------------------------------------------------------


@pytest.mark.parallel(WORKERS + 1)
def test_whoever_is_late_can_know_it_and_see_the_newest_parameters_whole(comm, tmp_path):
    counter, model, seen = Counter(comm, tmp_path), new_model(norm=True), []
    published = [flat(model)]

    def publish(record):
        published.append(flat(model))
        counter.count()

    def look(session, x):
        if session.worker == 0 and len(seen) < 3:
            version = session.version
            counter.wait_for_more_than(version)
            twins = session.snapshot(), new_model(norm=True)
            state = session.state_dict()
            twins[1].load_state_dict(state["model"])
            seen.append((version, session.stale(), state["version"], flat(model), *map(flat, twins)))
            assert session.version == version, "it goes on computing on what it had"
            if len(seen) == 3:
                session.stop()

    policy = mpisync.BackupWorkers(1)
    verdicts, _ = train(
        comm, model, sgd(model), steps=None, policy=policy, body=look, on_step=publish, own_copy=True
    )
    published = [values.tobytes() for values in comm.bcast(published, root=ROOT)]
    for version, stale, named, own, *twins in seen:
        assert stale and own.tobytes() == published[version]
        newest = [published.index(twin.tobytes()) for twin in twins]  # of one version, whole
        assert version < newest[0] <= newest[1] == named
    assert len(seen) == (3 if comm.rank == 0 else 0)
    assert not any(verdict.accepted for verdict in verdicts[:3]) or comm.rank != 0


@pytest.mark.parallel(WORKERS + 1)
def test_nothing_is_stale_while_everyone_waits_for_this_worker(comm):
    model, told = new_model(), []
    train(comm, model, sgd(model), body=lambda s, x: told.append(s.stale()), policy=ALL)
    assert told == [False] * (12 if comm.rank != ROOT else 0)


@pytest.mark.parallel(WORKERS + 1)
def test_the_state_is_the_models_and_at_the_root_the_optimizers_and_schedulers_too(comm):
    model = new_model(seed=comm.rank, norm=True)
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    states = []

    def keep(session):
        states.append(session.state_dict())
        again = new_model(norm=True)
        again.load_state_dict(states[-1]["model"])
        assert np.array_equal(flat(again), flat(model))
        assert int(again[1].num_batches_tracked) == states[-1]["version"] == len(states)
        return again

    def keep_all(record):
        again = keep(session)
        other = sgd(again)
        other.load_state_dict(states[-1]["optimizer"])
        assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
        for p, q in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(other.state[q]["momentum_buffer"], optimizer.state[p]["momentum_buffer"])
        assert states[-1]["scheduler"]["last_epoch"] == record.step + 1

    with mpisync.Session(
        comm, model, optimizer, progress=False, policy=ALL, scheduler=scheduler, on_step=keep_all
    ) as session:
        for x, y in session.batches(loader(), steps=5):
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            session.step(loss)
            keep(session)
            assert set(states[-1]) == {"version", "model"}
    models = on_all(comm, [{name: value.numpy() for name, value in state["model"].items()} for state in states])
    assert len(models[0]) == 5
    for of_rank in models:
        for one, other in zip(of_rank, models[0], strict=True):
            assert all(np.array_equal(one[name], other[name]) for name in other)


# -- I10 -------------------------------------------------------------------------------------------


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("leaves", ["break", "exit"])
def test_a_batch_that_was_drawn_and_left_is_lost_and_accounted_for(comm, leaves):
    model = new_model()
    try:
        with mpisync.Session(comm, model, sgd(model), progress=False, policy=ALL) as session:
            root = getattr(session._role, "_root", None)
            for number, (x, y) in enumerate(session.batches(loader(), steps=10)):
                if session.worker == 0 and number == 3:
                    if leaves == "break":
                        break
                    raise SystemExit(0)
                loss = torch.nn.functional.cross_entropy(model(x), y)
                loss.backward()
                session.step(loss)
    except SystemExit:
        assert leaves == "exit"
    if root is not None:
        accounts = root.collector.accounts
        assert [(a.handed, a.used, a.discarded, a.lost, a.in_flight) for a in accounts] == [
            (8 * 4, 8 * 3, 0, 8, 0),
            (8 * 10, 8 * 10, 0, 0, 0),
        ]
