"""Which memory a rank computes in: a worker's is its model's, the root's by MPISYNC_DEVICE."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpisync import settings
from mpisync.device.base import Memory

if TYPE_CHECKING:
    from torch import nn


def memory_of(model: nn.Module) -> Memory | None:
    """Return the memory of the card that a model is on; None for the host's."""
    device = next(parameter for parameter in model.parameters() if parameter.requires_grad).device
    if device.type == "cpu":
        return None
    from mpisync.device.cuda import CudaMemory  # CuPy is imported by those who have a card

    return CudaMemory(device.index or 0)


def placed(own: Memory | None) -> Memory | None:
    """Return the memory in which the root reduces; None for the host's.

    Args:
        own: That of its model.

    Raises:
        ValueError: MPISYNC_DEVICE names no device.
    """
    asked = str(settings.read("MPISYNC_DEVICE"))
    if asked == "auto":
        return own
    if asked == "cpu":
        return None
    from mpisync.device.cuda import CudaMemory

    return CudaMemory(int(asked.partition(":")[2] or 0))
