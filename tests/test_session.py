"""The torch face among real processes: what a training script may rely on."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import DATA, WORKERS, check_ended, fails_everywhere, flat, loader, new_model, on_all, sgd, train

import mpisync
from mpisync.records import RecordReader, read_record


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
@pytest.mark.parametrize("transport", ["shared", "messages"])
def test_after_the_with_a_session_still_answers_and_holds_nothing_open(comm, monkeypatch, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    check_ended(comm, WORKERS)


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
        accounts = roles[0]._root.collector.accounts
        assert used == sum(m.used for m in accounts) == 20 * 8
        assert handed == sum(m.handed for m in accounts)
        assert all(m.in_flight == 0 for m in accounts)
        reader = RecordReader(path)  # says the same to whoever has nothing else, up to the last verdict
        judged = [arrival for step in reader for arrival in step.arrivals]
        end = reader.end
        assert (end.version, end.failure) == (20, "")
        assert end.handed == [m.handed for m in accounts] and sum(end.used) == used
        for worker in range(WORKERS):
            samples = sum(a.samples for a in [*judged, *end.arrivals] if a.worker == worker)
            assert samples == end.handed[worker] == end.used[worker] + end.discarded[worker]


@pytest.mark.parallel(WORKERS + 1)
def test_a_replay_under_other_settings_than_the_records_is_refused_by_name(comm, tmp_path):
    path = comm.bcast(str(tmp_path / "record.jsonl"))
    kept = {"seed": 3, "weight": "samples", "clip_norm": 0.5, "ema": 0.9}
    model = new_model()
    train(comm, model, sgd(model), steps=3, record=path, **kept)
    for name, other in (("seed", 7), ("weight", "equal"), ("clip_norm", None), ("ema", 0.5)):
        with pytest.raises(ValueError, match=f"the record was made with {name}={kept[name]!r} and this session has"):
            train(comm, model, sgd(model), policy=mpisync.Replay(path), **{**kept, name: other})
    train(comm, model, sgd(model), policy=mpisync.Replay(path), **kept)


def test_what_is_no_communicator_is_refused():
    from mpi4py import MPI

    model = new_model()
    for nothing, says in ((None, "such as MPI.COMM_WORLD"), (MPI.COMM_NULL, "that this rank is in, not MPI.COMM_NULL")):
        with pytest.raises((TypeError, ValueError), match=f"comm must be an intracommunicator {says}"):
            mpisync.Session(nothing, model, sgd(model))


@pytest.mark.parallel(WORKERS + 1)
def test_torch_has_all_cores_at_the_root_and_a_share_of_them_on_a_worker(comm, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(1 if comm.rank == WORKERS else 64)  # what a launcher leaves, or a script
    model, seen = new_model(), []
    count = lambda *_: seen.append(torch.get_num_threads())  # noqa: E731
    train(comm, model, sgd(model), steps=2, body=count, on_step=count)
    cores = len(os.sched_getaffinity(0))
    assert seen and set(seen) == {cores if comm.rank == WORKERS else max(1, cores // (WORKERS + 1))}
    assert torch.get_num_threads() == (1 if comm.rank == WORKERS else 64)
    torch.set_num_threads(before)
