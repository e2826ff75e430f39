"""Set by hand what a script often does: clip gradients, set the rate, sum losses, and use them after the loop."""

import torch
from mpi4py import MPI
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import mpisync

EPOCHS, WARM_UP, BACKUPS = 3, 5, 0

torch.manual_seed(0)
data = torch.randn(640, 20).double()
labels = (data @ torch.randn(20, 5).double()).argmax(1)
loader = DataLoader(TensorDataset(data, labels), batch_size=16)

model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 5)).double()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01 / WARM_UP, momentum=0.9)


def set_rate(rate: float) -> None:
    """Set the rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def warm_up(record: mpisync.StepRecord) -> None:
    """Set the rate of the next update: only the root calls this, after each, and its optimizer makes them."""
    if record.step + 1 < WARM_UP:
        set_rate(0.01 * (record.step + 2) / WARM_UP)


with mpisync.Session(
    MPI.COMM_WORLD, model, optimizer, policy=mpisync.BackupWorkers(BACKUPS),
    clip_norm=20.0, clip_value=5.0,  # of the mean gradient, in place of torch's functions in the loop
    on_step=warm_up, progress=False,
) as session:  # fmt: skip
    gradients = max(1, session.workers - BACKUPS)  # in each update, which takes their mean
    for epoch in range(EPOCHS):
        losses = []  # before the loop: the root never runs what is in it
        for x, y in session.batches(loader, steps=len(loader) // session.workers):
            loss = cross_entropy(model(x), y, reduction="sum")
            (loss * gradients).backward()  # so that the update is that of the sum over all workers' samples
            session.step(loss / len(x))
            losses.append(loss.item() / len(x))

        # Between two loops every rank may set its optimizer, and must do so alike.
        set_rate(0.01 * 0.3 ** (epoch + 1))
        if losses:  # at the root there are none
            print(f"epoch {epoch}: worker {session.worker}'s mean loss is {sum(losses) / len(losses):.9f}", flush=True)

if MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1:
    print(f"norms {float(sum(p.detach().norm() for p in model.parameters())):.9f}")
