"""What `batches` takes over, refuses or tells of: distributed samplers, several loaders, workers that draw the same."""

from dataclasses import dataclass
from itertools import chain, cycle, islice

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Sampler, StackDataset, TensorDataset

from mpisync.data.batches import Batches
from mpisync.data.fingerprint import fingerprint
from mpisync.session.equal_batches import EqualBatches


def plain(samples):
    return TensorDataset(torch.arange(samples))


def batches(loader, worker=0, workers=1, **options):
    return Batches(loader, worker=worker, workers=workers, seed=7, **options)


def indices(loader, count, **options):
    """The sample indices of the first `count` batches."""
    return [batch[0].tolist() for batch, _ in islice(batches(loader, **options), count)]


# --- samplers of several ranks ---------------------------------------------------------------


def distributed(data, size=4, replicas=5, rank=0, **more):
    return DataLoader(data, batch_size=size, sampler=DistributedSampler(data, replicas, rank, **more))


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_distributed_sampler_is_taken_over_whatever_it_was_made_with(shuffle, capfd):
    workers, epochs = 4, []
    for epoch in range(2):
        shares = []
        for worker in range(workers):
            loader = distributed(plain(22), 2, workers + 1, worker, shuffle=shuffle)
            per_epoch = -(-len(range(worker, 22, workers)) // 2)
            got = indices(loader, (epoch + 1) * per_epoch, worker=worker, workers=workers)
            shares.append(sum(got[epoch * per_epoch :], []))
            assert loader.sampler.epoch == epoch  # for whoever reads it
        assert sorted(sum(shares, [])) == list(range(22))
        epochs.append(shares)
    assert (epochs[0] != epochs[1]) == shuffle
    (told,) = set(capfd.readouterr().err.splitlines())
    assert "DistributedSampler(num_replicas=5, rank=1) is taken over: the session shares the samples out among" in told


def test_a_distributed_sampler_made_for_the_workers_is_taken_over_without_a_word(capfd):
    got = [indices(distributed(plain(6), 3, 2, worker), 1, worker=worker, workers=2) for worker in range(2)]
    assert sorted(got[0][0] + got[1][0]) == list(range(6)) and not capfd.readouterr().err


class Halves(Sampler):
    """A sampler of somebody's own that shares out among ranks, as many libraries have one."""

    def __init__(self, samples, num_replicas, rank):
        self.samples, self.num_replicas, self.rank = samples, num_replicas, rank

    def __iter__(self):
        return iter(range(self.rank, self.samples, self.num_replicas))


class Weighted(DistributedSampler):
    """A subclass that draws in a way of its own."""

    def __iter__(self):
        return iter([self.rank] * 3)


REPLICAS = {
    "own": lambda replicas, rank: DataLoader(plain(6), sampler=Halves(6, replicas, rank)),
    "a batch sampler": lambda replicas, rank: DataLoader(
        plain(6), batch_sampler=BatchSampler(DistributedSampler(plain(6), replicas, rank, shuffle=False), 1, False)
    ),
    "a subclass": lambda replicas, rank: DataLoader(plain(6), sampler=Weighted(plain(6), replicas, rank)),
    "of other data": lambda replicas, rank: DataLoader(
        plain(6), sampler=DistributedSampler(plain(5), replicas, rank, shuffle=False)
    ),
}


@pytest.mark.parametrize("name", REPLICAS)
def test_another_sampler_that_shares_out_must_do_so_among_the_workers(name):
    assert indices(REPLICAS[name](2, 1), 1, worker=1, workers=2) == [[1]]
    for replicas, rank in ((3, 1), (2, 0)):
        with pytest.raises(ValueError, match=rf"num_replicas={replicas}, rank={rank}\) draws for rank {rank} of"):
            batches(REPLICAS[name](replicas, rank), worker=1, workers=2)


# --- several loaders -------------------------------------------------------------------------


class Combined:
    def __init__(self, *loaders):
        self.loaders = loaders

    def __iter__(self):
        return zip(*self.loaders, strict=True)


def shuffled(samples=8):
    return DataLoader(plain(samples), batch_size=2, shuffle=True)


SEVERAL = {
    "zip": lambda a, b: zip(a, b, strict=True),
    "zip of a cycle": lambda a, b: zip(cycle(a), b),
    "enumerated": lambda a, b: enumerate(zip(a, b, strict=True)),
    "chain": lambda a, b: chain(a, b),
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b] * 2,
    "dict": lambda a, b: {"a": a, "b": b},
}
ONE = {"iter": iter, "enumerate": enumerate, "map": lambda a: map(len, a), "cycle": cycle, "list": lambda a: [a]}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_loaders_are_refused(name):
    with pytest.raises(TypeError, match="holds 2 DataLoaders.*StackDataset"):
        batches(SEVERAL[name](shuffled(), shuffled()), 0, 2)
    with pytest.raises(TypeError, match="holds 2 DataLoaders"):
        batches(SEVERAL[name](shuffled(), shuffled()), claim=lambda _: None)  # on_late="requeue"


@pytest.mark.parametrize("name", ONE)
def test_an_iterator_of_a_loader_is_refused(name):
    with pytest.raises(TypeError, match="draws from one.*write session.batches"):
        batches(ONE[name](shuffled()), 0, 2)


def test_a_dict_is_refused_and_what_holds_no_loader_is_not():
    with pytest.raises(TypeError, match="a dict yields its keys"):
        batches({"a": torch.zeros(2)}, 0, 2)
    assert next(batches(zip([1, 2], [3, 4], strict=True)))[0] == (1, 3)
    assert next(batches(x for x in shuffled()))[0][0].shape == (2,)  # whoever writes a generator knows its data


def test_an_object_that_holds_loaders_is_told_of(capfd):
    batches(Combined(shuffled(), shuffled()), 0, 2)
    assert "this Combined draws from a DataLoader, and every worker goes through all" in capfd.readouterr().err


def test_pairs_of_samples_are_shared_out_by_one_loader():
    pairs = StackDataset(torch.arange(8), torch.arange(8) + 100)
    shares = []
    for worker in range(2):
        drawn_pairs = islice(batches(DataLoader(pairs, batch_size=2, shuffle=True), worker, 2), 2)
        shares += [(int(x), int(y)) for (xs, ys), _ in drawn_pairs for x, y in zip(xs, ys, strict=True)]
    assert sorted(shares) == [(i, i + 100) for i in range(8)]


def forever(loader):
    while True:
        yield from loader


def test_a_loader_drawn_from_inside_the_loop_is_shuffled_by_each_worker_in_its_own_way():
    drawn_there = []
    for worker in (0, 1, 0):
        torch.manual_seed(5)  # as a user's script does on every rank
        others = forever(shuffled(100))
        drawn_there.append([next(others)[0].tolist() for _ in islice(batches(shuffled(), worker, 2), 60)])
    assert drawn_there[0] == drawn_there[2] != drawn_there[1]
    assert not any(a == b for a, b in zip(*drawn_there[:2], strict=True))


# --- workers that draw the same --------------------------------------------------------------


@dataclass
class Pair:
    x: torch.Tensor
    label: str


class Graphs:
    def __init__(self, x):
        self.x = x


ALIKE = {
    "a tensor": lambda n: torch.full((3,), n),
    "of 16 bits": lambda n: torch.full((3,), n, dtype=torch.bfloat16),
    "an array": lambda n: np.full((2, 2), n),
    "not contiguous": lambda n: (torch.arange(3000) + n).reshape(30, 100).t(),
    "large": lambda n: torch.arange(100_000) + n,
    "of a graph": lambda n: torch.full((3,), n, dtype=torch.float64, requires_grad=True) * 2,
    "deep": lambda n: {"a": [(torch.zeros(2), [torch.tensor(n)])]},
    "words": lambda n: ["the", f"word{n}"],
    "a number": lambda n: n,
    "a dataclass": lambda n: Pair(torch.zeros(2), str(n)),
    "an object": lambda n: Graphs(torch.tensor([n])),
}


@pytest.mark.parametrize("name", ALIKE)
def test_equal_batches_have_equal_fingerprints_and_others_do_not(name):
    make = ALIKE[name]
    assert fingerprint(make(1), 0) == fingerprint(make(1), 9) != fingerprint(make(2), 0) != 0


@pytest.mark.parametrize("batch", [None, (), object(), torch.eye(2).to_sparse(), np.array([object()])])
def test_a_batch_with_nothing_to_go_by_has_one_fingerprint(batch):
    assert fingerprint([batch], 0) == fingerprint([batch, batch], 0) == 0


def test_images_with_empty_borders_are_told_apart():
    images = torch.zeros(2, 64, 28, 28)
    images[:, :, 4:-4, 4:-4] = torch.rand(2, 64, 20, 20)
    assert fingerprint(images[0], 0) != fingerprint(images[1], 0)


def test_later_batches_are_looked_at_now_and_then():
    assert [bool(fingerprint(1, number)) for number in range(62, 74)] == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0]


def told(*steps):
    watch = EqualBatches()
    ordered = [list(enumerate(step))[:: 1 - 2 * (number % 2)] for number, step in enumerate(steps)]  # of acceptance
    return [text for step in ordered if (text := watch.see(step))]


def test_two_workers_that_keep_drawing_alike_are_told_once():
    (text,) = told(*[(5, 10 + step, 10 + step) for step in range(9)])
    assert text.startswith("workers 1 and 2 drew equal batches in 3 steps")
    assert len(told((1, 1), (2, 2), (0, 0), (0, 0), (3, 3))) == 1  # 0: not looked at
    assert len(told((1, 1), (2, 9), (3, 3), (4, 8), (5, 5))) == 1


@pytest.mark.parametrize(
    "steps",
    [
        [(7, 7)] * 50,  # the only batch that there is
        [(1, 1), (2, 2), *[(n, 100 + n) for n in range(3, 90)]],
        [(n, n if n % 5 == 0 else 1000 + n) for n in range(1, 99)],  # chance, with few samples
        [(0, 0)] * 9,
    ],
)
def test_what_is_equal_by_chance_is_not_told(steps):
    assert not told(*steps)
