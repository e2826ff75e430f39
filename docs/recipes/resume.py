"""Train, and go on where a killed run was: start it again until it is done."""

import os

import torch
from mpi4py import MPI
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import mpisync

STEPS, EVERY, PATH = 300, 20, "resume.pt"

torch.manual_seed(0)
data = torch.randn(2000, 20)
labels = (data @ torch.randn(20, 5)).argmax(1)  # which of five directions a point lies in
loader = DataLoader(TensorDataset(data[:1500], labels[:1500]), batch_size=25, shuffle=True)

model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Linear(32, 5))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)

# The last rank is the root. It alone reads and writes the file, and gives what it has read to all.
comm = MPI.COMM_WORLD
root = comm.size - 1
state = torch.load(PATH) if comm.rank == root and os.path.exists(PATH) else None
state = comm.bcast(state, root)
done, samples = 0, None  # updates in the runs before this one, and where they were in the data
if state is not None:
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    done, samples = state["done"], state["samples"]
if comm.rank == root:
    print(f"begins at {done} of {STEPS}", flush=True)


def save(record: mpisync.StepRecord) -> None:
    """Save, at the root, after every EVERY-th update."""
    total = done + session.version  # a session's versions count from 0
    if total % EVERY == 0:
        torch.save({**session.state_dict(), "done": total}, PATH + ".new")
        os.replace(PATH + ".new", PATH)  # at once: whenever we are killed, one whole file is there
        print(f"saved {total} of {STEPS}", flush=True)


with mpisync.Session(comm, model, optimizer, scheduler=scheduler, on_step=save, progress=False) as session:
    for x, y in session.batches(loader, steps=STEPS - done, resume=samples):
        loss = cross_entropy(model(x), y)
        loss.backward()
        session.step(loss)

if comm.rank == root:
    model.eval()
    with torch.no_grad():
        accuracy = float((model(data[1500:]).argmax(1) == labels[1500:]).float().mean())
        size = float(sum(parameter.double().norm() for parameter in model.parameters()))
    print(f"ends at {done + session.version} of {STEPS}: accuracy {accuracy:.2f}, norms {size:.9f}")
