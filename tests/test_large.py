"""What is larger than MPI's 32 bits can count, or than a block: no call's count comes near, and every byte arrives."""

import ast
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import ROOT, run_script
from torch import nn

import mpisync
from mpisync.device.host import aligned_bytes
from mpisync.model.frozen import in_blocks
from mpisync.transport import collectives
from mpisync.transport.layout import BLOCK_BYTES, Layout

GIB = 1 << 30
# Whoever adds a call to one of these, or to another module, sees to it that its count is bounded, as the tests here do.
CALLERS = {
    "commands/benching/collective.py", "commands/benching/contenders.py", "transport/collectives.py",
    "transport/fetching.py", "transport/headers.py", "transport/messages.py", "transport/rendezvous.py",
    "transport/replies.py", "transport/shared.py",
}  # fmt: skip
CALLS = {
    "Send", "Isend", "Ssend", "Recv", "Irecv", "Send_init", "Recv_init", "Mrecv", "Bcast", "Ibcast", "Reduce",
    "Ireduce", "Allreduce", "Iallreduce", "Gather", "Gatherv", "Allgather", "Iallgather", "Allgatherv", "Iallgatherv",
    "Scatter", "Scatterv", "Alltoall", "Put", "Get",
}  # fmt: skip


def test_a_block_of_a_layout_beyond_2_gib_is_small_and_blocks_cover_it_all():
    layout = Layout.of([("float64", GIB // 4), ("float32", 5 * GIB // 4), ("bfloat16", 3)], 3 * GIB + 5)
    assert layout.size_bytes > 10 * GIB
    assert max(map(layout.block_bytes, layout.blocks)) <= BLOCK_BYTES < 1 << 31
    for index, count in enumerate([*(segment.count for segment in layout.segments), layout.extras_bytes]):
        own = [b for b in layout.blocks if b.segment == (index if index < 3 else -1)]
        assert own[0].start == 0 and own[-1].stop == count
        assert all(one.stop == other.start for one, other in itertools.pairwise(own))


def test_every_call_of_mpi_that_moves_a_buffer_is_where_its_count_is_looked_after():
    found = set()
    for path in (ROOT / "mpisync").rglob("*.py"):
        calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        if any(isinstance(func, ast.Attribute) and func.attr in CALLS for func in calls):
            found.add(str(path.relative_to(ROOT / "mpisync")))
    assert found == CALLERS


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parallel(3)
@pytest.mark.parametrize("most", [1, 7, 10, 1 << 30])
def test_texts_longer_than_a_call_may_carry_arrive_whole(comm, monkeypatch, most):
    monkeypatch.setattr(collectives, "MOST_BYTES", most)
    texts = ["", "ä" * 11, "short"]
    assert collectives.exchange(comm, texts[comm.rank], "a word") == texts


# -- frozen parameters -----------------------------------------------------------------------------


def frozen_tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(3, 700, generator=generator)
    return [
        torch.randn((), generator=generator),
        torch.zeros(0, 4),
        torch.randn(1000, generator=generator),
        torch.randn(5, 7, 11, generator=generator).to(torch.bfloat16),
        wide.t(),
        torch.randn(2, 8, 6, 6, generator=generator).to(memory_format=torch.channels_last).double(),
        wide[:, ::2],
        torch.arange(300) * seed,
        torch.randn(33, generator=generator) > 0,
        torch.randn(70, generator=generator).to(torch.complex128),
    ]


@pytest.mark.parametrize("size", [64, 128, 1024, 1 << 20])
def test_frozen_tensors_go_through_a_block_of_any_size(size):
    ours, theirs = frozen_tensors(1), frozen_tensors(2)
    sent, got = aligned_bytes(size), aligned_bytes(size)
    sends, takes = in_blocks(ours, sent, takes=False), in_blocks(theirs, got, takes=True)
    for block, target in itertools.zip_longest(sends, takes):
        assert 0 < len(block) == len(target) <= size
        target[:] = block
    for one, other, before in zip(ours, theirs, frozen_tensors(1), strict=True):
        assert torch.equal(one, before) and torch.equal(one, other)


class Adapter(nn.Module):
    """A frozen part of several blocks, strided in another way on each rank, and a small trained one."""

    def __init__(self, rank):
        super().__init__()
        base = torch.full((1200, 1900), float(rank))
        self.base = nn.Parameter(base if rank % 2 else base.t().contiguous().t(), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(float(rank)), requires_grad=False)
        self.head = nn.Linear(4, 1)


@pytest.mark.parallel(3)
def test_the_roots_frozen_parameters_are_everyones(comm):
    model = Adapter(comm.rank)
    assert model.base.nbytes > 2 * BLOCK_BYTES
    with mpisync.Session(comm, model, torch.optim.SGD(model.head.parameters(), lr=0.1), progress=False) as session:
        assert model.base.unique().tolist() == [2.0] and model.scale == 2.0
        for _ in session.batches([0, 1], steps=0):
            pass


# -- buffers ---------------------------------------------------------------------------------------


class Statistics(nn.Module):
    """Buffers of more than a block, whose ends tell what was seen."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.register_buffer("small", torch.zeros(3))
        self.register_buffer("seen", torch.zeros(BLOCK_BYTES // 4 + 1000))

    def forward(self, x):
        self.seen[-1000:] += x.mean()
        self.seen[:10] -= x.mean()
        self.small += 1
        return self.layer(x)


@pytest.mark.parallel(3)
@pytest.mark.parametrize("transport", ["shared", "messages"])
def test_buffers_larger_than_a_block_are_averaged_whole(comm, monkeypatch, transport):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    model = Statistics()
    with mpisync.Session(comm, model, torch.optim.SGD(model.parameters(), lr=0.1), progress=False) as session:
        for x in session.batches([torch.full((2, 1), value) for value in (1.0, 3.0)], steps=3):
            loss = model(x).mean()
            loss.backward()
            session.step(loss)
    assert model.small.tolist() == [3.0] * 3
    assert (model.seen[-1000:] == 6.0).all() and (model.seen[:10] == -6.0).all()
    assert not model.seen[10:-1000].any()


# -- in earnest ------------------------------------------------------------------------------------

BIG = """
import resource, sys
import torch
from torch import nn
from mpi4py import MPI
import mpisync

comm, GIB = MPI.COMM_WORLD, 1 << 30
trained = sys.argv[1] == "trained"
model = nn.Module()
count = int(2.1 * GIB) // 4
model.big = nn.Parameter(torch.full((count,), float(comm.rank)), requires_grad=trained)
model.small = nn.Parameter(torch.zeros(3))
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with mpisync.Session(comm, model, optimizer, progress=False) as session:
    if not trained:
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < 0.3 * GIB
    for _ in session.batches([0], steps=2):
        loss = model.small.sum() + (model.big.sum() if trained else 0)
        loss.backward()
        session.step(float("nan"))
smallest, largest = torch.aminmax(model.big)
assert smallest == largest == 1.0 - 2 * trained, (smallest, largest)
print("right", session.version, flush=True)
"""


def available_bytes():
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("which", "transport", "needs"), [("frozen", "auto", 6), ("trained", "shared", 13), ("trained", "messages", 19)]
)
def test_more_than_2_gib_in_one_parameter(which, transport, needs):
    if available_bytes() < needs * GIB:
        pytest.skip(f"needs {needs} GiB of free memory")
    run = run_script(2, BIG, args=[which], timeout_s=500, env={"MPISYNC_TRANSPORT": transport})
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("right 2") == 2


@pytest.mark.long
def test_kernels_count_beyond_32_bits():
    if available_bytes() < 7 * GIB:
        pytest.skip("needs 7 GiB of free memory")
    from mpisync.kernels.fold import Reducer

    source, target = np.zeros((1 << 31) + 70, np.uint8), np.ones((1 << 31) + 70, np.uint8)
    source[-70:] = np.arange(70)
    with Reducer(2) as reducer:
        reducer.copy(source, target)
    assert target[-70:].tolist() == list(range(70)) and not target[:-70].any()
