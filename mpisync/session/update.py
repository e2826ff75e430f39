"""What happens to the parameters once their gradients are there: torch's own optimizer and what surrounds it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Update:
    """Clips, steps the optimizer, and keeps the average of the parameters.

    Args:
        parameters: What is trained.
        optimizer: Any torch optimizer that needs no closure.
        clip_norm: The largest global norm of the mean gradient; None for no clipping.
        decay: Of the exponential moving average; None for none.
        average: Where the average lies, one tensor a parameter.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: Optimizer,
        clip_norm: float | None,
        decay: float | None,
        average: Sequence[Tensor],
    ) -> None:
        self._parameters, self._optimizer = parameters, optimizer
        self._clip_norm, self._decay, self._average = clip_norm, decay, list(average)

    def apply(self) -> None:
        """Update the parameters from their gradients, which they keep."""
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self._optimizer.step()
        if self._decay is not None:
            with torch.no_grad():
                current = [parameter.data for parameter in self._parameters]
                torch._foreach_lerp_(self._average, current, 1 - self._decay)
