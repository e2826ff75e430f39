"""A session of one process: the same script, and nobody to wait for."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training import (
    DATA,
    Shared,
    accumulate,
    check_average,
    check_ended,
    check_forgotten,
    flat,
    loader,
    new_model,
    sgd,
    train,
)

import mpisync
from mpisync.records import RecordReader, read_record


@pytest.fixture
def alone():
    """A communicator of one process; MPI is not started before a test wants it."""
    from mpi4py import MPI

    return MPI.COMM_SELF


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: torch.compile(model, backend="eager")])
def test_alone_too_the_average_can_be_loaded(alone, wrap):
    check_average(alone, wrap(Shared().double()))


def test_after_the_with_it_answers_alone_too(alone):
    check_ended(alone, 1)


def test_accumulation_works_alone_too(alone):
    model, twin = new_model(), new_model()
    rows = []
    accumulate(alone, model, sgd(model), body=lambda s, n, x: rows.append(x.clone()))
    targets = {tuple(x.tolist()): int(y) for x, y in DATA}
    optimizer = sgd(twin)
    for number, x in enumerate(rows):
        (F.cross_entropy(twin(x), torch.tensor([targets[tuple(row.tolist())] for row in x])) / 2).backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert len(rows) == 12 and np.array_equal(flat(model), flat(twin))


def test_a_forgotten_step_is_warned_about_alone_too(alone):
    check_forgotten(alone)


def test_a_step_without_backward_is_an_error_alone_too(alone):
    model = new_model()
    with pytest.raises(RuntimeError, match=r"no parameter has a gradient.*loss.backward\(\)"):
        with mpisync.Session(alone, model, sgd(model)) as session:
            for x, y in session.batches(loader(), steps=3):
                session.step(F.cross_entropy(model(x), y))


def test_alone_the_same_script_trains_with_a_notice(alone, capfd):
    model = new_model()
    verdicts, session = train(alone, model, sgd(model), policy=mpisync.BackupWorkers(1), steps=7)
    assert session.version == 7 and all(v.accepted for v in verdicts)
    assert "policy backup:1 is ignored" in capfd.readouterr().err


def test_alone_the_record_the_hook_and_the_progress_line_work(alone, tmp_path, capfd):
    path, heard, model = str(tmp_path / "record.jsonl"), [], new_model()
    optimizer = sgd(model)

    def note(record):
        heard.append((record, [p.grad is not None for p in model.parameters()]))
        optimizer.param_groups[0]["lr"] *= 0.5  # the hook runs where updates are made, here too

    def poison(number):
        if number == 2:
            model[0].weight.grad[0, 0] = float("nan")

    with mpisync.Session(alone, model, optimizer, record=path, on_step=note, ema=0.9) as session:
        for number, (x, y) in enumerate(session.batches(loader(), steps=6)):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            poison(number)
            session.step(loss)
    header, steps = read_record(path)
    reader = RecordReader(path)
    assert len(list(reader)) == reader.end.version == len(steps)
    assert reader.end.handed == [reader.end.used[0] + reader.end.discarded[0]] and not reader.end.failure
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
def test_a_record_of_one_process_alone_can_be_replayed_by_a_worker(alone, comm, tmp_path):
    path = comm.bcast(str(tmp_path / "record.jsonl"))
    first = new_model()
    if comm.rank == 0:
            train(alone, first, sgd(first), record=path, steps=10)
    comm.Barrier()
    again = new_model()
    train(comm, again, sgd(again), policy=mpisync.Replay(path), steps=10)
    assert np.array_equal(comm.bcast(flat(first)), flat(again))


def test_alone_a_diverged_model_ends_the_training(alone):
    model = new_model()
    with pytest.raises(RuntimeError, match="last 20 gradients all had NaN or Inf: training has diverged at version 3"):
        train(
            alone,
            model,
            sgd(model),
            body=lambda s, x: model[0].weight.grad.fill_(float("nan")) if s.version == 3 else None,
        )


def test_alone_a_plateau_scheduler_gets_the_loss(alone):
    model = new_model()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer := sgd(model), patience=0, factor=0.5)
    with mpisync.Session(alone, model, optimizer, scheduler=scheduler) as session:
        for x, y in session.batches(loader(), steps=4):
            F.cross_entropy(model(x), y).backward()
            session.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)


def test_a_rejected_step_leaves_no_trace_in_the_module_buffers(alone):
    model, seen = new_model(norm=True), []
    with mpisync.Session(alone, model, sgd(model)) as session:
        for number, (x, y) in enumerate(session.batches(loader(), steps=3)):
            before = model[1].running_mean.clone()
            loss = F.cross_entropy(model(x * float("nan") if number == 1 else x), y)
            loss.backward()
            verdict = session.step(loss)
            seen.append((verdict.accepted, torch.equal(before, model[1].running_mean)))
    assert seen == [(True, False), (False, True), (True, False), (True, False)]
    assert int(model[1].num_batches_tracked) == 3


def test_the_launcher_of_another_mpi_is_noticed(alone, monkeypatch):
    from mpi4py import MPI

    if MPI.COMM_WORLD.size > 1:
        pytest.skip("this is a job of several ranks")
    model = new_model()
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "5")
    with pytest.raises(RuntimeError, match="5 ranks, but this one is rank 0 of 1: mpi4py loaded another MPI"):
        with mpisync.Session(alone, model, sgd(model)):
            pass
