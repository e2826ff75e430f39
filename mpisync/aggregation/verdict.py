"""The verdict on a gradient, as its worker learns it."""

from __future__ import annotations

from dataclasses import dataclass

LOOP_OVER = "the loop has ended"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The fate of one gradient; final when the step has closed.

    Attributes:
        step: The step that judged it.
        accepted: Whether it is part of that step's update.
        late_by: How many versions newer the parameters were than those it was computed on; 0 unless late.
        newest: The newest version of the parameters at the time.
        reason: Why it was not accepted; "" if it was.
        waited_s: Seconds between its arrival and the verdict.

    Example:
        >>> Verdict(step=7, accepted=False, late_by=1, newest=8, reason="late").accepted
        False
    """

    step: int
    accepted: bool
    late_by: int = 0
    newest: int = 0
    reason: str = ""
    waited_s: float = 0.0
