"""A tour of Session: schedule, clipping, averaged parameters, evaluation, records, your own hook.

The shortest script that trains is mpisync/commands/digits.py; this one shows what else there is,
on the same handwritten digits (they come with scikit-learn). It runs anywhere in seconds:

  mpisync run -n 5 jobs/train.py --out runs/first
  mpirun -n 5 python jobs/train.py --out runs/first
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from mpi4py import MPI
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mpisync

TRAINING = 1437  # of 1797 images; the rest are for testing


def accuracy(model, images, labels):
    """Return the share of images that the model labels rightly."""
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="updates of the parameters")
    parser.add_argument("--backup", type=int, default=1, help="workers a step may do without")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="cuda: a card a rank")
    parser.add_argument("--out", type=Path, help="a new directory for the record and the model")
    options = parser.parse_args()

    comm = MPI.COMM_WORLD
    device = torch.device("cpu")
    if options.device == "cuda":
        # The root comes after the workers of its node, so it shares the first card with one of them.
        local_rank = comm.Split_type(MPI.COMM_TYPE_SHARED).rank
        device = torch.device(f"cuda:{local_rank % torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32, device=device) / 16  # 1797 × 64
    labels = torch.tensor(digits.target, device=device)
    loader = DataLoader(
        TensorDataset(images[:TRAINING], labels[:TRAINING]), batch_size=32, shuffle=True
    )
    test = images[TRAINING:], labels[TRAINING:]

    # Initial values need no common seed: the root's hold for all.
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1.0, end_factor=0.05, total_iters=options.steps
    )

    # The last rank is the root; only it writes files while training goes on.
    record = None
    if options.out is not None:
        if comm.rank == comm.size - 1:
            options.out.mkdir(parents=True, mode=0o700, exist_ok=True)
        record = str(options.out / "record.jsonl")

    losses = []  # at the root: the mean loss of each step's accepted gradients

    def note(step):
        own = [a.loss for a in step.arrivals if a.verdict == "accepted" and a.loss is not None]
        losses.append(sum(own) / max(len(own), 1))

    with mpisync.Session(
        comm,
        model,
        optimizer,
        policy=mpisync.BackupWorkers(options.backup),
        scheduler=schedule,  # stepped once a version, whoever is late
        clip_norm=5.0,  # of the mean gradient
        ema=0.98,
        record=record,
        on_step=note,  # for W&B, TensorBoard, anything: called at the root
    ) as session:
        for x, y in session.batches(loader, steps=options.steps):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            session.step(loss)
            # One worker looks at a private copy meanwhile; it is merely late for a step.
            score = session.evaluate(lambda copy: accuracy(copy, *test), every=100)
            if score is not None:
                print(f"version {session.version}: test accuracy {score:.3f}", flush=True)

    # Every rank goes on here with the final parameters, private again.
    if comm.rank == 0:
        print(f"final parameters: test accuracy {accuracy(model, *test):.3f}", flush=True)
        model.load_state_dict(session.average)
        print(f"their moving average: test accuracy {accuracy(model, *test):.3f}", flush=True)
        if options.out is not None:
            torch.save(model.state_dict(), options.out / "average.pt")
    if losses:
        print(f"mean training loss: first step {losses[0]:.3f}, last {losses[-1]:.3f}", flush=True)


if __name__ == "__main__":
    main()
