"""Find the minimum of a quadratic with two gradients of three a step: mpisync run -n 4 partial_reduce.py."""

import numpy as np
from mpi4py import MPI

import mpisync

goal = np.array([1.0, 2.0, 3.0])
theta = np.zeros_like(goal)

with mpisync.PartialReduce(MPI.COMM_WORLD, like=theta, policy=mpisync.BackupWorkers(1)) as reduction:
    if reduction.is_root:
        for step in reduction.serve(steps=50):
            theta -= 0.5 * step.mean
            step.publish(theta)
    else:
        while reduction.pull(theta):  # the newest version
            verdict = reduction.push(theta - goal)

print(reduction.parameters)  # the final ones, on every rank
