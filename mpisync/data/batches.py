"""A worker's endless stream of batches: its own share of the data, each batch under its own seed."""

import itertools
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Protocol

from torch.utils.data import DataLoader

from mpisync.data.batch_size import count_samples
from mpisync.data.fingerprint import fingerprint
from mpisync.data.refusals import check_replicas, loaders_in, refuse_joined, tell_of_replicas
from mpisync.data.samplers import (
    PoolSampler,
    ShardSampler,
    draws_by_default,
    is_distributed,
    refuse_other_length,
    share_of,
)
from mpisync.data.seeds import Stream, seed_everything

ClaimBatch = Callable[[int], tuple[int, int] | None]
"""Claims the next batch of a pool that has so many an epoch: its epoch and number; None when it is empty."""


class Source(Protocol):
    """The source of a worker's batches, an epoch at a time."""

    length: int | None
    """Batches in every epoch, where any of them can be reached at no cost; None elsewhere."""

    def epoch(self, epoch: int, sequence: int, skip: int) -> Iterator[Any]:
        """Yield the epoch's batches but the first `skip`; the first of all has `sequence`."""
        ...


class SharedLoader:
    """A DataLoader whose samplers torch chose: every worker draws its own share of them."""

    def __init__(self, loader: DataLoader[Any], worker: int, workers: int, seed: int) -> None:
        self._share = ShardSampler(loader, worker, workers, seed)
        # The last worker's share is the smallest: if it is empty, all of them say so.
        if not self._share.count(workers - 1):
            raise ValueError(
                f"the loader's {self._share.samples} samples do not make one batch for each of "
                f"{workers} workers (batch_size={loader.batch_size}, drop_last="
                f"{loader.drop_last}): use fewer workers, smaller batches or more data"
            )
        self._loader, self._theirs = share_of(loader, self._share), loader.sampler
        self.length: int | None = len(self._share)

    def epoch(self, epoch: int, sequence: int, skip: int) -> Iterator[Any]:
        """Yield the worker's share of the epoch; batches left out are not even read."""
        self._share.begin(epoch, sequence, skip)
        if is_distributed(self._theirs):
            self._theirs.set_epoch(epoch)  # type: ignore[attr-defined]  # for whoever reads it
        yield from self._loader


class SharedList:
    """A plain list or tuple of batches, of which every worker takes every W-th."""

    def __init__(self, batches: Sequence[Any], worker: int, workers: int) -> None:
        if len(batches) < workers:
            raise ValueError(
                f"a {type(batches).__name__} of {len(batches)} batches is too short for "
                f"{workers} workers: each needs one at least (to give the same to all, as where a loss is of all data "
                "at once, pass itertools.repeat(batch))"
            )
        self._all, self._count = batches, len(batches)
        self._batches = batches[worker::workers]
        self.length: int | None = len(self._batches)

    def epoch(self, epoch: int, sequence: int, skip: int) -> Iterator[Any]:
        """Yield the worker's batches, in the list's order in every epoch."""
        refuse_other_length("the list", "batches", self._count, len(self._all))
        return iter(self._batches[skip:])


class ClaimedLoader:
    """A DataLoader whose samplers torch chose: every worker claims batches of one pool, until it is empty."""

    length: int | None = None

    def __init__(self, loader: DataLoader[Any], worker: int, seed: int, claim: ClaimBatch) -> None:
        self._claims = PoolSampler(loader, worker, seed, claim)
        self._loader = share_of(loader, self._claims)

    def epoch(self, epoch: int, sequence: int, skip: int) -> Iterator[Any]:
        """Yield all batches that this worker is to have."""
        self._claims.begin(epoch, sequence, skip)
        yield from self._loader


class ClaimedList:
    """A plain list or tuple of batches, of which every worker claims one at a time."""

    length: int | None = None

    def __init__(self, batches: Sequence[Any], claim: ClaimBatch) -> None:
        self._batches, self._claim = batches, claim
        self._count = len(batches)

    def epoch(self, epoch: int, sequence: int, skip: int) -> Iterator[Any]:
        """Yield all batches that this worker is to have."""
        while (lot := self._claim(self._count)) is not None:
            refuse_other_length("the list", "batches", self._count, len(self._batches))
            yield self._batches[lot[1]]


class OwnIterable:
    """Any other iterable, taken as it is: its maker knows which data are whose.

    Its random numbers follow from (seed, worker, sequence) as long as it draws them from the
    global generators, or seeds its own when it is iterated.
    """

    def __init__(self, loader: Iterable[Any], worker: int, seed: int) -> None:
        self.length: int | None = None
        self._loader = loader
        self._worker = worker
        self._seed = seed
        self._once, self._is_used = isinstance(loader, Iterator), False

    def epoch(self, epoch: int, sequence: int, skip: int) -> Iterator[Any]:
        """Yield what the iterable gives, telling its samplers about the epoch first."""
        if self._is_used and self._once:
            raise ValueError(
                f"the data ended at batch {sequence} and can be iterated only once "
                f"({type(self._loader).__name__}): pass a DataLoader, a list, or an object whose "
                "__iter__ starts again, or ask for fewer steps"
            )
        self._is_used = True
        _tell_epoch(self._loader, epoch)
        seed_everything(self._seed, self._worker, sequence, Stream.LOADER)
        batches = iter(self._loader)
        for number in itertools.count(sequence):
            seed_everything(self._seed, self._worker, number, Stream.DATA)
            try:
                yield next(batches)
            except StopIteration:
                return


def _tell_epoch(loader: Iterable[Any], epoch: int) -> None:
    """Call set_epoch wherever the loader has one, as DistributedSampler wants it."""
    samplers = getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)
    inner = getattr(samplers[0], "sampler", None)
    heard: list[Any] = []
    listeners: tuple[Any, ...] = (loader, getattr(loader, "dataset", None), *samplers, inner)
    for listener in listeners:
        if hasattr(listener, "set_epoch") and not any(listener is other for other in heard):
            listener.set_epoch(epoch)
            heard.append(listener)


def shard(loader: Iterable[Any], worker: int, workers: int, seed: int) -> Source:
    """Return a worker's share of what `loader` yields.

    A DataLoader that draws in order or shuffles by default is divided among the workers, so is a
    list or tuple of batches; a DistributedSampler is taken over. Any other sampler that the caller
    made, an IterableDataset and any other iterable are respected as they are.
    """
    refuse_joined(loader)
    if isinstance(loader, DataLoader) and draws_by_default(loader):
        return SharedLoader(loader, worker, workers, seed)
    if isinstance(loader, list | tuple):
        return SharedList(loader, worker, workers)
    if not isinstance(loader, Iterable):
        raise TypeError(f"batches needs an iterable of batches, not {type(loader).__name__}")
    check_replicas(loader, worker, workers)
    if worker == 0 and workers > 1 and _draws_inside(loader):
        name = type(loader).__name__
        print(
            f"mpisync: this {name} draws from a DataLoader, and every worker goes through all of its samples: to share "
            f"them out, put the {name} around session.batches(loader) instead",
            file=sys.stderr,
            flush=True,
        )
    return OwnIterable(loader, worker, seed)


def _draws_inside(loader: Iterable[Any]) -> bool:
    """Say whether an iterable holds a DataLoader that could be shared out, as tqdm and its like do."""
    if isinstance(loader, DataLoader):
        return False
    held = getattr(loader, "__dict__", {}).values()
    loaders = [each for one in held for each in ([one] if isinstance(one, DataLoader) else loaders_in(one))]
    return any(isinstance(one, DataLoader) and draws_by_default(one) for one in loaders)


def batches_an_epoch(loader: Iterable[Any]) -> int:
    """Return how many batches a pool has in each epoch of `loader`.

    Raises:
        ValueError: It has none, or decides itself what each worker draws.
        TypeError: It holds several loaders.
    """
    refuse_joined(loader)
    if isinstance(loader, DataLoader) and draws_by_default(loader):
        batches = ShardSampler(loader, 0, 1, 0).count(0)
    elif isinstance(loader, list | tuple):
        batches = len(loader)
    else:
        raise ValueError(
            "on_late='requeue' deals batches out itself, so it needs a list of batches or a DataLoader with the "
            f"samplers that torch makes (shuffle= and batch_size=); this {type(loader).__name__} draws in a way of its "
            "own: use on_late='retry', which gives a late batch back to its own worker"
        )
    if not batches:
        raise ValueError(_nothing(0))
    return batches


def pooled(loader: Iterable[Any], worker: int, seed: int, claim: ClaimBatch) -> Source:
    """Return a worker's part of a pool of `loader`'s batches."""
    batches_an_epoch(loader)
    if isinstance(loader, DataLoader):
        return ClaimedLoader(loader, worker, seed, claim)
    assert isinstance(loader, Sequence)
    return ClaimedList(loader, claim)


class Batches:
    """An endless iterator over a worker's share, or one over the batches that it claims: yields (batch, sequence).

    Before each batch is handed out the global generators of torch, NumPy and random are seeded
    from (seed, worker, sequence), so that the same three give the same computation again.

    Args:
        loader: What the user passed: a DataLoader, a list of batches, any iterable.
        worker: This worker's number.
        workers: How many workers share the data.
        seed: The run's seed, the same on all workers.
        claim: Where batches come from a pool, claims the next one.
        start: Sequence of the first batch to hand out.
        skip: How many batches come before it in the data; `start` unless given. A loader that
            cannot be entered in the middle draws and drops so many.
        epoch: The number of the data's first epoch.

    Attributes:
        data_s: Seconds that the caller waited for the newest batch.
        batch_samples: Samples in the newest batch.
        samples: Samples handed out so far.
        sequence: Sequence of the next batch.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        worker: int,
        workers: int,
        seed: int,
        claim: ClaimBatch | None = None,
        start: int = 0,
        skip: int | None = None,
        epoch: int = 0,
    ) -> None:
        if claim is not None:
            self._drawn = _draw_claimed(pooled(loader, worker, seed, claim), start)
        else:
            source = shard(loader, worker, workers, seed)
            self._drawn = _draw(source, start, start if skip is None else skip, epoch)
        tell_of_replicas(loader, worker, workers)
        self._worker = worker
        self._seed = seed
        self._is_count = isinstance(loader, itertools.count)  # of a script without data: its numbers are none
        self.data_s = 0.0
        self.batch_samples = self.fingerprint = 0
        self.samples = 0
        self.sequence = start

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> tuple[Any, int]:
        began_s = time.perf_counter()
        batch, sequence = next(self._drawn)
        self.data_s = time.perf_counter() - began_s
        self.batch_samples = count_samples(batch)
        self.fingerprint = 0 if self._is_count else fingerprint(batch, sequence)
        self.samples += self.batch_samples
        self.sequence = sequence + 1
        seed_everything(self._seed, self._worker, sequence, Stream.LOOP)
        return batch, sequence

    def close(self) -> None:
        """Let the loader go, and with it the processes that it has started."""
        self._drawn.close()


# Not a method: a generator that holds its Batches would make a cycle, and the loader's processes
# would live on until a garbage collection finds it.
def _draw(source: Source, start: int, skip: int, before: int) -> Generator[tuple[Any, int], None, None]:
    """Yield batch after batch, each with its sequence, from `start`, the `skip`-th of the data.

    There were `before` epochs of other data.
    """
    first, offset = divmod(skip, source.length) if source.length else (0, 0)
    sequence = start - offset if source.length else start - skip
    for epoch in itertools.count(before + first):
        began = sequence + offset
        batches = source.epoch(epoch, sequence, offset)
        sequence = began
        for batch in batches:
            if sequence >= start:
                yield batch, sequence
            sequence += 1
        if sequence == began:
            raise ValueError(_nothing(epoch))
        offset = 0


def _draw_claimed(source: Source, start: int) -> Generator[tuple[Any, int], None, None]:
    """Yield each batch that can be claimed, with its sequence, from `start`."""
    sequence, before = start, -1
    # A loader that fetches ahead finds nothing left while it still has batches in hand, and those may come back late:
    # only who has none in hand and finds nothing is through.
    while sequence != before:
        before = sequence
        for batch in source.epoch(0, sequence, 0):
            yield batch, sequence
            sequence += 1


def _nothing(epoch: int) -> str:
    if epoch:
        return (
            f"epoch {epoch} of the loader yielded nothing, though the one before it did: it can "
            "be iterated only once; pass one that starts again when iterated"
        )
    return "the loader yields no batches: it is empty, or drop_last drops all it has"
