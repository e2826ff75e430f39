"""The memory that a rank computes in: a worker's is its model's or its arrays', the root's by MPISYNC_DEVICE."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mpisync import settings
from mpisync.device.base import Memory

if TYPE_CHECKING:
    from torch import nn


def memory_of(model: nn.Module) -> Memory | None:
    """Return the memory of the card that a model is on; None for the host's.

    Raises:
        ValueError: The card cannot be used.
    """
    device = next(model.parameters()).device
    return card(device.index or 0) if device.type == "cuda" else None


def placed(own: Memory | None, needed_bytes: int) -> Memory | None:
    """Return the memory in which the root reduces; None for the host's.

    Args:
        own: That of its model, or of its arrays.
        needed_bytes: How much of it a run takes.

    Raises:
        ValueError: The device that MPISYNC_DEVICE names cannot be used.
    """
    asked = str(settings.read("MPISYNC_DEVICE"))
    if asked == "cpu":
        return None
    memory = own if asked == "auto" else card(int(asked.partition(":")[2] or 0))
    if memory is not None and needed_bytes > memory.free_bytes():
        print(
            f"mpisync: gradients of all workers, their sum and the parameters take {needed_bytes / 1e6:.0f} MB, and "
            f"{memory.name} has {memory.free_bytes() / 1e6:.0f} MB free, so the root reduces in the host's memory",
            file=sys.stderr,
            flush=True,
        )
        return None
    return memory


def card(index: int) -> Memory:
    """Return the memory of a card, by its number in this process.

    Raises:
        ValueError: It cannot be used.
    """
    from mpisync.device.cuda import CudaMemory  # CuPy is imported by those who have a card

    return CudaMemory(index)
