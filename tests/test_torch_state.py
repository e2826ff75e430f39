"""Torch's global state, whatever a script has made of it, changes no result of a session."""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import WORKERS

import mpisync
from mpisync.device.host import HostMemory
from mpisync.model.update import Update, _matches_torch_rounding

STEPS = 4


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


STATES = {
    "nothing": contextlib.nullcontext,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "grad off": lambda: torch.set_grad_enabled(False),
    "deterministic": deterministic,
    "two threads": two_threads,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True, check_nan=True),
}


def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).float()
    model[3].bias.requires_grad_(False)
    return model


def data():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 6, generator=generator), torch.arange(32) % 3
    return torch.utils.data.TensorDataset(x, y)


def loss_of(model, x, y, *, backward=False):
    """What is the script's own is as it should be: only ours meets the state."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        loss = F.cross_entropy(model(x), y)
        if backward:
            loss.backward()
        return loss.item()


def trained(comm, model, optimizer, state, batches, **more):
    """Train a little within a state of torch, looking at everything; what there was to see."""
    seen, found = [], []
    with STATES[state]():
        with mpisync.Session(comm, model, optimizer, progress=False, ema=0.5, **more) as session:
            for x, y in session.batches(batches, steps=STEPS):
                session.step(loss_of(model, x, y, backward=True))
                if session.worker == 0 and session.version == 2:
                    twin = session.snapshot(average=True)
                    found.append(session.evaluate(lambda one, x=x, y=y: loss_of(one.eval(), x, y), every=1))
                    seen += [*session.state_dict()["model"].values(), *twin.parameters()]
        seen += [*session.average.values(), *model.state_dict().values(), *session.snapshot().parameters()]
    assert not any(tensor.is_inference() for tensor in (*seen, *model.parameters(), *model.buffers()))
    loss_of(model, torch.randn(4, 6), torch.arange(4) % 3, backward=True)  # it can be used outside
    return [*found, *(tensor.detach().numpy() for tensor in seen)]


@pytest.mark.parametrize("transport", ["shared", "messages"])
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9, "clip_norm": 0.1, "on_late": "carry"}], ids=["plain", "more"]
)
@pytest.mark.parallel(WORKERS + 1)
def test_nothing_that_a_script_sets_changes_a_session(comm, monkeypatch, transport, options):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    options = dict(options)
    momentum = options.pop("momentum", 0.0)
    results = {}
    for state in STATES:
        model = made()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=momentum)
        batches = list(torch.utils.data.DataLoader(data(), 8))
        results[state] = trained(comm, model, optimizer, state, batches, **options)
        assert model[0].weight.dtype is torch.float32 and model[0].weight.device.type == "cpu"
    for state, result in results.items():
        assert len(result) == len(results["nothing"]) > 10
        pairs = zip(result, results["nothing"], strict=True)
        assert all(np.array_equal(one, other) for one, other in pairs), state


@pytest.mark.parametrize("state", STATES)
def test_plain_sgd_is_fused_all_the_same(state):
    memory = HostMemory()
    fused = _matches_torch_rounding(memory)
    with STATES[state]():
        assert _matches_torch_rounding(memory) is fused


@pytest.mark.parametrize("state", STATES)
def test_samples_are_shared_out_as_ever(state):
    """Alone, with a DataLoader: torch's own iterator does not work on the meta device."""
    from mpisync.data.samplers import ShardSampler

    loader = torch.utils.data.DataLoader(data(), 8, shuffle=True)
    expected = list(ShardSampler(loader, 0, 2, 3))
    with STATES[state]():
        assert list(ShardSampler(loader, 0, 2, 3)) == expected


@pytest.mark.parametrize("state", STATES)
def test_alone_too(state):
    from mpi4py import MPI

    results = []
    for name in ("nothing", state):
        model = made()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        batches = list(torch.utils.data.DataLoader(data(), 8))
        results.append(trained(MPI.COMM_SELF, model, optimizer, name, batches))
    assert all(np.array_equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("state", ["float64", "bfloat16"])
def test_half_precision_is_summed_in_float32(state):
    """Casts of the mean are made in the parameters' dtype, not in the default one."""
    from mpisync.model.flat import FlatModel

    model = made().bfloat16()
    with STATES[state]():
        flat = FlatModel(model)
        mean = flat.views([torch.ones(count, dtype=torch.float32) for _, count in flat.segments])
        flat.assign_gradients(mean, b"\1" * len(flat.parameters))
    assert all(p.grad.dtype is torch.bfloat16 and (p.grad == 1).all() for p in flat.parameters)
    memory = HostMemory()
    assert Update(flat.parameters, [torch.optim.SGD(flat.parameters, lr=0.1)], memory=memory).spans(flat.places)
    for clips in ({"clip_norm": 1.0}, {"clip_value": 1.0}):
        update = Update(flat.parameters, [torch.optim.SGD(flat.parameters, lr=0.1)], memory=memory, **clips)
        assert update.spans(flat.places) == []
