"""The running sum of a step's accepted gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpisync.kernels.fold import Reducer
from mpisync.transport.base import RootLink
from mpisync.transport.layout import Block, Layout, SgdSpan, aligned_bytes


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
        self._bound = 0.0  # no element of the sum can be larger in magnitude
        self._gradient_squares = 0.0

    def add(self, link: RootLink, worker: int, weight: float | None, peak: float) -> None:
        """Take note of a whole gradient, the largest magnitude in it `peak`; it must stay where it is until `fold`."""
        factor = 1.0 if weight is None else weight
        self._pending.append((link, worker, factor))
        self._bound += factor * peak

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
        self._is_empty = False
        sums.gradient_squares = self._gradient_squares
        if divisor is not None:
            self.forget()
        return sums

    def fused_sgd_step(
        self, parameters: Sequence[np.ndarray], spans: Sequence[SgdSpan], divisor: float, *, weighted: bool
    ) -> bool:
        """Fold what is pending and update parameters in the same pass, if the sum cannot but be finite.

        Args:
            parameters: One array a segment.
            spans: Which of them, and at which rates.
            divisor: Turns the sum into the mean.
            weighted: Whether the weights count.
        """
        kinds = [segment.dtype for segment in self.layout.segments]
        fits = all(kind.storage == kind.accumulator for kind in kinds) and self._pending and not self._norms
        # a float's own rounding adds at most a part in 2^23 an addition
        if not fits or not 1.01 * self._bound < min(float(np.finfo(kind.accumulator).max) for kind in kinds):
            return False
        weights = [weight for *_, weight in self._pending] if weighted else None
        for block in self._blocks:
            gradients = [link.gradient(worker, block) for link, worker, _ in self._pending]
            for span in spans:
                start, stop = max(span.start, block.start), min(span.stop, block.stop)
                if span.segment == block.segment and start < stop:
                    part = slice(start - block.start, stop - block.start)
                    self._reducer.fused_sgd_step(
                        parameters[block.segment][start:stop],
                        [gradient[part] for gradient in gradients],
                        kinds[block.segment],
                        accumulator=None if self._is_empty else self.mean[block.segment][start:stop],
                        weights=weights,
                        divisor=divisor,
                        rate=span.rate,
                    )
        self.forget()
        return True

    def forget(self) -> None:
        """Begin a new sum."""
        self._pending.clear()
        self._is_empty, self._bound, self._gradient_squares = True, 0.0, 0.0
