"""Train with Lightning Fabric, which sets up each rank's one device: mpisync run -n 3 fabric.py."""

import torch
from lightning_fabric import Fabric
from mpi4py import MPI
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import mpisync

BATCH, STEPS = 16, 100

fabric = Fabric(accelerator="cpu", devices=1)
fabric.seed_everything(0, verbose=False)

digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16, torch.tensor(digits.target)
loader = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=BATCH, shuffle=True)
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)

forward = fabric.setup(model)  # of the model alone: the optimizer and the loader are the session's
with mpisync.Session(MPI.COMM_WORLD, model, optimizer, policy=mpisync.BackupWorkers(0), progress=False) as session:
    for x, y in session.batches(loader, steps=STEPS):
        loss = cross_entropy(forward(x), y)
        fabric.backward(loss)
        session.step(loss)

if session.worker is None or session.workers == 1:  # the root, or who trains alone
    with torch.no_grad():
        right = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()
    print(f"version {session.version}, accuracy {right:.2f}")
