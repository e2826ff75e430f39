"""Charts as SVG that takes its colours from the page's style, so that light, dark and print differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Line", "bars", "lines"]

_WIDTH, _HEIGHT = 360, 216  # near a phone's width, so that letters keep their size there
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 8, 34
_LOG_FROM = 20.0  # a greater ratio of extremes is shown by a logarithmic scale


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        x: Its points.
        y: Their heights.
        low: The lower edge of a band around it.
        high: The band's upper edge.
    """

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray


class _Scale:
    """Maps values to places, and knows where its ticks are."""

    def __init__(self, values: np.ndarray, ends: tuple[float, float], *, may_log: bool) -> None:
        low, high = float(values.min()), float(values.max())
        self.is_log = may_log and low > 0 and high / low > _LOG_FROM
        if not self.is_log:
            low = min(low, 0.0) if low > 0 and low < 0.6 * high else low
        if high <= low:
            low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
        self._low, self._high = (math.log10(low), math.log10(high)) if self.is_log else (low, high)
        self._ends = ends

    def __call__(self, values: np.ndarray) -> np.ndarray:
        values = np.log10(values) if self.is_log else values
        begin, end = self._ends
        return np.asarray(begin + (values - self._low) / (self._high - self._low) * (end - begin))

    def ticks(self, most: int) -> list[float]:
        """Return round values within the scale."""
        if self.is_log:
            decades = range(math.floor(self._low), math.ceil(self._high) + 1)
            steps = (1, 2, 5) if self._high - self._low < 2 else (1,)
            ticks = [step * 10.0**decade for decade in decades for step in steps]
            inside = [t for t in ticks if self._low <= math.log10(t) <= self._high]
            return inside[:: max(1, math.ceil(len(inside) / (most + 1)))]
        rough = (self._high - self._low) / most
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough * 0.999)
        begin, end = math.ceil(self._low / step), math.floor(self._high / step + 1e-9)
        return [step * n for n in range(begin, end + 1)]


def lines(
    curves: Sequence[Line],
    title: str,
    x_name: str,
    y_name: str = "loss",
) -> str:
    """Return a chart of one or several curves; the n-th is drawn in the style ``rn``.

    Args:
        curves: What to draw; those without points are left out.
        title: What it shows, for those who cannot see it.
        x_name: What goes to the right.
        y_name: What goes up.
    """
    shown = [(place, curve) for place, curve in enumerate(curves) if len(curve.x)]
    x_scale = _Scale(
        np.concatenate([curve.x for _, curve in shown] + [np.zeros(1)]),
        (_LEFT, _WIDTH - _RIGHT),
        may_log=False,
    )
    heights = [heights for _, curve in shown for heights in (curve.y, curve.low, curve.high)]
    y_scale = _Scale(np.concatenate(heights), (_HEIGHT - _BOTTOM, _TOP), may_log=True)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">']
    parts += _axes(x_scale, y_scale, x_name, y_name)
    for place, curve in shown:
        x = x_scale(curve.x)
        edge = _path(np.append(x, x[::-1]), y_scale(np.append(curve.low, curve.high[::-1])))
        parts.append(f'<path class="band r{place % 6}" d="{edge}Z"/>')
    for place, curve in shown:
        x, y = x_scale(curve.x), y_scale(curve.y)
        if len(x) == 1:
            parts.append(f'<circle class="dot r{place % 6}" cx="{x[0]:.1f}" cy="{y[0]:.1f}" r="3"/>')
        parts.append(f'<path class="line r{place % 6}" d="{_path(x, y)}"/>')
    return "".join(parts) + "</svg>"


def _axes(x_scale: _Scale, y_scale: _Scale, x_name: str, y_name: str) -> list[str]:
    parts = []
    ticks = y_scale.ticks(4)
    for tick in ticks:
        y = float(y_scale(np.array(tick)))
        parts.append(
            f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
            f'<text x="{_LEFT - 5}" y="{y + 3:.1f}" class="end">{_short(tick, max(ticks))}</text>'
        )
    ticks = x_scale.ticks(4)
    for tick in ticks:
        x = float(x_scale(np.array(tick)))
        anchor = "end" if x > _WIDTH - 30 else "mid"
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 20}" class="{anchor}">{_short(tick, max(ticks))}</text>')
    name = f"{x_name}{f' ({y_name}: log scale)' if y_scale.is_log else ''}"
    parts.append(f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 4}" class="mid">{name}</text>')
    return parts


def _short(value: float, greatest: float) -> str:
    """Return a tick's value in few letters, in the unit of the scale's greatest.

    Example:
        >>> [_short(tick, 1.5e6) for tick in (0, 5e5, 1.5e6)], _short(5000, 9000), _short(1e-3, 0.1)
        (['0', '0.5M', '1.5M'], '5000', '0.001')
    """
    units = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k"))
    letter = next((letter for least, letter in units if greatest >= least), "")
    if not value or not letter or greatest >= 1e15:
        return f"{value:.6g}"
    return f"{value / {'T': 1e12, 'G': 1e9, 'M': 1e6, 'k': 1e3}[letter]:.6g}{letter}"


def _path(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))


def bars(parts: np.ndarray, classes: Sequence[str], title: str) -> str:
    """Return stacked bars, a row each, stretched to whatever room they have.

    Args:
        parts: Lengths by class and row.
        classes: The style of each class.
        title: What it shows, for those who cannot see it.
    """
    totals = parts.sum(axis=0)
    ends = 1000 * np.cumsum(parts, axis=0) / np.maximum(totals.max(initial=0.0), 1e-300)
    rows = parts.shape[1]
    gap = 0.12 if rows <= 48 else 0.0
    drawn = []
    for row_class, lefts, rights in zip(classes, np.vstack([0 * ends[:1], ends]), ends, strict=False):
        boxes = [
            f"M{left:.1f} {row + gap:g}H{right:.1f}v{1 - 2 * gap:g}H{left:.1f}z"
            for row, (left, right) in enumerate(zip(lefts, rights, strict=True))
            if right - left > 0.05
        ]
        if boxes:
            drawn.append(f'<path class="{row_class}" d="{"".join(boxes)}"/>')
    return (
        f'<svg viewBox="0 0 1000 {max(rows, 1)}" preserveAspectRatio="none" role="img" '
        f'aria-label="{title}">{"".join(drawn)}</svg>'
    )
