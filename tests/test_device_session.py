"""Sessions whose gradients stay on a device, on a stand-in for it: the protocol is the same, only memory differs."""

import numpy as np
import pytest
import torch.nn.functional as F
from stand_in import StandIn
from training import DATA, WORKERS, flat, new_model, on_union, sgd, train

from mpisync.session import distributed_model

BATCHES = [DATA[8 * number : 8 * number + 8] for number in range(8)]
WHERE = pytest.mark.parametrize("root_device", ["device", "host"])


def loss_of(model, x, y):
    return F.cross_entropy(model(x), y)


@pytest.fixture
def device(monkeypatch):
    """Have every model be on a stand-in device, of its own in each process; return it."""
    memory = StandIn()
    monkeypatch.setattr(distributed_model, "memory_of", lambda model: memory)
    return memory


@pytest.mark.parallel(WORKERS + 1)
@WHERE
@pytest.mark.parametrize("transport", ["shared", "messages"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_training_equals_one_process(comm, monkeypatch, device, root_device, transport, momentum):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    monkeypatch.setenv("MPISYNC_DEVICE", "auto" if root_device == "device" else "cpu")
    model, own = new_model(norm=False), new_model(norm=False)
    verdicts, session = train(comm, model, sgd(model, momentum=momentum), 6, BATCHES)
    optimizer = sgd(own, momentum=momentum)
    on_union(own, optimizer, BATCHES, loss_of)
    assert all(verdict.accepted for verdict in verdicts)
    assert np.abs(flat(model) - flat(own)).max() < 1e-6
    names = comm.gather(session.worker is None and device.counts["fold"] + device.counts["fused_sgd_step"])
    folds = (names or [0])[-1]
    if comm.rank == 0:
        assert bool(folds) == (root_device == "device" and transport == "shared"), folds
