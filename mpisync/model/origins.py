"""The origins of a model's values: whether ranks begin with other ones, and who else looks into their memory."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_SAMPLE = 256  # elements of a parameter that its digest looks at


def digest(model: nn.Module) -> int:
    """Return a number that two ranks share only if their parameters have the same values."""
    number = 0
    for parameter in model.parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // _SAMPLE)]
        sample = (sample.float() if sample.dtype is torch.bfloat16 else sample).cpu()
        number = zlib.crc32(sample.numpy().tobytes(), number)
    return number


def differing(digests: Sequence[object], root: int) -> str:
    """Say which ranks began with values of their own, and what follows; "" if none did."""
    others = [str(rank) for rank, number in enumerate(digests) if number != digests[root]]
    if not others:
        return ""
    one = len(others) == 1
    return (
        f"mpisync: {'rank' if one else 'ranks'} {', '.join(others)} came with other initial parameters than rank "
        f"{root}, the root, whose hold for all. A checkpoint that one rank alone loaded is lost: load it on every "
        "rank, before Session. What was made of the model before (a teacher, a target, an anchor) has other values on "
        "each rank: call torch.manual_seed(seed) on all before you make the model"
    )


def shared_elsewhere(named: Sequence[tuple[str, Tensor]], model: nn.Module) -> str:
    """Say whose memory tensors outside the model look into, which they will not do any more; "" if there are none."""
    count = getattr(torch._C, "_storage_Use_Count", None)  # torch has no public way to ask
    if count is None:
        return ""
    held = [*model.parameters(), *model.buffers()]
    held += [tensor._base for tensor in held if tensor._base is not None]  # what a view was taken of lives on in it
    tensors = {id(tensor): tensor for tensor in held}
    within = Counter(tensor.untyped_storage()._cdata for tensor in tensors.values())
    names = []
    for name, parameter in named:
        storage = parameter.untyped_storage()
        if count(storage._cdata) - 1 > within[storage._cdata]:  # one is `storage` itself
            names.append(repr(name))
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"mpisync: other tensors look into the memory of parameter {', '.join(names[:3])}{more}: a state_dict, a "
        "detach() or .data that was kept, or what it was made from. A session's parameters lie elsewhere, so those "
        "keep the values of before it: take them anew inside the loop, or copy them if that is what you want"
    )
