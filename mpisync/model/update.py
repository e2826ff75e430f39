"""The update of the parameters from their gradients: torch's own optimizer and what surrounds it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from mpisync.device.base import Memory
from mpisync.kernels.dtypes import DTYPES
from mpisync.model.optimizer_traps import layers
from mpisync.model.tensor_layout import TensorLayout, tensor_of
from mpisync.transport.layout import SgdSpan

Averages = Sequence[tuple[nn.Parameter, Tensor]]
"""Each parameter with its average."""

_MANY_ELEMENTS = 1_000_000  # nobody would notice what an update of fewer takes
_GAINING = ("Adagrad", "Adam", "AdamW")  # SGD has a fused update too, and gains little by it
_UNSUPPORTED_BY_FUSED = ("momentum", "weight_decay", "nesterov", "maximize", "differentiable", "fused")


class Update:
    """The updates of the parameters: clipping, the optimizer's steps, and the moving average.

    Args:
        parameters: What is trained.
        optimizers: Any torch optimizers that need no closure; they are stepped in order.
        average: Where the average lies, one tensor a parameter.
        clip_norm: The largest global norm of the mean gradient; None for no clipping.
        clip_value: The largest magnitude of its elements, before their norm is taken; None for no clipping.
        decay: Of the exponential moving average; None for none.
        memory: In which the parameters and their mean lie, for updates that fold and step in one pass; None for none.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        optimizers: Sequence[Optimizer],
        average: Sequence[Tensor] = (),
        *,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        decay: float | None = None,
        memory: Memory | None = None,
    ) -> None:
        self._memory = memory
        self._rounds_alike: bool | None = None  # until it is asked for
        self._parameters, self._optimizers = parameters, tuple(optimizers)
        self._clip_norm, self._clip_value = clip_norm, clip_value
        self._decay, self._average = decay, list(average)
        # several would each need the parameters of its own; clipping needs the whole mean first
        self._may_fuse = len(self._optimizers) == 1 and clip_norm is None and clip_value is None

    def spans(self, places: Sequence[TensorLayout]) -> list[SgdSpan]:
        """Return the spans and rates of the next update, where it is theta - rate * mean and nothing else; else none.

        That is `torch.optim.SGD` as it comes, with no hook that might want to see its gradients.
        """
        if not self._may_fuse or self._memory is None or not _is_plain(self._optimizers[0]):
            return []
        rates: dict[nn.Parameter, float] = {}
        for group in self._optimizers[0].param_groups:
            if any(group.get(name) for name in _UNSUPPORTED_BY_FUSED) or not isinstance(group["lr"], float):
                return []
            rates.update(dict.fromkeys(group["params"], group["lr"]))
        if self._rounds_alike is None:
            self._rounds_alike = _matches_torch_rounding(self._memory)
        if not self._rounds_alike:
            return []
        spans: list[SgdSpan] = []
        before: float | None = None  # the rate of the parameter before this one
        for parameter, place in zip(self._parameters, places, strict=True):
            rate, start = rates.get(parameter), place.offset
            if rate is not None:
                if rate == before and spans[-1].segment == place.segment:
                    start = spans.pop().start  # what lies between parameters is zero, and stays so
                spans.append(SgdSpan(place.segment, start, place.offset + place.count, rate))
            before = rate
        return spans

    def apply(self) -> None:
        """Update the parameters from their gradients, which they keep."""
        if self._clip_value is not None:
            nn.utils.clip_grad_value_(self._parameters, self._clip_value)
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        for optimizer in self._optimizers:
            optimizer.step()
        self.move_average()

    def move_average(self) -> None:
        """Let the average follow an update of the parameters."""
        if self._decay is not None:
            with torch.no_grad():
                current = [parameter.data for parameter in self._parameters]
                torch._foreach_lerp_(self._average, current, 1 - self._decay)

    def state(self) -> dict[str, Any]:
        """Return copies of the average's tensors; the optimizer's state is its own."""
        return {"average": [average.clone() for average in self._average] if self._decay is not None else None}

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        if self._decay is not None:
            torch._foreach_copy_(self._average, state["average"])


def _is_plain(optimizer: Optimizer) -> bool:
    """Say whether a step of this optimizer is torch's own SGD's and nothing more."""
    if type(optimizer) is not SGD:
        return False
    step = vars(optimizer).get("step")  # a scheduler puts a wrapper there
    if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):
        return False
    # Private names of torch: where one lacks, somebody may want to see the gradients.
    own, everyones = vars(optimizer), vars(sys.modules[Optimizer.__module__])
    return not (
        own.get("_optimizer_step_pre_hooks", True)
        or own.get("_optimizer_step_post_hooks", True)
        or everyones.get("_global_optimizer_pre_hooks", True)
        or everyones.get("_global_optimizer_post_hooks", True)
    )


def _matches_torch_rounding(memory: Memory) -> bool:
    """Say whether torch rounds theta - rate * mean once where the parameters lie, as the kernel does."""
    # Made by NumPy: the script may have set torch's default dtype and device.
    values = np.random.default_rng(0).random(1040, np.float32), np.linspace(-1, 1, 1040, dtype=np.float32)
    mean, after = (memory.allocate(value.nbytes).view(np.dtype(np.float32)) for value in values)
    for value, array in zip(values, (mean, after), strict=True):
        memory.copy(value, array)
    theirs = tensor_of(after, "float32").clone()
    torch._foreach_add_([theirs], [tensor_of(mean, "float32")], alpha=-0.3)
    memory.reducer.fused_sgd_step(after, [mean], DTYPES["float32"], rate=0.3)
    memory.finish()
    return torch.equal(tensor_of(after, "float32"), theirs)


def left_out(named: Iterable[tuple[str, nn.Parameter]], optimizers: Sequence[Optimizer]) -> str:
    """Say which trainable parameters no optimizer updates; "" where there are none.

    Args:
        named: All that are trained, with their names.
        optimizers: Theirs.
    """
    groups = [group for optimizer in optimizers for one in layers(optimizer) for group in one.param_groups]
    known = {id(parameter) for group in groups for parameter in group["params"]}
    names = [name for name, parameter in named if id(parameter) not in known]
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"mpisync: parameter {', '.join(map(repr, names[:3]))}{more} of the model is trainable and in no param group "
        "of an optimizer, so nothing updates it: give it to the optimizer, or to another one beside it, Session(comm, "
        "model, [optimizer, other]); or freeze it before Session, parameter.requires_grad_(False), which saves sending "
        "its gradient"
    )


def advice_on(optimizer: Optimizer) -> str:
    """Say where a fused update would be several times faster on a CPU; "" where it would not.

    Measured with 16 million float32 parameters in 16 tensors, 2 threads, torch 2.13: AdamW 120 ms and 12 fused, Adam 68
    and 15, Adagrad 86 and 17; SGD with momentum 16 and 10.
    """
    kind = type(optimizer)
    if kind.__name__ not in _GAINING or not kind.__module__.startswith("torch.optim"):
        return ""
    slow = [group for group in optimizer.param_groups if group.get("fused", True) in (None, False)]
    elements = sum(parameter.numel() for group in slow for parameter in group["params"])
    if elements < _MANY_ELEMENTS:
        return ""
    return (
        f"mpisync: every step waits for the update of {elements / 1e6:.1f} million parameters: "
        f"torch.optim.{kind.__name__}(..., fused=True) makes it 4 to 10 times faster on a CPU"
    )
