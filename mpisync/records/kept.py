"""Steps in the state of a run: as plain values, and back under another clock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from mpisync.records.lines import load, seal, unseal
from mpisync.records.schema import StepRecord


def keep(steps: Iterable[StepRecord]) -> list[dict[str, Any]]:
    """Return steps in numbers, text, lists and objects."""
    return [unseal(seal(vars(step)).rstrip()) for step in steps]


def recall(kept: Iterable[dict[str, Any]], shift_s: float) -> tuple[StepRecord, ...]:
    """Return steps from what `keep` made of them.

    Args:
        kept: The steps.
        shift_s: How far the clock here is ahead of the one that they were recorded by.

    Example:
        >>> (step,) = recall(keep([StepRecord(0, 1.0, 1.5, 2.0, 1, 1, [(0, 0, 0)], [])]), shift_s=10.0)
        >>> step.opened_s, step.published_s
        (11.0, 12.0)
    """
    return tuple(
        replace(
            step,
            opened_s=step.opened_s + shift_s,
            closed_s=step.closed_s + shift_s,
            published_s=step.published_s + shift_s,
        )
        for step in (load(StepRecord, dict(one)) for one in kept)
    )
