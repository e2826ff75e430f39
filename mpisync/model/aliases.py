"""Views of parameters' memory that a module or an optimizer keeps: they would stay behind, for parameters move.

While a session runs, the parameters that are trained lie in memory that it shares. A tensor that looks into their old
memory would keep the first version's values.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.optim import Optimizer

from mpisync.model.attributes import attributes, inside
from mpisync.model.optimizer_traps import layers
from mpisync.model.signature import plain_name

_CURE = (
    "it would keep the values that the parameter has now, since a session moves parameters to memory of its own: make "
    "the view where it is used (in forward), or tie the two by assigning the same Parameter to both"
)


class Alias(NamedTuple):
    """A tensor that looks into a parameter's memory."""

    what: str
    tensor: Tensor
    parameter: str


def check_aliases(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Raise ValueError for a buffer, an attribute or an optimizer's tensor that looks into a trained parameter."""
    memory = _Memory(model)
    for alias in memory.aliases(_tensors(model, optimizers)):
        if alias.tensor.is_leaf:
            raise ValueError(f"{alias.what} looks into the memory of parameter {alias.parameter!r}: {_CURE}")


class ComputedViews:
    """The views of parameters that a forward pass before the session may have left in the model.

    A module that makes them afresh in every forward pass is right. So they are looked for again after the first one.

    Args:
        model: It has not been given its shared memory yet.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found = [alias for alias in _Memory(model).aliases(_attributes(model)) if not alias.tensor.is_leaf]

    def check(self) -> None:
        """Raise RuntimeError for one that is still there after a forward pass; later calls do nothing."""
        found, self._found = self._found, []
        if not found:
            return
        left = {id(tensor) for _, tensor in _attributes(self._model)}
        for alias in found:
            if id(alias.tensor) in left:
                raise RuntimeError(f"{alias.what} looks into the memory of parameter {alias.parameter!r}: {_CURE}")


class _Memory:
    """The memory of the parameters that are trained."""

    def __init__(self, model: nn.Module) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._spans = sorted((*_span(p), plain_name(name)) for name, p in named if p.numel())
        self._stops = [stop for _, stop, _ in self._spans]
        self._own = {id(parameter) for _, parameter in model.named_parameters()}

    def aliases(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[Alias]:
        """Yield those tensors that look into the memory."""
        for what, tensor in tensors:
            if id(tensor) in self._own:
                continue
            start, stop = _span(tensor)
            index = bisect_right(self._stops, start)  # parameters do not overlap: their ends are in order, too
            if index < len(self._spans) and self._spans[index][0] < stop:
                yield Alias(what, tensor, self._spans[index][2])


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of a tensor's first byte, and behind its last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _tensors(model: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in model.named_buffers():
        if _is_dense(buffer):
            yield f"buffer {plain_name(name)!r}", buffer
    yield from _attributes(model)
    for layer in (layer for optimizer in optimizers for layer in layers(optimizer)):
        for path, value in inside({key: value for key, value in vars(layer).items() if key != "param_groups"}):
            if isinstance(value, Tensor) and _is_dense(value):
                yield f"the optimizer's {path!r}", value


def _attributes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module, value in attributes(model):
        if isinstance(value, Tensor) and _is_dense(value) and path.rpartition(".")[2] not in _recomputed(module):
            yield f"attribute {path!r}", value


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.numel() > 0


def _recomputed(module: nn.Module) -> set[str]:
    """Return the attributes that a hook of torch sets before each forward pass."""
    return {hook.name for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)}
