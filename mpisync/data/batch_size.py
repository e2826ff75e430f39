"""The number of samples in a batch."""

from collections.abc import Iterator, Mapping, Sized
from typing import Any


def count_samples(batch: Any) -> int:  # noqa: ANN401 (a batch is whatever the loader yields)
    """Return the first dimension of the first tensor or array found, else the length, else 1."""
    scalar = False
    for shape in _shapes(batch):
        if shape:
            return int(shape[0])
        scalar = True
    return 1 if scalar else _length(batch)


def _shapes(batch: Any) -> Iterator[tuple[int, ...]]:  # noqa: ANN401
    shape = getattr(batch, "shape", None)
    if isinstance(shape, tuple):  # torch.Size too
        yield shape
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _shapes(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from _shapes(value)


def _length(batch: Any) -> int:  # noqa: ANN401
    """Count a batch without arrays: tuples and mappings hold columns, a list holds samples."""
    if isinstance(batch, str | bytes) or not isinstance(batch, Sized):
        return 1
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    if isinstance(batch, tuple) and batch and isinstance(batch[0], list | tuple | Mapping):
        return _length(batch[0])
    return len(batch)
