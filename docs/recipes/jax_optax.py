"""Train a model of JAX with optax at the root: mpisync run -n 3 jax_optax.py."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from mpi4py import MPI
from sklearn.datasets import load_digits

import mpisync

BATCH, STEPS = 16, 200

digits = load_digits()
images, labels = (digits.images.reshape(-1, 64) / 16).astype(np.float32), digits.target


def batches(worker, workers):
    """Yield the rows of this worker's batches: every epoch deals all samples, each to one worker."""
    for epoch in itertools.count():
        share = np.random.default_rng(epoch).permutation(1500)[worker::workers]
        for start in range(0, len(share) - BATCH + 1, BATCH):
            yield share[start : start + BATCH]


def scores(params, x):
    """Return a score for each of ten digits."""
    return jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"]) @ params["out"]["w"] + params["out"]["b"]


keys = jax.random.split(jax.random.key(0), 2)
params = {
    "hidden": {"w": jax.random.normal(keys[0], (64, 32)) / 8, "b": jnp.zeros(32)},
    "out": {"w": jax.random.normal(keys[1], (32, 10)) / 6, "b": jnp.zeros(10)},
}
flat, unravel = ravel_pytree(params)  # one array, which travels, and the way back
optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, STEPS))


@jax.jit
@jax.value_and_grad
def loss_and_gradient(flat, x, y):
    """Return the mean loss of a batch, and its gradient as one array."""
    return optax.softmax_cross_entropy_with_integer_labels(scores(unravel(flat), x), y).mean()


@jax.jit
def update(flat, state, mean):
    """Return the next parameters and state of the optimizer."""
    changes, state = optimizer.update(mean, state, flat)
    return optax.apply_updates(flat, changes), state


with mpisync.PartialReduce(MPI.COMM_WORLD, like=flat, parameters=flat, policy=mpisync.BackupWorkers(0)) as reduction:
    if reduction.is_root:
        state = optimizer.init(flat)
        for step in reduction.serve(steps=STEPS):
            # jnp.array copies: the next step takes step.mean's memory, into which JAX might go on looking.
            flat, state = update(flat, state, jnp.array(step.mean))
            step.publish(flat)
    else:
        theta = np.array(flat)  # in which versions arrive: JAX's own arrays cannot be written to
        for rows in batches(MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size - 1):
            if not reduction.pull(theta):
                break
            loss, gradient = loss_and_gradient(jnp.array(theta), images[rows], labels[rows])
            reduction.push(gradient, samples=len(rows), loss=float(loss))

if reduction.is_root:
    params = unravel(jnp.array(reduction.parameters))
    right = (scores(params, images[1500:]).argmax(1) == labels[1500:]).mean()
    print(f"{STEPS} steps, accuracy {right:.2f}")
