"""Heat maps, step × worker, as small images: their size does not grow with the run."""

from __future__ import annotations

import base64
import struct
import zlib
from dataclasses import dataclass

import numpy as np

from mpisync.reports.columns import LATE, REJECTED
from mpisync.reports.figures import Figures

__all__ = ["HeatMap", "response_map", "verdict_map"]

_MOST_COLUMNS, _MOST_ROWS = 720, 240
_WIDE, _HIGH = 600, 240  # pixels, at least
_LEVELS = 32
# Blue is fast and red is slow: told apart by all, on light ground and on dark.
_SLOWNESS = ((44, 123, 182), (124, 190, 219), (255, 236, 160), (253, 160, 84), (206, 27, 40))
_VERDICTS = ((78, 144, 196), (240, 145, 40))  # from accepted to late
_REJECTED = (176, 36, 150)


@dataclass(frozen=True)
class HeatMap:
    """A picture, a cell a few steps of a few workers; blank is where no gradient was computed.

    Attributes:
        uri: The image, as what an ``src`` may hold.
        rows: How many rows of cells it has.
        low: What the first colour stands for.
        high: What the last one stands for.
    """

    uri: str
    rows: int
    low: float = 0.0
    high: float = 1.0


class _Grid:
    """Which cell each gradient falls into: its worker's row, the column of the step it was for."""

    def __init__(self, figures: Figures) -> None:
        run, spans = figures.run, figures.spans
        version = run.gradients["version"][spans.order] - run.first
        self.inside = (version >= 0) & (version < len(run))
        self.columns = max(min(len(run), _MOST_COLUMNS), 1)
        self.rows = min(run.header.workers, _MOST_ROWS)
        column = version[self.inside] * self.columns // max(len(run), 1)
        row = run.gradients["worker"][spans.order][self.inside] * self.rows // run.header.workers
        self._cell = row * self.columns + column

    def sums(self, values: np.ndarray | None = None) -> np.ndarray:
        """Return each cell's sum of the gradients' values, or their number."""
        weights = None if values is None else values[self.inside]
        found = np.bincount(self._cell, weights, self.rows * self.columns)
        return found.reshape(self.rows, self.columns)


def response_map(figures: Figures) -> HeatMap:
    """Paint how long after a version's publication its gradients arrived, by a logarithmic scale."""
    grid = _Grid(figures)
    seconds = figures.spans.response_s
    known = np.isfinite(seconds)
    least_s = float(seconds[known & (seconds > 0)].min(initial=1.0))
    logs = np.log(np.where(known, np.maximum(seconds, least_s), 1.0))
    counts, sums = grid.sums(known.astype(float)), grid.sums(np.where(known, logs, 0.0))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums / counts
    shown = means[counts > 0]
    low, high = (float(x) for x in np.quantile(shown, (0.02, 0.98))) if len(shown) else (0.0, 0.0)
    high = max(high, low + 0.1)
    level = np.clip((means - low) / (high - low), 0.0, 1.0) * (_LEVELS - 1)
    cells = np.where(counts > 0, 1 + np.nan_to_num(level).round(), 0)
    return HeatMap(_png(cells, _ramp(_SLOWNESS)), grid.rows, float(np.exp(low)), float(np.exp(high)))


def verdict_map(figures: Figures) -> HeatMap:
    """Paint what became of the gradients for each step: the share that was late, and rejections."""
    grid = _Grid(figures)
    verdict = figures.run.gradients["verdict"][figures.spans.order]
    counts, late = grid.sums(), grid.sums((verdict == LATE).astype(float))
    rejected = grid.sums((verdict == REJECTED).astype(float)) > 0
    cells = np.where(counts > 0, 1 + (late / np.maximum(counts, 1) * (_LEVELS - 1)).round(), 0)
    cells[rejected] = _LEVELS + 1
    return HeatMap(_png(cells, [*_ramp(_VERDICTS), _REJECTED]), grid.rows)


def _ramp(stops: tuple[tuple[int, int, int], ...]) -> list[tuple[int, ...]]:
    places = np.linspace(0, len(stops) - 1, _LEVELS)
    bands = [np.interp(places, range(len(stops)), band) for band in zip(*stops, strict=True)]
    return [tuple(int(round(value)) for value in colour) for colour in zip(*bands, strict=True)]


def _png(cells: np.ndarray, colours: list[tuple[int, ...]]) -> str:
    """Return an image as a data URI: 0 is transparent, and the others number the colours from 1.

    It is a PNG with a palette (https://www.w3.org/TR/png, colour type 3), and needs no library.
    """
    # Browsers smooth what they enlarge: cells are made large enough here.
    cells = cells.repeat(-(-_HIGH // cells.shape[0]), axis=0).repeat(-(-_WIDE // cells.shape[1]), axis=1)
    height, width = cells.shape
    rows = np.zeros((height, width + 1), np.uint8)  # each begins with its filter: none
    rows[:, 1:] = cells
    palette = bytes(3) + bytes(band for colour in colours for band in colour)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", palette),
        (b"tRNS", b"\0"),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    )
    image = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return "data:image/png;base64," + base64.b64encode(image).decode()
