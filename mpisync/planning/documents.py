"""An advice as one JSON document."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np

from mpisync.planning.advice import Advice
from mpisync.planning.fitting import Fit
from mpisync.planning.laws import DelayLaw

__all__ = ["document"]

FORMAT = 1


def document(advice: Advice, fits: list[Fit], law: DelayLaw | None) -> str:
    """Return the document, on one line.

    Times are in seconds; a number that JSON lacks is text (`"inf"`, `"nan"`); `numbers` are the
    workers of the columns, which `discarded_by_worker` follows too. Steps, missing times and all that is
    computed are of the steps that the advice is for; `changes` names the steps and workers of all.

    Example:
        >>> from mpisync.planning.advice import advise
        >>> from mpisync.planning.observed import observe
        >>> json.loads(document(advise(observe(np.ones((3, 2)))), [], None))["verdict"]
        'declined'
    """
    observed, made = advice.observed, advice.choices
    steps, workers = observed.times_s.shape
    chosen = None
    if made is not None:
        chosen = next(asdict(one) for one in made.options if one.backup == advice.backup)
    result = {
        "format": FORMAT,
        "verdict": advice.verdict,
        "backup": advice.backup,
        "accepted": None if advice.backup is None else workers - advice.backup,
        "headline": advice.headline,
        "reasons": advice.reasons,
        "notes": observed.notes,
        "steps": steps,
        "workers": workers,
        "numbers": observed.workers,
        "first_step": None if law is not None else int(observed.step_numbers[0]),
        "last_step": None if law is not None else int(observed.step_numbers[-1]),
        "changes": _changes(advice),
        "missing": int((~observed.measured).sum()),
        "law": None if law is None else str(law),
        "overhead_s": observed.overhead_s,
        "chosen": chosen,
        "best": None if made is None else asdict(made.best),
        "best_from": None if made is None else made.fewest,
        "best_to": None if made is None else made.most,
        "efficiency": None if made is None else asdict(made.efficiency),
        "choices": [] if made is None else [asdict(one) for one in made.options],
        "deadline": None if advice.deadline is None else asdict(advice.deadline),
        "straggling": None if advice.straggling is None else asdict(advice.straggling),
        "remedies": None if advice.remedies is None else asdict(advice.remedies),
        "discarded_by_worker": advice.dropped,
        "discarded_by_cost": advice.dropped_by_cost,
        "fits": [{**asdict(one), "law": str(one.law)} for one in fits],
    }
    return json.dumps(_plain(result), allow_nan=False)


def _changes(advice: Advice) -> list[dict[str, Any]]:
    """Return the changes by the input's numbers of steps and workers."""
    whole, changes = advice.whole, [] if advice.regimes is None else advice.regimes.changes
    return [
        {
            "from": whole.step_numbers[one.start],
            "to": None if one.stop is None else whole.step_numbers[one.stop - 1],
            "workers": [whole.workers[c] for c in one.columns],
            "ratios": one.ratios,
        }
        for one in changes
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
