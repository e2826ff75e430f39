"""MPISYNC_READ_ONLY: a write to shared parameters, however it is made, is stopped at its line and explained."""

import subprocess
import sys

import pytest
from launch import environment, run_script

SCRIPT = """
import sys
import torch
from mpi4py import MPI
import mpisync

def spoil(model):
    {write}  # here

model = torch.nn.Linear(6, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
data = [torch.randn(4, 6) for _ in range(8)]
with mpisync.Session(MPI.COMM_WORLD, model, optimizer, progress=False) as session:
    for x in session.batches(data, steps=20):
        loss = model(x).square().mean()
        loss.backward()
        if session.version == 3 and session.worker == 1:
            spoil(model)
        session.step(loss)
"""
LINE = 1 + SCRIPT.splitlines().index("    {write}  # here")


@pytest.mark.parametrize("write", ["model.bias.data.clamp_(-0.1, 0.1)", "model.weight.detach().numpy()[0, 0] = 7.0"])
def test_a_write_that_torch_does_not_count_is_stopped_at_its_line_and_explained(write):
    run = run_script(3, SCRIPT.format(write=write), timeout_s=90.0, env={"MPISYNC_READ_ONLY": "1"})
    assert run.returncode != 0 and not run.timed_out and run.left == ()
    for said in ("mpisync: worker 1 wrote to a parameter", "register_step_post_hook", f"line {LINE} in spoil"):
        assert said in run.stderr, run.stderr


MEMORY = """
import ctypes, mmap, sys
import numpy as np
from mpisync.model.write_fault import FaultNotice
pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
memory = np.frombuffer(pages, np.uint8)
ctypes.CDLL(None).mprotect(ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(memory.nbytes), mmap.PROT_READ)
notice = FaultNotice(memory, "written to what is read-only")
{then}
"""


@pytest.mark.parametrize(
    ("then", "is_explained"),
    [
        ("memory[5000] = 1", True),
        ("ctypes.memset(8, 0, 1)", False),
        ("notice.undo(); memory[5000] = 1", False),
    ],
)
def test_other_faults_end_the_process_as_ever(then, is_explained):
    command = [sys.executable, "-c", MEMORY.format(then=then)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())
    assert run.returncode < 0
    assert ("written to what is read-only" in run.stderr) == is_explained
    assert "Fatal Python error: Segmentation fault" in run.stderr and "line 9 in <module>" in run.stderr
