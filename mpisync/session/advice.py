"""What a session says at its start, where one word in the script would make every step shorter."""

from __future__ import annotations

from torch.optim import Optimizer

_MANY_ELEMENTS = 1_000_000  # nobody would notice what an update of fewer takes
_GAINING = ("Adagrad", "Adam", "AdamW")  # SGD has a fused update too, and gains little by it


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
