"""The way of a metric: from the worker that evaluates to the root, its schedulers, the record and the report."""

import math

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from training import WORKERS, fails_everywhere, flat, new_model, sgd, train

import mpisync
from mpisync.policies import Replay
from mpisync.records import RecordWriter, RunHeader, StepRecord, read_record
from mpisync.records.schema import RunEnd, StepChecker
from mpisync.reports.columns import read_run
from mpisync.reports.page import page

PLATEAU = {"factor": 0.5, "patience": 0}
TRANSPORTS = pytest.mark.parametrize("transport", ["shared", "messages"])


def rate(optimizer):
    return optimizer.param_groups[0]["lr"]


def measures(values, every):
    """A loop's body that evaluates to these values, one after the other, behind each step but the first."""
    values = iter(values)
    return lambda session, x: session.evaluate(lambda model: next(values), every=every, metric=True)


def run(comm, values, *, every=2, steps=12, **more):
    model = new_model()
    optimizer = sgd(model)
    scheduler = ReduceLROnPlateau(optimizer, **PLATEAU)
    _, session = train(
        comm, model, optimizer, steps, body=measures(values, every), metric_scheduler=scheduler, **more
    )
    return model, optimizer, scheduler, session


@pytest.mark.parallel(WORKERS + 1)
@TRANSPORTS
def test_a_metric_comes_to_the_root_and_steps_its_scheduler(comm, monkeypatch, tmp_path, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    path = comm.bcast(str(tmp_path / "record.jsonl"))
    _, optimizer, scheduler, session = run(comm, [3.0, 2.0, 2.5, 2.5, 1.0], record=path)
    if session.worker is not None:
        assert rate(optimizer) == 0.1, "a worker reads the initial rate: the root steps the scheduler"
        return
    _, steps = read_record(path)
    told = [(step.step, metric) for step in steps for metric in step.metrics or []]
    assert [metric for _, metric in told] == [(2, 3.0), (4, 2.0), (6, 2.5), (8, 2.5), (10, 1.0)]
    assert all(step == version for step, (version, _) in told), "with b=0 each comes with the next gradient"
    assert rate(optimizer) == 0.1 / 4, "two evaluations were no better than the one before"
    assert scheduler.best == 1.0 and session.state_dict()["metric_scheduler"]["best"] == 1.0


def test_one_process_does_the_same(tmp_path):
    path = tmp_path / "record.jsonl"
    _, optimizer, scheduler, _ = run(MPI.COMM_SELF, [3.0, 2.0, 2.5, 2.5, 1.0], record=path)
    assert rate(optimizer) == 0.1 / 4 and scheduler.best == 1.0
    told = [metric for step in read_record(path)[1] for metric in step.metrics or []]
    assert told == [(2, 3.0), (4, 2.0), (6, 2.5), (8, 2.5), (10, 1.0)]


@pytest.mark.parallel(WORKERS + 1)
def test_the_last_metric_is_in_the_record_though_no_step_follows(comm, tmp_path):
    path = comm.bcast(str(tmp_path / "record.jsonl"))
    model = new_model()
    with mpisync.Session(comm, model, sgd(model), progress=False, record=path) as session:
        for x, y in session.batches([(torch.ones(2, 6).double(), torch.zeros(2).long())] * 4, steps=4):
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            session.step(loss)
            session.evaluate(lambda model: 7.0, every=4, metric=True)
    if session.worker is None:
        told = read_run(path)
        assert (told.metrics["version"].tolist(), told.metrics["value"].tolist()) == ([4], [7.0])
        assert "The metric was 7 when it was evaluated." in page([told])


@pytest.mark.parallel(WORKERS + 2)
@TRANSPORTS
def test_a_replay_takes_the_metrics_of_the_record(comm, monkeypatch, tmp_path, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    path = comm.bcast(str(tmp_path / "record.jsonl"))
    model, optimizer, _, session = run(
        comm, [3.0, 2.0, 2.5, 2.5, 1.0, 0.5], record=path, policy=mpisync.BackupWorkers(1), steps=14
    )
    comm.Barrier()  # the record is written
    again, optimizer_again, _, _ = run(comm, [0.0] * 7, policy=Replay(path), steps=14)  # it would never be reduced
    assert np.array_equal(flat(model), flat(again))
    if session.worker is None:
        assert rate(optimizer) == rate(optimizer_again) < 0.1


@pytest.mark.parallel(WORKERS + 1)
def test_what_is_no_number_is_refused_where_it_is_found(comm):
    with fails_everywhere(comm, TypeError, "with metric=True, what fn returns must be one number, not None"):
        run(comm, [None])


@pytest.mark.parallel(WORKERS + 1)
def test_a_metric_may_be_nan(comm):
    _, optimizer, _, session = run(comm, [1.0, math.nan, 0.5, 0.25, 0.125])
    assert session.worker is not None or rate(optimizer) == 0.05


def test_each_call_of_evaluate_counts_for_itself():
    seen = []

    def body(session, x):
        session.evaluate(lambda model: seen.append(("often", session.version)), every=2)
        session.evaluate(lambda model: seen.append(("rarely", session.version)), every=5)

    train(MPI.COMM_SELF, model := new_model(), sgd(model), 12, body=body)
    assert [version for name, version in seen if name == "often"] == [2, 4, 6, 8, 10]
    assert [version for name, version in seen if name == "rarely"] == [5, 10]


def test_a_second_metric_is_refused():
    def body(session, x):
        session.evaluate(lambda model: 1.0, every=2, metric=True)
        session.evaluate(lambda model: 1.0, every=2, metric=True)

    with pytest.raises(ValueError, match="metric=True belongs to one call of evaluate in a script"):
        train(MPI.COMM_SELF, model := new_model(), sgd(model), body=body)


def test_a_scheduler_that_goes_by_no_metric_is_refused():
    model = new_model()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match="metric_scheduler is stepped by a metric.*give it as scheduler="):
        train(MPI.COMM_SELF, model, optimizer, metric_scheduler=StepLR(optimizer, 1))
    plateau = ReduceLROnPlateau(optimizer)
    with pytest.raises(ValueError, match="is given twice"):
        train(MPI.COMM_SELF, model, optimizer, scheduler=plateau, metric_scheduler=plateau)


@pytest.mark.parallel(WORKERS + 1)
def test_a_run_without_a_metric_says_that_it_was_waited_for(comm, capfd):
    model = new_model()
    optimizer = sgd(model)
    _, session = train(comm, model, optimizer, metric_scheduler=ReduceLROnPlateau(optimizer))
    told = "metric_scheduler= was never stepped, since no metric came" in capfd.readouterr().err
    assert told == (session.worker is None)


def test_a_report_shows_the_metric(tmp_path):
    path = tmp_path / "record.jsonl"
    with RecordWriter(path) as writer:
        writer.header(RunHeader("backup:0", 1, 0, 0.0, "1", ["a"]))
        for number in range(6):
            told = [(number, 0.5 + number / 10)] if number % 2 else None
            accepted = [(0, number, number)]
            writer.step(StepRecord(number, number, number + 0.5, number + 1.0, 1, 1, accepted, [], metrics=told))
        writer.end(RunEnd(6, "", [], [6], [6], [0], [0], metrics=[(6, 0.9), (6, math.nan)]))
    told = read_run(path)
    assert told.metrics["version"].tolist() == [1, 3, 5, 6]
    text = page([told])
    assert "The metric went from 0.6 to 0.9 in 4 evaluations." in text
    assert "Metric: By time" in text and "Metric, last" in text


def test_a_metric_of_a_version_that_is_not_made_yet_is_refused():
    checker = StepChecker(1)
    with pytest.raises(ValueError, match="a metric's version must be from 0 to its step, 0, but here is 1"):
        checker.check(StepRecord(0, 0.0, 0.5, 0.6, 1, 1, [(0, 0, 0)], [], metrics=[(1, 0.5)]))
