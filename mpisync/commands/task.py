"""Any of mpisync's tasks, with backup workers: the training script of `mpisync demo --task` and of benchmarks.

mpisync run -n 5 task.py text                          four workers and the root
mpisync run -n 5 task.py mnist --data folder/          from local files
python task.py hyperplane                              one process, no workers
"""

# mypy: disable-error-code="no-untyped-call"
import argparse
import random
import time

import torch
from mpi4py import MPI

import mpisync
from mpisync.tasks.table import TASKS, make_task

parser = argparse.ArgumentParser(description="Train a task.")
parser.add_argument("task", choices=TASKS)
parser.add_argument("--data", help="the folder of the files of mnist and cifar10")
parser.add_argument("--steps", type=int, help="updates of the parameters")
parser.add_argument("--seed", type=int, default=0, help="of initial values, batches and spikes (default %(default)s)")
parser.add_argument("--on-late", default="discard", help="discard, retry, carry or requeue (default %(default)s)")
parser.add_argument("--delay", type=float, default=0.0, help="seconds that worker 0 sleeps a batch")
parser.add_argument("--spike", type=float, default=0.0, help="seconds that any worker sleeps at one batch in ten")
parser.add_argument("--every", type=int, default=0, help="evaluate once in so many versions, while the others train")
parser.add_argument("--record", help="a file for what happened in each step (JSON lines)")
options = parser.parse_args()

task = make_task(options.task, options.data)
torch.manual_seed(options.seed)
model = task.model()
began_s = 0.0

with mpisync.Session(
    MPI.COMM_WORLD,
    model,
    task.optimizer(model),
    policy=mpisync.BackupWorkers(1 if MPI.COMM_WORLD.size > 2 else 0),
    seed=options.seed,
    on_late=options.on_late,
    record=options.record,
) as session:
    for batch in session.batches(task.loader(), steps=options.steps or task.steps):
        began_s = began_s or time.monotonic()
        time.sleep(options.delay * (session.worker == 0) + options.spike * (random.random() < 0.1))
        loss = task.loss(model, batch)
        loss.backward()
        session.step(loss, cost=task.cost(batch))
        if options.every and (found := session.evaluate(task.evaluate, every=options.every)) is not None:
            after_s = time.monotonic() - began_s
            print(f"version {session.version} after {after_s:.3f} s: {found[task.metric]:.4f}", flush=True)

if MPI.COMM_WORLD.rank == 0:  # every rank has the final parameters
    for name, value in task.evaluate(model).items():
        print(f"{name}: {value:.4f}", flush=True)
