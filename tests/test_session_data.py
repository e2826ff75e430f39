"""Whose samples a session's workers compute on, where a script brings a sampler or a stream of its own."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset, WeightedRandomSampler
from training import DATA, WORKERS, loader, new_model, on_all, sgd, train

import mpisync


class Stream(IterableDataset):
    """The same samples on all workers."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter([DATA[number % self.samples] for number in range(64)])


def seeded():
    sampler = WeightedRandomSampler([1.0] * 64, 64, generator=torch.Generator().manual_seed(3))
    return DataLoader(DATA, 8, sampler=sampler)


SAME = {
    "a stream": (lambda: DataLoader(Stream(64), 4), {}, True),
    "a seeded sampler": (seeded, {}, True),
    "drawn again where late": (seeded, {"on_late": "retry"}, True),
    "one batch": (lambda: DataLoader(Stream(1), 4), {}, False),
    "shared out": (loader, {}, False),
    "a list with the same batch": (lambda: list(loader(shuffle=False))[:2] * 2, {"on_late": "requeue"}, False),
    "a distributed sampler": (lambda: DataLoader(DATA, 8, sampler=DistributedSampler(DATA, 3, 0)), {}, False),
}


@pytest.mark.parallel(WORKERS + 1)
def test_workers_that_draw_the_same_batches_are_warned_about(comm):
    for name, (make, options, is_told) in SAME.items():
        model = nn.Sequential(new_model(), nn.Dropout(0.5))  # own random numbers: gradients differ
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(comm, model, sgd(model), data=make(), policy=mpisync.BackupWorkers(0), **options)
        texts = on_all(comm, [str(w.message) for w in caught if "equal batches" in str(w.message)])
        assert list(map(len, texts)) == [0] * WORKERS + [is_told], (name, texts)
        assert all("workers 0 and 1 drew equal batches in 3 steps, so" in text for text in texts[-1])


@pytest.mark.parallel(WORKERS + 1)
def test_workers_use_all_samples_of_a_distributed_sampler_once(comm):
    data = TensorDataset(*DATA.tensors, torch.arange(64))
    for on_late, extent in (("discard", {"steps": 4}), ("requeue", {"epochs": 1})):
        model, seen = new_model(), []
        sampler = DistributedSampler(data, comm.size, comm.rank)  # as scripts make it: the root counts
        with mpisync.Session(comm, model, sgd(model), progress=False, on_late=on_late) as session:
            for x, y, index in session.batches(DataLoader(data, 8, sampler=sampler), **extent):
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                session.step(loss)
                seen += index.tolist()
        assert sorted(sum(on_all(comm, seen), [])) == list(range(64)), on_late
