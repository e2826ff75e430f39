"""A late gradient, kept to be added to the next one."""

from __future__ import annotations

import numpy as np
import torch

from mpisync.model.gradients import peak_of
from mpisync.model.tensor_layout import Views


class CarriedGradient:
    """The sum of a worker's late gradients since one was accepted.

    A gradient that was late is added to the next one as a whole, so that each counts as much as if it had been in time;
    where gradients are weighted by their samples, the two make the mean over the samples of both.

    Args:
        gradient: Where the worker's gradients lie before they are sent.
        presence: A byte a parameter there, which says whether it had a gradient.
        limit: How many versions the oldest of them may be behind.
        weighted: Whether gradients are weighted by their samples.
    """

    def __init__(self, gradient: Views, presence: np.ndarray, limit: int, *, weighted: bool) -> None:
        self._gradient, self._presence = gradient, presence
        self._limit, self._weighted = limit, weighted
        self._kept: list[torch.Tensor] = []
        self._kept_presence = presence.copy()
        self._samples = self._oldest = 0

    def add_in(self, version: int, samples: int) -> tuple[int, float] | None:
        """Add the carried sum to the gradient that is about to be sent, if it is not too old.

        Returns:
            The samples of both, and the largest magnitude in the sum; None where nothing was added.
        """
        if not self._kept or version - self._oldest > self._limit:
            self._kept = []
            return None
        total = samples + self._samples
        ours, theirs = (samples / total, self._samples / total) if self._weighted else (1.0, 1.0)
        for mine, kept in zip(self._gradient.segments, self._kept, strict=True):
            mine.mul_(ours).add_(kept, alpha=theirs)
        self._presence |= self._kept_presence
        return total, max(peak_of(segment) for segment in self._gradient.segments)

    def judged(self, version: int, samples: int, *, is_late: bool, carries: bool) -> None:
        """Keep the gradient that was sent if it was late, and finite."""
        if not is_late:
            self.drop()
            return
        self._oldest = self._oldest if carries else version
        self._samples = samples
        self._kept = [segment.clone() for segment in self._gradient.segments]
        self._kept_presence[:] = self._presence

    def drop(self) -> None:
        """Carry nothing into the next gradient."""
        self._kept = []
