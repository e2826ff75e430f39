"""Find the minimum of a quadratic with two gradients of three a step: mpisync run -n 4 partial_reduce.py."""

import numpy as np
from mpi4py import MPI

import mpisync

goal = np.array([1.0, 2.0, 3.0])
theta = np.zeros_like(goal)

policy = mpisync.BackupWorkers(1)
with mpisync.PartialReduce(MPI.COMM_WORLD, like=theta, policy=policy) as reduction:
    if reduction.is_root:
        for step in reduction.serve(steps=1000):
            theta -= 0.5 * step.mean
            step.publish(theta)
            if abs(step.mean).max() < 1e-12:
                reduction.stop()
    else:
        while reduction.pull(theta):  # the newest version
            gradient = theta - goal
            if not reduction.stale():  # it would be late, and goes unsent
                verdict = reduction.push(gradient)

print(reduction.parameters)  # the final ones, on every rank
