"""What `batches` is given and could not share out as it was meant: several loaders, samplers for other ranks."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import GeneratorType
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from mpisync.data.samplers import is_distributed

_MOST_PARTS = 100  # of an iterator that are looked at
_MODULES = ("builtins", "itertools")  # of iterators that only pass on what others yield


def refuse_joined(loader: Any) -> None:  # noqa: ANN401 (whatever a script passes)
    """Raise TypeError for DataLoaders inside of a tuple, list, dict or iterator, where none would be shared out."""
    count, kind = len(loaders_in(loader)), type(loader).__name__
    if count > 1:
        raise TypeError(
            f"batches needs one loader, and this {kind} holds {count} DataLoaders, of which every worker would get the "
            "same batches: pair their samples in one data set, session.batches(DataLoader(torch.utils.data.StackDataset"
            "(a, b), batch_size=..., shuffle=True)); or give it one of them and call next() on an endless generator of "
            "the other inside the loop (def forever(loader): while True: yield from loader)"
        )
    if count:
        raise TypeError(
            f"batches needs the DataLoader itself, and this {kind} draws from one, so every worker would get the same "
            "batches, and none after one pass: write session.batches(loader), and put enumerate, zip or map around that"
        )
    if isinstance(loader, Mapping):
        raise TypeError(f"batches needs an iterable of batches, and a {kind} yields its keys: pass its values, a list")


def loaders_in(loader: Any) -> list[Any]:  # noqa: ANN401
    """Return the DataLoaders, and iterators of some, that a container or an iterator of Python's own holds."""
    found: list[Any] = []
    parts = list(_parts(loader))
    if isinstance(loader, _BaseDataLoaderIter):
        found.append(loader)
    seen = 0
    while parts and seen < _MOST_PARTS:
        part, seen = parts.pop(), seen + 1
        if isinstance(part, DataLoader | _BaseDataLoaderIter):
            found.append(part)
        elif isinstance(part, tuple | list) or _passes_on(part):
            parts += _parts(part)
    return list({id(one): one for one in found}.values())


def _parts(whole: Any) -> Iterable[Any]:  # noqa: ANN401
    if isinstance(whole, Mapping):
        return whole.values()
    if isinstance(whole, tuple | list):
        return whole[:_MOST_PARTS]
    return gc.get_referents(whole) if _passes_on(whole) else ()


def _passes_on(value: Any) -> bool:  # noqa: ANN401
    """Say whether a value is an iterator of Python's own, such as a zip; whoever writes a generator knows its data."""
    return (
        isinstance(value, Iterator) and type(value).__module__ in _MODULES and not isinstance(value, GeneratorType)
    )


def check_replicas(loader: Any, worker: int, workers: int) -> None:  # noqa: ANN401
    """Raise ValueError for a sampler of its own that shares data out among others than the workers."""
    batches = getattr(loader, "batch_sampler", None)
    for sampler in (getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
        replicas, rank = getattr(sampler, "num_replicas", None), getattr(sampler, "rank", None)
        if isinstance(replicas, int) and isinstance(rank, int) and (replicas, rank) != (workers, worker):
            name = type(sampler).__name__
            raise ValueError(
                f"{name}(num_replicas={replicas}, rank={rank}) draws for rank {rank} of {replicas}, and this is worker "
                f"{worker} of {workers}, since the root draws nothing: pass DataLoader(..., batch_size=..., sampler="
                "torch.utils.data.DistributedSampler(...)) or shuffle=True, which the session shares out itself; or "
                f"make the {name} inside the `with`, with num_replicas=session.workers and rank=session.worker or 0"
            )


def tell_of_replicas(loader: Any, worker: int, workers: int) -> None:  # noqa: ANN401
    """Say once that a DistributedSampler made for other ranks was taken over."""
    sampler: Any = getattr(loader, "sampler", None)
    # Worker 1 speaks: at worker 0 a rank that is 0 everywhere looks right.
    if worker != min(1, workers - 1) or not is_distributed(sampler):
        return
    if (sampler.num_replicas, sampler.rank) != (workers, worker):
        print(
            f"mpisync: the DataLoader's {type(sampler).__name__}(num_replicas={sampler.num_replicas}, rank="
            f"{sampler.rank}) is taken over: the session shares the samples out among its {workers} workers, anew in "
            "each pass, so num_replicas=, rank=, seed= and set_epoch() have no effect",
            file=sys.stderr,
            flush=True,
        )
