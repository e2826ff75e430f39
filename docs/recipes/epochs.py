"""Train digits in epochs: after each, every rank validates, the learning rate follows, and the root saves."""

import torch
from mpi4py import MPI
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import mpisync

EPOCHS, PATH = 4, "digits.pt"

digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16, torch.tensor(digits.target)
train, held_out = TensorDataset(images[:1500], labels[:1500]), (images[1500:], labels[1500:])
loader = DataLoader(train, batch_size=25, shuffle=True)

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=0)

with mpisync.Session(MPI.COMM_WORLD, model, optimizer, policy=mpisync.BackupWorkers(0), progress=False) as session:
    for epoch in range(EPOCHS):
        for x, y in session.batches(loader, steps=len(loader) // session.workers):
            loss = cross_entropy(model(x), y)
            loss.backward()
            session.step(loss)

        # Here every rank has the same parameters, for itself, until the next loop begins.
        model.eval()
        with torch.no_grad():
            scores = model(held_out[0])
        model.train()
        error = float(cross_entropy(scores, held_out[1]))
        scheduler.step(error)  # on every rank, as in any script; the root's is the one that holds
        if MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1:  # the root, which has the optimizer's state
            torch.save({**session.state_dict(), "scheduler": scheduler.state_dict(), "epoch": epoch}, PATH)
            accuracy = float((scores.argmax(1) == held_out[1]).float().mean())
            rate = scheduler.get_last_lr()[0]
            print(f"epoch {epoch}: version {session.version}, accuracy {accuracy:.2f}, rate {rate}")
