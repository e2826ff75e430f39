"""Batches: each worker's own share; all numbers follow from (seed, worker, sequence)."""

import gc
import random
import time
from collections import UserDict, namedtuple
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
    get_worker_info,
)

from mpisync.data.batch_size import count_samples, doubt
from mpisync.data.batches import Batches
from mpisync.data.seeds import Stream, derive


class Noisy(Dataset):
    """Sample i is (i, noise): an augmentation that draws from all three global generators."""

    def __init__(self, samples=21):
        self.samples = samples
        self.read = 0

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        self.read += 1
        noise = torch.rand(()).item(), float(np.random.rand()), random.random()
        return index, torch.tensor(noise, dtype=torch.float64)


class Together(Noisy):
    """The same, fetching a whole batch at once and no other way."""

    __getitem__ = None

    def __getitems__(self, indices):
        return [(index, torch.rand(3, dtype=torch.float64)) for index in indices]


class Stream3(IterableDataset):
    def __iter__(self):
        return iter(torch.rand(3, 2))


def plain(samples=20):
    return TensorDataset(torch.arange(samples))


def batches(loader, worker=0, workers=1, seed=7, **options):
    return Batches(loader, worker=worker, workers=workers, seed=seed, **options)


def indices(loader, count, **options):
    """The sample indices of the first `count` batches."""
    return [batch[0].tolist() for batch, _ in islice(batches(loader, **options), count)]


def drawn(loader, count, **options):
    """Everything that a computation can depend on: batch, noise, and the loop's numbers."""
    result = []
    for batch, sequence in islice(batches(loader, **options), count):
        loop = torch.rand(1).item(), float(np.random.rand()), random.random()
        result.append((sequence, [part.tolist() for part in batch], loop))
    return result


# --- whose samples ---------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("workers", [1, 3, 4])
def test_an_epoch_covers_every_sample_once_over_the_workers(shuffle, workers):
    shares = []
    for worker in range(workers):
        loader = DataLoader(plain(22), batch_size=2, shuffle=shuffle)
        per_epoch = -(-len(range(worker, 22, workers)) // 2)
        shares.append(sum(indices(loader, per_epoch, worker=worker, workers=workers), []))
    assert sorted(sum(shares, [])) == list(range(22))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    if shuffle:
        assert shares[0] != sorted(shares[0])


def test_workers_seeded_alike_draw_different_data():
    shares = []
    for worker in range(2):
        torch.manual_seed(0)  # as a user's script does on every rank
        loader = DataLoader(plain(), batch_size=5, shuffle=True)
        shares.append(sum(indices(loader, 2, worker=worker, workers=2), []))
    assert not set(shares[0]) & set(shares[1])


def test_every_epoch_has_another_permutation_and_the_seed_decides_which():
    loader = DataLoader(plain(), batch_size=20, shuffle=True)
    first, second = indices(loader, 2)
    assert first != second
    assert sorted(first) == sorted(second) == list(range(20))
    assert indices(loader, 2) == [first, second]
    assert indices(loader, 2, seed=8) != [first, second]


def test_a_short_last_batch_is_kept_or_dropped_as_the_loader_says():
    kept = indices(DataLoader(plain(10), batch_size=4), 4)
    assert [len(batch) for batch in kept] == [4, 4, 2, 4]
    dropped = indices(DataLoader(plain(10), batch_size=4, drop_last=True), 3)
    assert [len(batch) for batch in dropped] == [4, 4, 4]


def test_a_loader_that_does_not_batch_is_divided_too():
    ready = [torch.full((3,), float(number)) for number in range(4)]
    loader = DataLoader(ready, batch_size=None)
    got = [batch[0].item() for batch, _ in islice(batches(loader, 1, 2), 3)]
    assert got == [1, 3, 1]


def test_the_callers_loader_is_left_as_it_was():
    loader = DataLoader(plain(), batch_size=5, shuffle=True)
    dataset, sampler = loader.dataset, loader.sampler
    indices(loader, 3, worker=1, workers=2)
    assert loader.dataset is dataset and loader.sampler is sampler
    assert sum(len(batch[0]) for batch in loader) == 20


def test_collate_fn_and_getitems_of_the_caller_are_used():
    loader = DataLoader(Together(8), batch_size=4, collate_fn=lambda items: [len(items)])
    assert next(batches(loader))[0] == [4]


class Doubling(DataLoader):
    """A subclass with arguments of its own, as torch_geometric's."""

    def __init__(self, factor, *args, **options):
        self.factor = factor
        super().__init__(*args, collate_fn=self.collate, **options)

    def collate(self, items):
        return (self.factor * torch.stack([item[0] for item in items]),)


def test_a_subclass_of_dataloader_is_divided_and_stays_itself():
    loader = Doubling(2, plain(8), batch_size=4)
    assert indices(loader, 1, worker=1, workers=2) == [[2, 6, 10, 14]]


class Reversing(DataLoader):
    """A subclass that iterates in its own way."""

    def __iter__(self):
        return reversed(list(super().__iter__()))


def test_a_subclass_that_iterates_in_its_own_way_is_taken_as_it_is():
    loader = Reversing(plain(4), batch_size=2)
    assert indices(loader, 3, worker=1, workers=2) == [[2, 3], [0, 1], [2, 3]]


class Backwards(Sampler):
    def __init__(self, samples):
        self.samples = samples
        self.epochs = []

    def __len__(self):
        return self.samples

    def __iter__(self):
        return iter(range(self.samples - 1, -1, -1))

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


def test_a_sampler_of_the_caller_is_respected_and_told_the_epoch():
    sampler = Backwards(6)
    loader = DataLoader(plain(6), batch_size=3, sampler=sampler)
    assert indices(loader, 3, worker=1, workers=2) == [[5, 4, 3], [2, 1, 0], [5, 4, 3]]
    assert sampler.epochs == [0, 1]


def test_a_batch_sampler_of_the_caller_is_respected_and_its_sampler_told_the_epoch():
    sampler = Backwards(6)
    loader = DataLoader(plain(6), batch_sampler=BatchSampler(sampler, 2, drop_last=False))
    assert indices(loader, 4, worker=1, workers=2) == [[5, 4], [3, 2], [1, 0], [5, 4]]
    assert sampler.epochs == [0, 1]


@pytest.mark.parametrize(
    "sampler",
    [
        lambda data: RandomSampler(data, replacement=True),
        lambda data: RandomSampler(data, num_samples=50),
        lambda data: RandomSampler(data, generator=torch.Generator()),
        lambda data: RandomSampler(range(20)),
        lambda data: SequentialSampler(range(20)),
    ],
)
def test_a_sampler_of_torchs_with_options_is_the_callers(sampler):
    data = plain()
    loader = DataLoader(data, batch_size=50, sampler=sampler(data))
    size = len(loader.sampler)
    assert len(indices(loader, 1, worker=0, workers=4)[0]) == size


def test_a_callers_shuffle_from_the_global_generator_differs_between_workers():
    data = plain(1000)
    loader = DataLoader(data, 10, sampler=RandomSampler(data, replacement=True))
    shares = []
    for worker in range(2):
        torch.manual_seed(0)
        shares.append(indices(loader, 2, worker=worker, workers=2))
    assert shares[0] != shares[1]
    assert shares[0] == indices(loader, 2, worker=0, workers=2)


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_batches_is_strided_by_worker(kind):
    data = kind(torch.tensor([number]) for number in range(5))
    got = [int(batch) for batch, _ in islice(batches(data, 1, 2), 5)]
    assert got == [1, 3, 1, 3, 1]


def test_iterable_datasets_and_iterables_are_taken_as_they_are():
    loader = DataLoader(Stream3(), batch_size=2)
    sizes = [len(batch) for batch, _ in islice(batches(loader, 1, 2), 4)]
    assert sizes == [2, 1, 2, 1]
    assert [batch for batch, _ in islice(batches(range(3), 1, 2), 4)] == [0, 1, 2, 0]


# --- what follows from (seed, worker, sequence) ----------------------------------------------


LOADERS = {
    "shuffled": lambda: DataLoader(Noisy(), 4, shuffle=True),
    "in order": lambda: DataLoader(Noisy(), 4),
    "whole batches": lambda: DataLoader(Together(), 4, shuffle=True),
    "processes": lambda: DataLoader(Noisy(), 4, shuffle=True, num_workers=2),
    "persistent": lambda: DataLoader(
        Noisy(), 4, shuffle=True, num_workers=2, persistent_workers=True
    ),
    "a sampler": lambda: DataLoader(Noisy(), 4, sampler=RandomSampler(range(21), True)),
    "a sampler, processes": lambda: DataLoader(
        Noisy(), 4, sampler=RandomSampler(range(21), True), num_workers=2
    ),
    "a list": lambda: [(torch.tensor([number]),) for number in range(9)],
    "a stream": lambda: DataLoader(Stream3(), batch_size=2),
}


@pytest.mark.parametrize("name", LOADERS)
def test_batches_and_random_numbers_follow_from_seed_worker_and_sequence(name):
    whole = drawn(LOADERS[name](), 9, worker=1, workers=2)
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    assert drawn(LOADERS[name](), 9, worker=1, workers=2) == whole
    others = drawn(LOADERS[name](), 9, worker=0, workers=2)
    assert all(mine != other for mine, other in zip(whole, others, strict=True))
    assert drawn(LOADERS[name](), 9, worker=1, workers=2, seed=8) != whole


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("start", [2, 3, 7])
def test_it_resumes_at_any_sequence_with_the_very_same_batches(name, start):
    whole = drawn(LOADERS[name](), 9, worker=1, workers=2)
    assert drawn(LOADERS[name](), 9 - start, worker=1, workers=2, start=start) == whole[start:]


def test_augmentations_do_not_depend_on_the_number_of_processes():
    alone = drawn(LOADERS["shuffled"](), 7)
    assert drawn(LOADERS["processes"](), 7) == alone


def test_what_the_loop_draws_does_not_change_the_next_batch():
    got = []
    for batch, _ in islice(batches(LOADERS["shuffled"]()), 3):
        torch.rand(1000)
        random.random()
        got.append([part.tolist() for part in batch])
    assert got == [batch for _, batch, _ in drawn(LOADERS["shuffled"](), 3)]


def test_noise_differs_within_a_batch_and_between_batches_of_each_epoch():
    noise = [
        row for _, (_, rows), _ in drawn(DataLoader(Noisy(8), 4), 6) for row in map(tuple, rows)
    ]
    assert len(set(noise)) == len(noise) == 24


def test_resuming_reads_no_sample_that_it_does_not_need():
    data = Noisy(1000)
    next(batches(DataLoader(data, 10, shuffle=True), start=1234))
    assert data.read == 10


def test_a_second_call_goes_on_where_the_first_stopped_though_the_data_start_again():
    stream = [torch.rand(1) for _ in range(4)]
    got = list(islice(batches(iter(stream), start=40, skip=0), 4))
    assert [sequence for _, sequence in got] == [40, 41, 42, 43]
    assert [batch for batch, _ in got] == stream


def test_the_users_init_function_finds_its_own_dataset():
    def init(_):
        get_worker_info().dataset.samples = 5

    class Told(Noisy):
        def __getitem__(self, index):
            return torch.tensor([self.samples])

    loader = DataLoader(Told(8), batch_size=2, num_workers=1, worker_init_fn=init)
    assert next(batches(loader))[0].tolist() == [[5], [5]]


class Rolling(Noisy):
    """Augments from a generator of its own, which worker_init_fn seeds as torch recommends."""

    def __getitem__(self, index):
        return torch.from_numpy(self.generator.random(2))


def seed_rolling(_):
    info = get_worker_info()
    info.dataset.generator = np.random.default_rng(info.seed)


def test_the_seeds_that_a_loaders_processes_are_given_follow_too():
    def rolls(worker):
        loader = DataLoader(Rolling(8), 4, num_workers=1, worker_init_fn=seed_rolling)
        return [batch.tolist() for batch, _ in islice(batches(loader, worker, 2), 3)]

    first = rolls(0)
    torch.manual_seed(99)
    assert rolls(0) == first
    assert first[0] != first[1] != first[2]
    assert rolls(1) != first


class Sleepy(Noisy):
    """Whose first batch comes last, if nobody insists on the order."""

    def __getitem__(self, index):
        time.sleep(0.2 * (index == 0))
        return torch.tensor([index])


def test_batches_come_in_the_order_of_their_sequences():
    loader = DataLoader(Sleepy(4), 1, num_workers=2, in_order=False)
    got = [(int(batch), sequence) for batch, sequence in islice(batches(loader), 4)]
    assert got == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_a_persistent_loader_that_was_iterated_before_is_divided_all_the_same():
    loader = DataLoader(plain(8), 4, num_workers=1, persistent_workers=True)
    list(loader)
    assert indices(loader, 1, worker=1, workers=2) == [[1, 3, 5, 7]]


def test_streams_workers_and_sequences_never_share_a_seed():
    seeds = {
        derive(seed, worker, sequence, stream)
        for seed in (0, 1)
        for worker in range(4)
        for sequence in range(50)
        for stream in Stream
    }
    assert len(seeds) == 2 * 4 * 50 * len(Stream)


# --- clear ends ------------------------------------------------------------------------------


@pytest.mark.parametrize("worker", [0, 2])
def test_a_share_without_a_batch_is_refused_on_every_worker(worker):
    with pytest.raises(ValueError, match=r"2 samples .* each of 3 workers"):
        batches(DataLoader(plain(2)), worker, 3)
    with pytest.raises(ValueError, match=r"batch_size=8, drop_last=True"):
        batches(DataLoader(plain(20), 8, drop_last=True), worker, 3)
    with pytest.raises(ValueError, match=r"list of 2 batches is too short for 3 workers"):
        batches([1, 2], worker, 3)


def test_an_epoch_that_yields_nothing_is_an_error_and_not_a_spin():
    with pytest.raises(ValueError, match="yields no batches"):
        next(batches(DataLoader(plain(3), batch_size=4, sampler=Backwards(3), drop_last=True)))

    class Exhausted:
        def __init__(self):
            self.once = iter([torch.zeros(2)])

        def __iter__(self):
            return self.once

    stream = batches(Exhausted())
    next(stream)
    with pytest.raises(ValueError, match="epoch 1 of the loader yielded nothing"):
        next(stream)


def test_a_generator_at_its_end_says_that_it_can_be_iterated_only_once():
    stream = batches(torch.zeros(2) for _ in range(3))
    assert len(list(islice(stream, 3))) == 3
    with pytest.raises(ValueError, match="ended at batch 3 and can be iterated only once"):
        next(stream)


def test_what_cannot_be_iterated_is_refused():
    with pytest.raises(TypeError, match="iterable of batches, not int"):
        batches(3)


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_the_loaders_processes_end_with_the_batches(how):
    gc.disable()  # no cycle may keep them
    try:
        stream = batches(DataLoader(plain(), 2, num_workers=1))
        next(stream)
        (process,) = torch.multiprocessing.active_children()
        if how == "closed":
            stream.close()
        else:
            del stream
        process.join(10)
        assert not process.is_alive()
    finally:
        gc.enable()


# --- counting and measuring ------------------------------------------------------------------


def test_samples_are_counted_as_they_are_handed_out():
    stream = batches(DataLoader(plain(10), batch_size=4))
    counts = [(stream.batch_samples, stream.samples) for _ in islice(stream, 3)]
    assert counts == [(4, 4), (4, 8), (2, 10)]
    assert stream.sequence == 3


def test_data_s_is_the_time_that_the_caller_waited(monkeypatch):
    now_s = [0.0]
    monkeypatch.setattr("mpisync.data.batches.time.perf_counter", lambda: now_s[0])

    def slow():
        while True:
            now_s[0] += 0.25
            yield torch.zeros(2)

    stream = batches(slow())
    next(stream)
    now_s[0] += 100.0  # the caller computes
    next(stream)
    assert stream.data_s == 0.25


UNKNOWN = None
Point = namedtuple("Point", "x y")


@dataclass
class Columns:
    name: str
    x: torch.Tensor
    y: torch.Tensor


class Graphs:
    """As torch_geometric's Batch: nodes and edges of several graphs, and a length that means something else."""

    num_graphs = 4

    def __init__(self, x, edge_index):
        self.x, self.edge_index = x, edge_index

    def __len__(self):
        return 2


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (torch.zeros(4, 2), 4),
        ((torch.zeros(3, 2), torch.zeros(3)), 3),
        ([np.zeros((5, 1)), "name"], 5),
        ({"ids": ["a", "b"], "x": {"deep": torch.zeros(6, 1)}}, 6),
        ((torch.tensor(1.0), torch.zeros(2)), 2),
        (torch.tensor(1.0), UNKNOWN),
        ({"scalar": torch.tensor(1.0), "deep": {"deeper": {"x": torch.zeros(6, 1)}}}, 6),
        (UserDict(input_ids=torch.zeros(4, 9), labels=torch.zeros(4)), 4),
        (torch.nested.nested_tensor([torch.zeros(3, 2), torch.zeros(5, 2)], layout=torch.jagged), 2),
        (pack_sequence([torch.zeros(5, 2), torch.zeros(4, 2), torch.zeros(1, 2)]), 3),
        ((pack_sequence([torch.zeros(5, 2), torch.zeros(4, 2)]), torch.zeros(2)), 2),
        (Graphs(torch.zeros(50, 3), torch.zeros(2, 90)), 4),
        (Columns("train", torch.zeros(5, 3), torch.zeros(5)), 5),
        (Point(torch.zeros(2, 3), torch.zeros(2)), 2),
        ((), UNKNOWN),
        ([torch.tensor(1.0), torch.tensor(2.0)], UNKNOWN),
        (["one", "two", "three"], UNKNOWN),
        ([[1, 2, 3], [4, 5]], UNKNOWN),
        ({"text": ["one", "two"]}, UNKNOWN),
        ("text", UNKNOWN),
        (object(), UNKNOWN),
        (Columns, UNKNOWN),
    ],
)
def test_the_size_of_a_batch(batch, samples):
    assert count_samples(batch) == (samples or 1)
    assert bool(doubt(batch)) == (samples is UNKNOWN)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_a_nested_tensor_without_a_shape_says_its_size():
    nested = torch.nested.nested_tensor([torch.zeros(3, 2)] * 7, layout=torch.strided)
    for batch in (nested, (nested, torch.zeros(7))):
        assert count_samples(batch) == 7 and not doubt(batch)


def test_tensors_that_differ_in_their_first_dimension_leave_a_doubt():
    for batch in (
        (torch.zeros(8, 2), torch.zeros(4)),
        {"x": torch.zeros(8, 2), "more": [torch.zeros(8), {"lengths": torch.zeros(4)}]},
    ):
        assert count_samples(batch) == 8, "for the accounts, it is the first's"
        assert doubt(batch) == "the tensors of a batch differ in their first dimension: 8, 4"


@pytest.mark.parametrize("processes", [0, 2])
def test_a_pool_is_asked_again_when_what_was_fetched_ahead_of_its_end_is_done(processes):
    claims = iter([(0, 1), (0, 0), None, (0, 1), None, None])  # the second one came back
    loader = DataLoader(TensorDataset(torch.arange(4)), batch_size=2, num_workers=processes)
    batches = Batches(loader, worker=0, workers=2, seed=0, claim=lambda _: next(claims))
    assert [(x.tolist(), sequence) for (x,), sequence in batches] == [([2, 3], 0), ([0, 1], 1), ([2, 3], 2)]
    assert next(claims, "all asked for") == "all asked for"
