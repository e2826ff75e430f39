"""The number of samples in a batch, and whether it is certain.

The rule: the first dimension of the first tensor or array in it, however deep in tuples, lists, mappings and
dataclasses. What knows better is asked: a nested tensor, a packed sequence, a graph batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def count_samples(batch: Any) -> int:
    """Return the samples of a batch; 1 where nothing in it can be counted."""
    first = batch[0] if type(batch) in (tuple, list) and batch else batch
    if type(first) is Tensor and not first.is_nested and first.ndim:  # as nearly always
        return len(first)
    return next(_counts(batch), 1)


def doubt(batch: Any) -> str:
    """Say why the samples of a batch are not certain; "" where they are.

    That looks at all its tensors, which `count_samples` does not.
    """
    counts = list(dict.fromkeys(_counts(batch)))
    if not counts:
        return f"there is no tensor to count by in a batch that is a {type(batch).__name__}"
    if len(counts) > 1:
        return f"the tensors of a batch differ in their first dimension: {', '.join(map(str, counts))}"
    return ""


def _counts(batch: Any) -> Iterator[int]:
    """Yield how many samples each part of a batch says that there are; scalars say nothing."""
    if isinstance(batch, str | bytes | int | float):
        return
    if getattr(batch, "is_nested", False) is True:
        yield int(batch.size(0))  # one of torch's two layouts has no shape
    elif isinstance(batch, PackedSequence):
        yield int(batch.batch_sizes[0])
    elif isinstance(getattr(batch, "num_graphs", None), int):
        yield int(batch.num_graphs)
    elif isinstance(shape := getattr(batch, "shape", None), tuple):  # torch.Size too
        if shape:
            yield int(shape[0])
    else:
        for part in parts_of(batch):
            yield from _counts(part)


def parts_of(batch: Any) -> Iterable[Any]:
    """Return what a tuple, list, mapping or dataclass is made of; nothing for anything else."""
    if isinstance(batch, Mapping):
        return batch.values()
    if isinstance(batch, tuple | list):
        return batch
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    return ()
