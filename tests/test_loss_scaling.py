"""A GradScaler in the loop: its gradients are exact once unscaled, and never sent scaled."""

import time

import pytest
import torch
import torch.nn.functional as F
from torch.amp import GradScaler
from training import WORKERS, fails_everywhere, flat, new_model, on_all, sgd

import mpisync
from mpisync.model.guards import StepTrap
from mpisync.model.loss_scaling import ScaleWatch, refuse_scaled

SCALE = 2.0**16
ADVICE = "write scaler.unscale_(optimizer); session.step(loss); scaler.update()"


class Own(GradScaler):
    """A scaler of a framework's, which derives from torch's."""

    def scale(self, outputs):
        return super().scale(outputs)


def batches(count=12):
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(4, 6, generator=generator).double(), torch.randint(0, 3, (4,), generator=generator))
        for _ in range(count)
    ]


def clip(model):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)


def reference(steps, clipped=False, skipped=()):
    """Train one process on what `WORKERS` workers draw, each gradient by itself, but for the skipped (step, worker)."""
    model = new_model()
    optimizer, data = sgd(model), batches()
    for step in range(steps):
        gradients = []
        for worker in range(WORKERS):
            x, y = data[worker::WORKERS][step + skipped.count((step, worker))]
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if clipped:
                clip(model)
            gradients.append([p.grad.clone() for p in model.parameters()])
        for p, *grads in zip(model.parameters(), *gradients, strict=True):
            p.grad = sum(grads) / WORKERS
        optimizer.step()
    return flat(model)


def train(comm, body, *, steps=4, scaler=None, **more):
    """Run a loop whose body has the scaler; whoever's it is."""
    model = new_model()
    optimizer = sgd(model)
    scaler = GradScaler("cpu", init_scale=SCALE) if scaler is None else scaler
    with mpisync.Session(comm, model, optimizer, policy=mpisync.BackupWorkers(0), progress=False, **more) as session:
        for x, y in session.batches(batches(), steps=steps):
            body(session, scaler, optimizer, model, F.cross_entropy(model(x), y))
    return flat(model), scaler


def unscaled(session, scaler, optimizer, model, loss):
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert session.step(loss).accepted
    scaler.update()


def clipped(session, scaler, optimizer, model, loss):
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    clip(model)
    session.step(loss)
    scaler.update()


def updated_first(session, scaler, optimizer, model, loss):
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.update()
    session.step(loss)


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", ["shared", "messages"])
@pytest.mark.parametrize("body", [unscaled, clipped, updated_first])
@pytest.mark.parametrize("kind", [GradScaler, Own])
def test_unscaled_gradients_train_as_one_process_on_the_union(comm, monkeypatch, transport, body, kind):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    found, _ = train(comm, body, scaler=kind("cpu", init_scale=SCALE))
    assert abs(found - reference(4, clipped=body is clipped)).max() < 1e-9
    assert "scale" not in vars(StepTrap) and GradScaler.scale.__name__ == "scale"
    assert not hasattr(GradScaler.scale, "__wrapped__"), "torch's own again"


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", ["shared", "messages"])
def test_an_overflow_in_one_worker_is_rejected_there_and_its_scale_shrinks(comm, monkeypatch, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    verdicts = []

    def body(session, scaler, optimizer, model, loss):
        scaler.scale(loss).backward()
        if session.worker == 0 and len(verdicts) == 1:
            model[0].weight.grad[0, 0] = torch.inf
        scaler.unscale_(optimizer)
        verdicts.append(session.step(loss))
        scaler.update()

    found, scaler = train(comm, body)
    said = on_all(comm, [(verdict.accepted, verdict.reason) for verdict in verdicts])
    accepted, rejected = (True, ""), (False, "the gradient has NaN or Inf")
    assert said == [[accepted, rejected, accepted, accepted, accepted], [accepted] * 4, []]
    assert on_all(comm, scaler.get_scale()) == [SCALE / 2, SCALE, SCALE]
    late = [(step, 0) for step in range(1, 4)]  # what worker 0 computes of: its batches move on by one
    assert abs(found - reference(4, skipped=late)).max() < 1e-9


def stepped(session, scaler, optimizer, model, loss):
    scaler.scale(loss).backward()
    scaler.step(optimizer)


def forgotten(session, scaler, optimizer, model, loss):
    scaler.scale(loss).backward()
    session.step(loss)


def listed(session, scaler, optimizer, model, loss):
    part, other = scaler.scale(one for one in (loss / 2, loss / 2))
    (part + other).backward()
    session.step(loss)


def accumulated_behind(session, scaler, optimizer, model, loss):
    scaler.scale(loss).backward(retain_graph=True)
    scaler.unscale_(optimizer)
    scaler.scale(loss).backward()
    session.step(loss)


def wrong_loss(session, scaler, optimizer, model, loss):
    loss = scaler.scale(loss)
    loss.backward()
    scaler.unscale_(optimizer)
    session.step(loss)


WRONG = {
    stepped: (RuntimeError, f"scaler.step() on a worker: {ADVICE}"),
    forgotten: (RuntimeError, f"the gradient is still scaled: {ADVICE}"),
    listed: (RuntimeError, f"the gradient is still scaled: {ADVICE}"),
    accumulated_behind: (RuntimeError, f"the gradient is still scaled: {ADVICE}"),
    wrong_loss: (ValueError, "the loss is scaled, and records would show that: pass what scaler.scale was given"),
}


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("body", WRONG)
@pytest.mark.parametrize("kind", [GradScaler, Own])
def test_a_loop_that_would_send_scaled_gradients_is_told_what_to_write(comm, body, kind):
    began_s = time.monotonic()
    error, says = WRONG[body]
    with fails_everywhere(comm, error, says):
        train(comm, body, scaler=kind("cpu", init_scale=SCALE))
    assert time.monotonic() - began_s < 10.0
    assert not hasattr(GradScaler.scale, "__wrapped__"), "torch's own again"


@pytest.mark.parametrize("body", WRONG)
def test_a_process_that_trains_alone_is_told_the_same(body):
    from mpi4py import MPI

    error, says = WRONG[body]
    with pytest.raises(error) as caught:
        train(MPI.COMM_SELF, body)
    assert says.split(":")[0] in str(caught.value)


@pytest.mark.parallel(WORKERS + 1)
def test_a_scaler_that_is_switched_off_changes_nothing(comm):
    off = GradScaler("cpu", enabled=False)
    found, _ = train(comm, forgotten, scaler=off)
    assert abs(found - reference(4)).max() < 1e-9
    with fails_everywhere(comm, RuntimeError, "optimizer.step() was called on a worker", "delete this line"):
        train(comm, stepped, scaler=off)


@pytest.mark.parallel(WORKERS + 1)
def test_another_model_may_have_a_scaler_of_its_own(comm):
    other = new_model(seed=7)
    optimizer_of_other = sgd(other)

    def body(session, scaler, optimizer, model, loss):
        scaler.scale(other(torch.ones(2, 6).double()).sum()).backward()
        scaler.step(optimizer_of_other)
        scaler.update()
        loss.backward()
        session.step(loss)

    found, _ = train(comm, body)
    assert abs(found - reference(4)).max() < 1e-9


def test_unscaling_twice_is_torchs_own_error_and_watches_come_and_go_in_any_order():
    own = GradScaler.scale
    model = new_model()
    optimizer, scaler = sgd(model), GradScaler("cpu")
    first, second = ScaleWatch(optimizer), ScaleWatch(sgd(new_model()))
    scaled = scaler.scale(model(torch.ones(1, 6).double()).sum())
    scaled.backward()
    second.check()
    with pytest.raises(RuntimeError, match="still scaled"):
        first.check()
    with pytest.raises(ValueError, match="the loss is scaled"):
        refuse_scaled(scaled)
    scaler.unscale_(optimizer)
    first.check()
    with pytest.raises(RuntimeError, match="already been called on this optimizer"):
        scaler.unscale_(optimizer)
    first.undo()
    assert GradScaler.scale is not own
    first.undo()
    second.undo()
    assert GradScaler.scale is own
