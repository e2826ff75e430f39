"""The running sum of a step's accepted gradients."""

from __future__ import annotations

from dataclasses import dataclass

from mpisync.kernels.fold import Reducer
from mpisync.transport.base import RootLink
from mpisync.transport.layout import Block, Layout, aligned_bytes


@dataclass
class Sums:
    """What a finished sum says of itself."""

    finite: bool
    sum_squares: float = 0.0  # ‖mean‖²
    gradient_squares: float = 0.0  # Σ‖g_j‖²


class RunningSum:
    """A strict left fold, in order of acceptance, element by element.

    Gradients are taken note of first and folded several at a time, since each pass over the sum costs a read
    and a write of the model; how many are folded in a pass changes no bit of the result.
    """

    def __init__(
        self, layout: Layout, reducer: Reducer, blocks: tuple[Block, ...], *, norms: bool
    ) -> None:
        self.layout = layout
        self._reducer, self._norms = reducer, norms
        self.mean = [
            aligned_bytes(s.count * s.dtype.accumulator.itemsize).view(s.dtype.accumulator)
            for s in layout.segments
        ]
        self._blocks = [block for block in blocks if block.segment >= 0]
        self._pending: list[tuple[RootLink, int, float]] = []
        self._is_empty = True
        self._gradient_squares = 0.0

    def add(self, link: RootLink, worker: int, weight: float | None) -> None:
        """Take note of a whole gradient; it must stay where it is until `fold`."""
        self._pending.append((link, worker, 1.0 if weight is None else weight))

    @property
    def has_pending(self) -> bool:
        """Whether gradients wait to be folded."""
        return bool(self._pending)

    def fold(self, divisor: float | None = None, *, weighted: bool = False) -> Sums:
        """Fold what is pending; with `divisor`, finish: the sum becomes the mean."""
        sums = Sums(finite=True)
        weights = [weight for *_, weight in self._pending] if weighted else None
        for block in self._blocks:
            segment = self.layout.segments[block.segment]
            result = self._reducer.fold(
                self.mean[block.segment][block.start : block.stop],
                [link.gradient(worker, block) for link, worker, _ in self._pending],
                segment.dtype,
                start=self._is_empty,
                weights=weights,
                divisor=divisor,
                norms=self._norms,
            )
            sums.finite &= result.finite
            sums.sum_squares += result.sum_squares
            self._gradient_squares += sum(result.gradient_squares)
        self._pending.clear()
        self._is_empty = divisor is not None
        sums.gradient_squares = self._gradient_squares
        if divisor is not None:
            self._gradient_squares = 0.0
        return sums

    def forget(self) -> None:
        """Drop the sum and what is pending: the step will not be closed."""
        self._pending.clear()
        self._is_empty, self._gradient_squares = True, 0.0
