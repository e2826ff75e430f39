"""The running sum of a step's accepted gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpisync.device.base import Array, Memory
from mpisync.transport.base import RootLink
from mpisync.transport.layout import Layout, SgdSpan
from mpisync.transport.wire import GradientInfo


@dataclass
class Sums:
    """The properties of a finished sum."""

    finite: bool
    sum_squares: float = 0.0  # ‖mean‖²
    gradient_squares: float = 0.0  # Σ‖g_j‖²


class RunningSum:
    """A strict left fold, in order of acceptance, element by element.

    Gradients are taken note of first and folded several at a time, since each pass over the sum costs a read
    and a write of the model; how many are folded in a pass changes no bit of the result.

    Args:
        layout: Of a gradient.
        memory: Where the sum lies, and gradients.
        links: All from which gradients may come.
        weighted: Weight gradients by their samples instead of equally.
        norms: Compute squared norms with the mean.

    Attributes:
        mean: Where every step's mean will be, one array a segment, in the accumulator's dtype.
        extras: What the gradients of the step carried along, in order of acceptance.
    """

    def __init__(
        self, layout: Layout, memory: Memory, links: Sequence[RootLink], *, weighted: bool, norms: bool
    ) -> None:
        self.layout = layout
        self._memory, self._reducer = memory, memory.reducer
        self._weighted, self._norms = weighted, norms
        self.mean = [
            memory.allocate(s.count * s.dtype.accumulator.itemsize).view(s.dtype.accumulator)
            for s in layout.segments
        ]
        blocks = layout.wholes if all(link.is_contiguous for link in links) else layout.blocks
        self._blocks = [block for block in blocks if block.segment >= 0]
        self._kinds = [segment.dtype for segment in layout.segments]
        self._pending: list[tuple[RootLink, int, float]] = []
        self.extras: list[Array] = []
        self._is_empty = True
        self._bound = self._divisor = self._gradient_squares = 0.0

    def add(self, link: RootLink, worker: int, info: GradientInfo) -> None:
        """Take note of a whole gradient; all but its extras must stay where it is until `fold`."""
        factor = float(info.samples) if self._weighted else 1.0
        self._pending.append((link, worker, factor))
        self._divisor += factor
        self._bound += factor * info.peak  # no element of the sum can be larger in magnitude
        if self.layout.extras_bytes:
            parts = (link.gradient(worker, block) for block in self.layout.extras_blocks)
            self.extras.append(np.concatenate([self._memory.to_host(part) for part in parts]))

    @property
    def pending(self) -> list[int]:
        """The workers whose gradients wait to be folded."""
        return [worker for _, worker, _ in self._pending]

    def fold(self) -> None:
        """Fold the pending gradients, so that their memory is free again."""
        self._fold(None)

    def finish(self) -> Sums:
        """Fold the pending gradients, and make the sum the mean; the next gradient begins another sum."""
        sums = self._fold(self._divisor)
        sums.gradient_squares = self._gradient_squares
        self.forget()
        return sums

    def _fold(self, divisor: float | None) -> Sums:
        sums, weights = Sums(finite=True), self._weights()
        for block in self._blocks:
            result = self._reducer.fold(
                self.mean[block.segment][block.start : block.stop],
                [link.gradient(worker, block) for link, worker, _ in self._pending],
                self._kinds[block.segment],
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
        return sums

    def _weights(self) -> list[float] | None:
        return [weight for *_, weight in self._pending] if self._weighted else None

    def fused_sgd_step(self, parameters: Sequence[Array], spans: Sequence[SgdSpan]) -> bool:
        """Fold the pending gradients and update parameters in the same pass, if the sum is sure to be finite.

        Args:
            parameters: One array a segment.
            spans: Which of them, and at which rates.
        """
        kinds, weights = self._kinds, self._weights()
        fits = all(kind.storage == kind.accumulator for kind in kinds) and self._pending and not self._norms
        # a float's own rounding adds at most a part in 2^23 an addition
        if not fits or not 1.01 * self._bound < min(float(np.finfo(kind.accumulator).max) for kind in kinds):
            return False
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
                        divisor=self._divisor,
                        rate=span.rate,
                    )
        self.forget()
        return True

    def forget(self) -> None:
        """Begin a new sum."""
        self._pending.clear()
        self.extras = []  # whoever has the old ones keeps them
        self._is_empty = True
        self._bound = self._divisor = self._gradient_squares = 0.0
