"""The account of a worker's samples: where they went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["accepted", "late", "rejected"]
Fate = Literal["used", "discarded", "requeued"]


@dataclass
class Account:
    """A worker's samples: handed = used + discarded + requeued + lost + in_flight, at any time."""

    handed: int = 0
    used: int = 0
    discarded: int = 0
    requeued: int = 0
    lost: int = 0
    accepted: int = 0  # gradients
    late: int = 0
    rejected: int = 0
    batches: int = 0  # whose samples have met their fate

    @property
    def in_flight(self) -> int:
        """Samples handed to the loop that have met no fate yet."""
        return self.handed - self.used - self.discarded - self.requeued - self.lost

    def judge(self, outcome: Outcome) -> None:
        """Count a gradient by its verdict."""
        setattr(self, outcome, getattr(self, outcome) + 1)

    def tally(self, fate: Fate, samples: int) -> None:
        """Enter what became of so many samples."""
        setattr(self, fate, getattr(self, fate) + samples)

    def settled(self) -> dict[str, int]:
        """Return the fields for a run that goes on from here: what is in flight now will be handed out again."""
        return {**vars(self), "handed": self.handed - self.in_flight}
