"""The numbers that a training script hands in: words where they cannot be meant, the same on a run of any size."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training import WORKERS, fails_everywhere, flat, new_model, sgd

import mpisync
from mpisync.session.arguments import number, whole

TEN = torch.ones(10)


@pytest.mark.parametrize("value", [2.5, 2.0, True, "10", None, np.ones(2), TEN, 1j, torch.tensor(2.5)], ids=repr)
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(TypeError, match="steps must be a whole number, not "):
        whole("steps", value, 0)


def test_whole_numbers_of_any_kind_are_taken_within_their_range():
    for value in (3, np.int64(3), np.uint8(3), torch.tensor(3)):
        assert type(whole("steps", value, 3)) is int and whole("steps", value, 3) == 3
    for value in (-1, 2**63):
        with pytest.raises(ValueError, match=rf"steps must be at least 0 and below 2\*\*63, not {value}"):
            whole("steps", value, 0)


NO_NUMBERS = ["0.5", b"0.5", True, 1j, torch.tensor(1j), np.complex64(1), np.ones(3), TEN, [1.0], object(), 10**400]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: repr(value)[:20])
def test_what_is_not_one_number_is_refused(value):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TypeError, match="loss must be one number, not "):
            number("loss", value)


def test_one_number_may_come_in_any_kind():
    for value in (2, 2.0, np.float32(2), np.array([[2.0]]), torch.tensor([2.0], requires_grad=True)):
        assert number("loss", value) == 2.0
    with pytest.raises(TypeError, match=r"not a Tensor of shape \[10\]; reduce it first, as loss.mean\(\) does"):
        number("loss", TEN)


WRONG_OPTIONS = [
    ({"seed": 1.5}, TypeError, "seed must be a whole number, not 1.5"),
    ({"seed": None}, TypeError, "seed must be a whole number, not None"),
    ({"ema": "0.9"}, TypeError, "ema must be one number, not '0.9'"),
    ({"ema": float("nan")}, ValueError, "ema must lie between 0 and 1"),
    ({"clip_norm": "1"}, TypeError, "clip_norm must be one number, not '1'"),
    ({"clip_norm": True}, TypeError, "clip_norm must be one number, not True"),
    ({"clip_norm": float("inf")}, ValueError, "clip_norm must be finite and greater than 0"),
    ({"own_copy": "no"}, TypeError, "own_copy must be True or False, not 'no'"),
    ({"record": 3}, TypeError, "record must be the name of a file, not 3"),
    ({"on_step": "print"}, TypeError, "on_step must be a function"),
]


@pytest.mark.parametrize(("options", "kind", "says"), WRONG_OPTIONS, ids=lambda value: str(value)[:30])
def test_options_of_a_session_are_checked_where_they_are_given(options, kind, says):
    from mpi4py import MPI

    with pytest.raises(kind, match=says):
        mpisync.Session(MPI.COMM_SELF, model := new_model(), sgd(model), **options)


DATA = [(torch.ones(size, 6).double() * (1 + 0.1 * number), torch.zeros(size).long()) for number, size in
        enumerate((1, 8, 2, 6, 3, 5))]  # fmt: skip


def loop(comm, *, steps=3, data=DATA, body=lambda session, loss: session.step(loss), **options):
    model = new_model()
    with mpisync.Session(
        comm, model, sgd(model), policy=mpisync.BackupWorkers(0), progress=False, **options
    ) as session:
        for batch in session.batches(data, steps=steps):
            x, y = batch["x"], batch["y"]
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            body(session, loss)
    return flat(model)


PAIRS = [{"x": x, "y": y} for x, y in DATA]
UNLIKE = [{**pair, "classes": torch.ones(7)} for pair in PAIRS]
WRONG_STEPS = [
    (lambda s, loss: s.step(TEN), TypeError, "loss must be one number, not a Tensor of shape [10]"),
    (lambda s, loss: s.step(loss + 0j), TypeError, "loss must be one number"),
    (lambda s, loss: s.step("0.5"), TypeError, "loss must be one number, not '0.5'"),
    (lambda s, loss: s.step(loss, samples=-3), ValueError, "samples must be at least 1"),
    (lambda s, loss: s.step(loss, samples=0), ValueError, "samples must be at least 1"),
    (lambda s, loss: s.step(loss, samples=2.5), TypeError, "samples must be a whole number, not 2.5"),
    (lambda s, loss: s.step(loss, samples=True), TypeError, "samples must be a whole number, not True"),
    (lambda s, loss: s.step(loss, cost="much"), TypeError, "cost must be one number, not 'much'"),
    (lambda s, loss: s.step(loss, cost=float("nan")), ValueError, "cost must be finite and greater than 0"),
    (lambda s, loss: s.evaluate(print, every=0), ValueError, "every must be at least 1"),
    (lambda s, loss: s.evaluate(print, every=2.5), TypeError, "every must be a whole number, not 2.5"),
]


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize(("body", "kind", "says"), WRONG_STEPS, ids=range(len(WRONG_STEPS)))
def test_what_a_step_cannot_take_ends_all_ranks(comm, body, kind, says):
    with fails_everywhere(comm, kind, says):
        loop(comm, data=PAIRS, body=body)


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("name", ["steps", "epochs"])
def test_the_extent_of_a_loop_is_a_whole_number(comm, name):
    for value in (2.5, True, "10"):
        with pytest.raises((TypeError, mpisync.PeerFailed), match=f"{name} must be a whole number, not {value!r}"):
            with mpisync.Session(comm, model := new_model(), sgd(model), progress=False, on_late="requeue") as session:
                next(session.batches(PAIRS, **{name: value}))


@pytest.mark.parallel(WORKERS + 1)
def test_losses_that_are_not_known_or_not_finite_and_numpy_options_change_nothing(comm, tmp_path):
    first = loop(comm, data=PAIRS, clip_norm=2.0, ema=0.5)
    path = comm.bcast(tmp_path / "record.jsonl")
    second = loop(
        comm,
        data=PAIRS,
        steps=np.int64(3),
        seed=np.int32(0),
        ema=np.float32(0.5),
        clip_norm=np.float64(2),
        record=path,
        body=lambda session, loss: session.step([None, np.nan, np.inf][session.version], cost=loss.detach()),
    )
    assert np.array_equal(first, second)


def weighted(steps=3):
    """Train one process on the union of what the workers draw: that weights each gradient by its samples."""
    model = new_model()
    optimizer = sgd(model)
    for step in range(steps):
        parts = [DATA[worker::WORKERS][step] for worker in range(WORKERS)]
        optimizer.zero_grad()
        F.cross_entropy(model(torch.cat([x for x, _ in parts])), torch.cat([y for _, y in parts])).backward()
        optimizer.step()
    return flat(model)


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", ["shared", "messages"])
def test_gradients_are_weighted_by_samples_that_are_counted_or_said(comm, monkeypatch, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    counted = loop(comm, data=[{"epoch": torch.tensor(3.0), **pair} for pair in PAIRS], weight="samples")
    sizes = iter([len(y) for _, y in DATA[comm.rank :: WORKERS]])
    said = loop(comm, data=UNLIKE, weight="samples", body=lambda s, loss: s.step(loss, samples=next(sizes)))
    for found in (counted, said):
        assert abs(found - weighted()).max() < 1e-9


@pytest.mark.parallel(WORKERS + 1)
def test_samples_that_are_not_certain_must_be_said_where_they_weigh_and_only_there(comm):
    with fails_everywhere(
        comm, ValueError, 'weight="samples" needs the number of samples, and the tensors of a batch diff'
    ):
        loop(comm, data=UNLIKE, weight="samples")
    assert np.array_equal(loop(comm, data=UNLIKE), loop(comm, data=PAIRS))
