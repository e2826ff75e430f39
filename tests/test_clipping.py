"""Clipping the mean gradient at the root, and what a loop's own clipping is told."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mpi4py import MPI
from torch import nn
from torch.nn.utils import clip_grad, clip_grad_norm_, clip_grad_value_
from training import DATA, WORKERS, flat, loader, new_model, on_all, train

import mpisync
from mpisync.aggregation.closed_step import ClosedStep
from mpisync.model.clipping import ClipWatch

BATCHES = [(DATA.tensors[0][at : at + 8], DATA.tensors[1][at : at + 8]) for at in range(0, 64, 8)]
LIMITS = [{"clip_value": 0.01}, {"clip_value": 0.01, "clip_norm": 0.02}]


def plain(model):
    return torch.optim.SGD(model.parameters(), lr=0.5)


def in_one_process(workers, clip_value=None, clip_norm=None):
    model = new_model()
    optimizer = plain(model)
    for step in range(4):
        optimizer.zero_grad()
        for worker in range(workers):
            x, y = BATCHES[worker::workers][step % (8 // workers)]
            (F.cross_entropy(model(x), y) / workers).backward()
        if clip_value is not None:
            clip_grad_value_(model.parameters(), clip_value)
        if clip_norm is not None:
            clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
    return flat(model)


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("limits", LIMITS)
def test_the_means_elements_are_clipped_at_the_root_before_its_norm(comm, monkeypatch, limits):
    fused, original = [], ClosedStep.fused_sgd_step
    monkeypatch.setattr(ClosedStep, "fused_sgd_step", lambda *a: fused.append(0) or original(*a))
    model = new_model()
    train(comm, model, plain(model), steps=4, data=BATCHES, policy=mpisync.BackupWorkers(0), **limits)
    assert np.array_equal(flat(model), in_one_process(WORKERS, **limits)) and not fused
    assert not np.allclose(flat(model), in_one_process(WORKERS)), "the limits bind"


@pytest.mark.parametrize("limits", LIMITS)
def test_alone_they_are_clipped_too(limits):
    model = new_model()
    train(MPI.COMM_SELF, model, plain(model), steps=4, data=BATCHES, **limits)
    assert np.array_equal(flat(model), in_one_process(1, **limits))


@pytest.mark.parallel(WORKERS + 1)
def test_a_replay_needs_the_same_limit(comm, tmp_path):
    path = comm.bcast(str(tmp_path / "run.jsonl"))
    model = new_model()
    train(comm, model, plain(model), steps=3, clip_value=0.01, record=path)
    with pytest.raises(ValueError, match=r"made with clip_value=0.01 and this session has clip_value=None"):
        train(comm, model, plain(model), policy=mpisync.Replay(path))


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["clip_norm", "clip_value"])
def test_a_limit_is_finite_and_positive(name, value):
    model = new_model()
    with pytest.raises(ValueError, match=f"{name} must be finite and greater than 0, not"):
        mpisync.Session(MPI.COMM_SELF, model, plain(model), **{name: value})
    with pytest.raises(TypeError, match=f"{name} must be one number"):
        mpisync.Session(MPI.COMM_SELF, model, plain(model), **{name: "1"})


# -- in the loop ------------------------------------------------------------------------------------

LOCAL = {
    "norm": lambda p: nn.utils.clip_grad_norm_(p, 1.5),
    "norm, imported before": lambda p: clip_grad_norm_(p, 1.5),
    "norm, one by one": lambda p: clip_grad_norm_(p, max_norm=1.5, foreach=False),
    "value": lambda p: nn.utils.clip_grad_value_(p, clip_value=1.5),
    "value, imported before": lambda p: clip_grad_value_(p, 1.5),
}


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("what", LOCAL)
def test_clipping_in_the_loop_is_told_once_by_the_first_worker(comm, capfd, what):
    model, own = new_model(), clip_grad._group_tensors_by_device_and_dtype
    train(comm, model, plain(model), steps=4, body=lambda session, x: LOCAL[what](model.parameters()))
    kind = what.partition(",")[0]
    said = f"mpisync: clip_grad_{kind}_ in the loop clips each worker's own gradient, before the mean is taken"
    texts = on_all(comm, capfd.readouterr().err)
    assert [text.count(said) for text in texts] == [1] + [0] * WORKERS
    assert f"Session(..., clip_{kind}=1.5)" in texts[0]
    assert clip_grad._group_tensors_by_device_and_dtype is own, "torch's own again"


@pytest.mark.parallel(WORKERS + 1)
def test_measuring_a_norm_and_clipping_others_is_not_told(comm, capfd):
    model, other = new_model(), new_model(seed=7)

    def body(session, x):
        clip_grad_norm_(model.parameters(), float("inf"))
        if hasattr(nn.utils, "get_total_norm"):
            nn.utils.get_total_norm([p.grad for p in model.parameters()])
        other(x).sum().backward()
        clip_grad_norm_(other.parameters(), 0.1)

    train(comm, model, plain(model), steps=4, body=body, clip_norm=0.1, clip_value=0.1)
    assert all("clips each worker's own" not in text for text in on_all(comm, capfd.readouterr().err))


def test_alone_the_loops_own_gradient_is_the_mean(capfd):
    model = new_model()
    train(MPI.COMM_SELF, model, plain(model), steps=2, body=lambda s, x: clip_grad_norm_(model.parameters(), 0.1))
    assert "clips each worker's own" not in capfd.readouterr().err


def test_what_clips_may_be_compiled_as_a_whole_meanwhile():
    model = new_model()
    watch = ClipWatch(model.parameters())
    F.cross_entropy(model(BATCHES[0][0]), BATCHES[0][1]).backward()
    norm = torch.compile(lambda: clip_grad_norm_(model.parameters(), 1e-3), backend="eager", fullgraph=True)()
    watch.undo()
    assert norm > 1e-3 and nn.utils.clip_grad_norm_(model.parameters(), 1.0) == pytest.approx(1e-3, rel=1e-2)


def test_watches_come_and_go_in_any_order_and_a_torch_without_the_function_tells_nothing(monkeypatch, capfd):
    own = clip_grad._group_tensors_by_device_and_dtype
    model = new_model()
    first, second = ClipWatch(model.parameters()), ClipWatch(new_model().parameters())
    x, y = next(iter(loader()))
    F.cross_entropy(model(x), y).backward()
    first.undo()
    clip_grad_norm_(model.parameters(), 1.0)
    assert "clips" not in capfd.readouterr().err
    second.undo()
    second.undo()
    assert clip_grad._group_tensors_by_device_and_dtype is own
    monkeypatch.delattr(clip_grad, "_group_tensors_by_device_and_dtype")
    ClipWatch(model.parameters()).undo()
    assert not hasattr(clip_grad, "_group_tensors_by_device_and_dtype")
