"""A launcher of another MPI: every rank believes to be 0 of 1, and must not train alone as if nothing were wrong."""

import subprocess
import sys

import pytest
from launch import environment, launcher

SESSION = """
import torch
import mpisync
from mpi4py import MPI
model = torch.nn.Linear(2, 1)
with mpisync.Session(MPI.COMM_WORLD, model, torch.optim.SGD(model.parameters(), lr=0.1)) as session:
    print("trains alone")
"""
ARRAYS = """
import numpy as np
import mpisync
from mpi4py import MPI
mpisync.PartialReduce(MPI.COMM_WORLD, like=np.zeros(3))
"""
# What the other family's launcher would have set, had it started five ranks.
OTHERS = {
    "openmpi": ({"PMI_RANK": "3", "PMI_SIZE": "5"}, "an MPICH launcher"),
    "mpich": ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "5"}, "Open MPI's mpirun"),
}


def python(code, env):
    return subprocess.run(
        [sys.executable, "-c", code], env={**environment(), **env}, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("code", [SESSION, ARRAYS], ids=["Session", "PartialReduce"])
def test_it_is_said_and_the_launcher_that_fits_is_named(code):
    env, name = OTHERS[launcher()[1].family]
    run = python(code, env)
    assert run.returncode != 0 and "trains alone" not in run.stdout
    error = run.stderr.splitlines()[-1]
    assert error.startswith(f"RuntimeError: {name}") and "started 5 ranks, but this one is rank 0 of 1" in error
    assert "mpisync run -n 5" in error
