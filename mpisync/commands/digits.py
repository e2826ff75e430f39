"""Handwritten digits with backup workers: an ordinary training script.

  mpisync run -n 5 digits.py           four workers and the root
  mpirun -n 5 python digits.py         the same
  python digits.py                     one process, no workers

The 1,797 images of 8 by 8 pixels come with scikit-learn; nothing is downloaded.
"""

# mypy: disable-error-code="operator, no-untyped-call"
import argparse
import time

import torch
import torch.nn.functional as F
from mpi4py import MPI
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mpisync

parser = argparse.ArgumentParser(description="Train a small CNN on handwritten digits.")
parser.add_argument("--steps", type=int, default=100, help="updates of the parameters")
parser.add_argument("--delay", type=float, default=0.0, help="seconds that worker 0 sleeps a batch")
parser.add_argument("--record", help="a file for what happened in each step (JSON lines)")
options = parser.parse_args()

torch.manual_seed(0)

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # 1797 × 1 × 8 × 8
labels = torch.tensor(digits.target)
train_x, test_x, train_y, test_y = train_test_split(
    images, labels, test_size=360, stratify=labels, random_state=0
)
loader = DataLoader(TensorDataset(train_x, train_y), batch_size=32, shuffle=True, drop_last=True)

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # 16 × 4 × 4
    nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(),  # 512
    nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
)  # fmt: skip
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=options.steps)

with mpisync.Session(
    MPI.COMM_WORLD,
    model,
    optimizer,
    scheduler=decay,
    policy=mpisync.BackupWorkers(1 if MPI.COMM_WORLD.size > 2 else 0),
    record=options.record,
) as session:
    for x, y in session.batches(loader, steps=options.steps):
        if session.worker == 0:
            time.sleep(options.delay)  # a slow machine, a noisy neighbour, a long sentence
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        session.step(loss)

if MPI.COMM_WORLD.rank == 0:  # every rank has the final parameters
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    print(f"test accuracy: {accuracy:.4f}", flush=True)
