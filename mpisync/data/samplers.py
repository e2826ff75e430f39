"""A worker's samples of a data set: its own share of every epoch's permutation, or the batches that it claims."""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    get_worker_info,
)

from mpisync.data.seeds import Stream, derive, seed_everything


class Request(NamedTuple):
    """The yield of our sampler: the indices of one batch, and which computation it is for."""

    sequence: int
    indices: Any  # a list of them, or a single one where the loader does not batch


class SeededDataset(Dataset[Any]):
    """A data set that draws each batch under seeds of its own.

    It seeds in whichever process fetches the batch, so augmentations follow from the sequence
    whatever the loader's number of processes, and wherever the run was resumed.
    """

    def __init__(self, dataset: Any, seed: int, worker: int) -> None:  # noqa: ANN401
        self.dataset = dataset
        self.seed = seed
        self.worker = worker

    def __getitem__(self, request: Request) -> Any:  # noqa: ANN401
        seed_everything(self.seed, self.worker, request.sequence, Stream.DATA)
        return self.dataset[request.indices]

    def __getitems__(self, request: Request) -> Any:  # noqa: ANN401
        seed_everything(self.seed, self.worker, request.sequence, Stream.DATA)
        if getattr(self.dataset, "__getitems__", None):
            return self.dataset.__getitems__(request.indices)
        return [self.dataset[index] for index in request.indices]


class ShardSampler:
    """The sampler of worker `worker`: every W-th index of the epoch's permutation.

    Over all workers an epoch covers every sample once, and shares differ by one sample at most.
    `begin` chooses where the next iteration starts.
    """

    def __init__(self, loader: DataLoader[Any], worker: int, workers: int, seed: int) -> None:
        self.samples, self._dataset = len(loader.dataset), loader.dataset  # type: ignore[arg-type]
        self.batch_size = loader.batch_size
        self.drop_last = loader.drop_last
        self.shuffle = isinstance(loader.sampler, RandomSampler) or (
            is_distributed(loader.sampler) and bool(getattr(loader.sampler, "shuffle", False))
        )
        self.worker = worker
        self.workers = workers
        self.seed = seed
        self.generator = torch.Generator("cpu")  # for what the loader draws itself: its base seed
        self.begin(0, 0, 0)

    def begin(self, epoch: int, sequence: int, skip: int) -> None:
        """Set the epoch, the sequence of its first batch, and how many batches to leave out."""
        self.epoch, self.sequence, self.skip = epoch, sequence, skip
        self.generator.manual_seed(derive(self.seed, self.worker, epoch, Stream.LOADER))

    def count(self, worker: int) -> int:
        """Return the number of batches that an epoch has for `worker`."""
        share = len(range(worker, self.samples, self.workers))
        if self.batch_size is None:
            return share
        return share // self.batch_size if self.drop_last else -(-share // self.batch_size)

    def __len__(self) -> int:
        return self.count(self.worker)

    def __iter__(self) -> Iterator[Request]:
        share = self._order(self.epoch)[self.worker :: self.workers]
        size = self.batch_size or 1
        for batch in range(self.skip, len(self)):
            indices = share[batch * size : (batch + 1) * size].tolist()
            yield Request(
                self.sequence + batch, indices if self.batch_size is not None else indices[0]
            )

    def _order(self, epoch: int) -> torch.Tensor:
        refuse_other_length("the loader's data set", "samples", self.samples, len(self._dataset))  # type: ignore[arg-type]
        if not self.shuffle:
            return torch.arange(self.samples, device="cpu")
        generator = torch.Generator("cpu")
        generator.manual_seed(derive(self.seed, 0, epoch, Stream.ORDER))
        return torch.randperm(self.samples, generator=generator, device="cpu")


class PoolSampler(ShardSampler):
    """The sampler of a worker that claims batch after batch of a pool which all workers share.

    The pool deals numbers of batches; which samples these are follows from the epoch's permutation, which is the same
    for all. `begin` chooses the sequence of the first one.
    """

    def __init__(
        self, loader: DataLoader[Any], worker: int, seed: int, claim: Callable[[int], tuple[int, int] | None]
    ) -> None:
        super().__init__(loader, worker, 1, seed)
        self._claim = claim
        self._epoch_order = functools.lru_cache(2)(self._order)  # what comes back is of this epoch or the one before

    def __len__(self) -> int:
        return self.count(0)

    def __iter__(self) -> Iterator[Request]:
        size = self.batch_size or 1
        for sequence in itertools.count(self.sequence):
            lot = self._claim(len(self))
            if lot is None:
                return
            epoch, batch = lot
            indices = self._epoch_order(epoch)[batch * size : (batch + 1) * size].tolist()
            yield Request(sequence, indices if self.batch_size is not None else indices[0])


def refuse_other_length(what: str, unit: str, before: int, now: int) -> None:
    """Raise RuntimeError for data that have grown or shrunk, of which no worker would see anything."""
    if now != before:
        raise RuntimeError(
            f"{what} had {before} {unit} when the loop began and has {now} now: it is shared out among the workers as "
            "it was, so what is new would never be seen; pass batches an iterable of your own, which is taken as it "
            "is and may yield from whatever there is (a generator in an object's __iter__)"
        )


def draws_by_default(loader: DataLoader[Any]) -> bool:
    """Say whether torch chose the loader's samplers, or a DistributedSampler is to share them out, as we do."""
    if type(loader).__iter__ is not DataLoader.__iter__:
        return False  # a subclass that iterates in its own way
    dataset: Any = loader.dataset
    sampler: Any = loader.sampler
    batches = loader.batch_sampler
    if batches is not None and (
        type(batches) is not BatchSampler or batches.sampler is not sampler
    ):
        return False
    if type(sampler) is RandomSampler:
        whole = not sampler.replacement and sampler.num_samples == len(sampler.data_source)
        return whole and sampler.data_source is dataset and sampler.generator is loader.generator
    if is_distributed(sampler):
        return len(sampler.dataset) == len(dataset)
    return type(sampler) is SequentialSampler and sampler.data_source is dataset


def is_distributed(sampler: Any) -> bool:  # noqa: ANN401 (any object may be a sampler)
    """Say whether a sampler shares out as torch's DistributedSampler does, and not in a way of its own."""
    return isinstance(sampler, DistributedSampler) and type(sampler).__iter__ is DistributedSampler.__iter__


def share_of(loader: DataLoader[Any], share: ShardSampler) -> DataLoader[Any]:
    """Return the same loader with `share` as its sampler and its random numbers seeded by it."""
    # A copy, not a new DataLoader: it keeps the class and every argument, those of other torch
    # versions too. The loader itself stays as it is, for whoever else iterates it.
    mine = copy.copy(loader)
    vars(mine).update(
        dataset=SeededDataset(loader.dataset, share.seed, share.worker),
        sampler=share,
        batch_sampler=None if loader.batch_size is None else share,
        generator=share.generator,
        worker_init_fn=functools.partial(_show_dataset, loader.worker_init_fn),
        in_order=True,  # out of order, nobody could say which sequence a batch has
        _iterator=None,
    )
    return mine


def _show_dataset(init: Callable[[int], None] | None, worker_id: int) -> None:
    """Run the user's worker_init_fn, which expects to find its own data set in the info."""
    info = get_worker_info()
    object.__setattr__(info, "dataset", info.dataset.dataset)  # type: ignore[union-attr]
    if init is not None:
        init(worker_id)
