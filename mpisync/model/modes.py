"""Torch's modes, which a script may set for all code: what a session does is the same in each."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def ordinary_mode() -> AbstractContextManager[object]:
    """Return a context with gradients on and ordinary tensors, whatever mode the script has set.

    Example:
        >>> with torch.inference_mode(), ordinary_mode():
        ...     torch.zeros(1).is_inference(), torch.is_grad_enabled()
        (False, True)
    """
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return nullcontext()  # as nearly always: to ask costs a hundredth of what entering a mode does
    return torch.inference_mode(mode=False)  # which turns gradients on, too
