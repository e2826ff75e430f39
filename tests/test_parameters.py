"""Whose the parameters and module buffers are while a session trains, and who may write to them."""

import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training import WORKERS, fails_everywhere, flat, loader, new_model, on_all, sgd, train

import mpisync


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
@pytest.mark.parametrize("own_copy", [False, True])
def test_a_checkpoint_that_is_loaded_inside_the_with_is_an_error_before_the_first_step(comm, own_copy):
    model, checkpoint = new_model(), new_model(seed=1).state_dict()
    with fails_everywhere(comm, RuntimeError, "'0.weight' was written to in place on a worker", "before Session"):
        with mpisync.Session(comm, model, sgd(model), own_copy=own_copy, progress=False) as session:
            model.load_state_dict(checkpoint)
            for _ in session.batches(loader(), steps=3):
                raise AssertionError("no batch may be drawn")


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("own_copy", [False, True])
def test_after_a_late_verdict_the_module_buffers_are_the_published_ones(comm, own_copy):
    """Worker 1 makes every version; whatever worker 0 has of a version must be the same bits."""
    model, mine = new_model(norm=True), {}
    settings = {"policy": mpisync.BackupWorkers(1), "own_copy": own_copy, "progress": False}
    with mpisync.Session(comm, model, sgd(model), **settings) as session:
        for x, y in session.batches(loader(), steps=25):
            while session.worker == 0 and not session.stale():
                time.sleep(0.001)
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            accepted = session.step(loss).accepted
            assert accepted == (session.worker == 1)
            mine[session.version] = model[1].running_mean.clone().numpy()
    first, second = on_all(comm, mine)[:WORKERS]
    assert len(second) == 25 and first
    assert all(np.array_equal(mean, second[version]) for version, mean in first.items())


@pytest.mark.parallel(WORKERS + 1)
def test_a_snapshot_has_the_newest_parameters_whatever_its_worker_computes_on(comm):
    model, mine, found = new_model(norm=True), {}, []
    settings = {"policy": mpisync.BackupWorkers(1), "own_copy": True, "ema": 0.9, "progress": False}
    with mpisync.Session(comm, model, sgd(model), **settings) as session:
        for x, y in session.batches(loader(), steps=25):
            if session.worker == 0:
                while not session.stale():
                    time.sleep(0.001)
                state, average = session.state_dict(), session.snapshot(average=True)
                assert state["version"] > session.version and "optimizer" not in state
                found.append((state["version"], state["model"]["0.weight"].numpy(), average[0].weight.detach().numpy()))
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            session.step(loss)
            mine[session.version] = model[0].weight.detach().clone().numpy()
    versions = on_all(comm, mine)[1]
    for version, weight, average in found:
        newer = [number for number, other in versions.items() if np.array_equal(weight, other)]
        assert newer == [version], "it names the version that it holds"
        assert not any(np.array_equal(average, other) for other in versions.values())
    assert bool(found) == (comm.rank == 0)
