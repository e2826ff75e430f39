"""Fit a skorch net, each of whose epochs is a loop of a session: mpisync run -n 3 skorch_net.py."""

import numpy as np
import torch
from mpi4py import MPI
from sklearn.datasets import load_digits
from skorch import NeuralNetClassifier
from skorch.dataset import Dataset
from skorch.helper import predefined_split

import mpisync

BATCH, EPOCHS = 15, 4


class SessionNet(NeuralNetClassifier):
    """A classifier whose batches and updates are a session's; `session` is set before it is fitted."""

    session: mpisync.Session

    def get_iterator(self, dataset, training=False):
        """Return what an epoch goes through: for training, a loop of the session."""
        loader = super().get_iterator(dataset, training)
        return SessionEpochs(self.session, loader) if training else loader

    def train_step(self, batch, **fit_params):
        """Compute the gradient of a batch; the root's optimizer makes the step."""
        step = self.train_step_single(batch, **fit_params)
        self.session.step(step["loss"])
        return step


class SessionEpochs:
    """Batches of one epoch after the other."""

    def __init__(self, session, loader):
        self.session, self.loader = session, loader

    def __iter__(self):
        return self.session.batches(self.loader, steps=len(self.loader) // self.session.workers)


digits = load_digits()
images, labels = (digits.images.reshape(-1, 64) / 16).astype(np.float32), digits.target

torch.manual_seed(0)
net = SessionNet(
    torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)),
    criterion=torch.nn.CrossEntropyLoss,
    optimizer=torch.optim.SGD,
    optimizer__momentum=0.9,
    lr=0.1,
    batch_size=BATCH,
    iterator_train__shuffle=True,
    train_split=predefined_split(Dataset(images[1500:], labels[1500:])),
    classes=np.arange(10),
    verbose=0,
)
net.initialize()  # which makes module_ and optimizer_
with mpisync.Session(
    MPI.COMM_WORLD, net.module_, net.optimizer_, policy=mpisync.BackupWorkers(0), progress=False
) as net.session:
    net.partial_fit(images[:1500], labels[:1500], epochs=EPOCHS)  # fit() would initialize anew

if net.session.worker is None or net.session.workers == 1:  # the root, or who trains alone
    for epoch, accuracy in enumerate(net.history[:, "valid_acc"]):
        print(f"epoch {epoch}: accuracy {accuracy:.2f}")
