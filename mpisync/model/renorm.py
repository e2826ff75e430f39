"""Embeddings that a forward pass rescales (``torch.nn.functional.embedding(max_norm=)``): refused where they do it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mpisync.model.signature import plain_name

_traps: weakref.WeakSet[RenormTrap] = weakref.WeakSet()
_originals: list[Callable[..., Any]] = []


class RenormTrap:
    """A trap that makes a forward pass which rescales trained parameters raise RuntimeError, until it is undone.

    The rescaling is a write, which would be lost; where a worker may write to its own copy nothing else tells of it.

    Args:
        model: Whose parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._named = [(plain_name(name), p) for name, p in model.named_parameters() if p.requires_grad]
        if not _traps:
            _originals.append(torch.embedding_renorm_)
            torch.embedding_renorm_ = functools.wraps(_originals[-1])(_renorm)  # type: ignore[assignment]
        _traps.add(self)

    def undo(self) -> None:
        """Let embeddings be rescaled again; a second call does no harm."""
        _traps.discard(self)
        if not _traps and _originals:
            torch.embedding_renorm_ = _originals.pop()

    def meet(self, weight: Tensor, max_norm: float, norm_type: float) -> None:
        """Raise RuntimeError if `weight`, which is to be rescaled, is the memory of a parameter."""
        for name, parameter in self._named:
            if 0 <= weight.data_ptr() - parameter.data_ptr() < parameter.nbytes:
                raise RuntimeError(
                    f"embedding(max_norm={max_norm:g}) rescales parameter {name!r} in forward, on a worker, where that "
                    "is lost: use max_norm=None, and rescale in a hook, which the root runs after every update: "
                    f"optimizer.register_step_post_hook(lambda *_: parameter.data.renorm_({norm_type:g}, 0, "
                    f"{max_norm:g}))"
                )


def _renorm(weight: Tensor, indices: Tensor, max_norm: float, norm_type: float) -> Tensor:
    for trap in list(_traps):
        trap.meet(weight, max_norm, norm_type)
    rescaled: Tensor = _originals[-1](weight, indices, max_norm, norm_type)
    return rescaled
