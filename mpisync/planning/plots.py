"""The plots of a plan: waiting, gain, who was slow when, the law of the times; then what policies make of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from mpisync.planning.advice import Advice
from mpisync.planning.choices import Choices
from mpisync.planning.fitting import Fit
from mpisync.planning.laws import Seconds
from mpisync.planning.played import decided, raced
from mpisync.planning.trials import Decisions, Trials

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

# Okabe and Ito's colours, which the colour-blind tell apart; dashes tell them apart in grey.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#595959"
_LAWS_DRAWN = 3
_MOST_CELLS = 200  # of the picture of all times, in each direction
_LOGARITHMIC = 3  # times the median from which colours are on a logarithmic scale
_LEAST_GAIN, _FARTHEST = 0.8, 6  # choices that lose more, or have more times as many backups, are off the plot


def draw(
    advice: Advice, fits: list[Fit], path: str, trials: Trials | None = None, decisions: Decisions | None = None
) -> None:
    """Draw a plan into a file.

    Args:
        advice: The plan.
        fits: Laws fitted to its times, the best first; may be empty.
        path: The file; its ending says how: .svg, .png or .pdf.
        trials: How the policies train a model.
        decisions: The N_t of `Adaptive`.

    Raises:
        RuntimeError: There is no matplotlib.
        ValueError: The ending is none of those.
        OSError: The file cannot be written.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending not in (".svg", ".png", ".pdf"):
        raise ValueError(f"a plot's file must end in .svg, .png or .pdf, not {path!r}")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError("plots need matplotlib: pip install 'mpisync[report]'") from None
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none",
             "svg.hashsalt": "mpisync", "axes.titlesize": 10, "axes.titlelocation": "left"}  # fmt: skip
    with rc_context(style):
        rows = 2 if trials is None and decisions is None else 3
        figure = Figure(figsize=(10.5, 3.8 * rows), layout="constrained")
        axes = figure.subplots(rows, 2)
        times_s = advice.observed.times_s
        _waiting(axes[0, 0], times_s, fits, advice.backup)
        if advice.choices is None:
            axes[0, 1].set_axis_off()
            axes[0, 1].text(0.5, 0.5, "too little is known to choose b", ha="center", va="center")
        else:
            _gains(axes[0, 1], advice.choices, advice.backup)
        _picture(axes[1, 0], advice, figure)
        _tail(axes[1, 1], times_s, fits)
        if rows > 2:
            raced(axes[2, 0], trials, advice)
            decided(axes[2, 1], decisions, times_s.shape[1])
        # Without the date the same plan gives the same file.
        figure.savefig(path, dpi=150, metadata={"Date": None} if ending == ".svg" else None)


def _waiting(axes: Axes, times_s: Seconds, fits: list[Fit], backup: int | None) -> None:
    workers = times_s.shape[1]
    ordered = np.sort(times_s, axis=1)
    k = np.arange(1, workers + 1)
    low, high = np.quantile(ordered, [0.1, 0.9], axis=0)
    axes.fill_between(k, low, high, color=_BLUE, alpha=0.2, linewidth=0, label="8 of 10 steps")
    axes.plot(k, ordered.mean(axis=0), color=_BLUE, marker=_marker(workers), markersize=4, label="mean")
    if fits:
        law_s = fits[0].law.order_statistics_s(workers)
        axes.plot(k, law_s, color=_ORANGE, linestyle="--", label=f"{fits[0].law.NAME}, independent")
    if backup:
        axes.axvline(workers - backup, color=_GREY, linewidth=1, linestyle=":")
        axes.annotate(
            f"N = {workers - backup} ", (workers - backup, 0.97), xycoords=("data", "axes fraction"), ha="right",
            va="top", color=_GREY,
        )  # fmt: skip
    axes.set(title="Waiting for the k-th gradient", xlabel=f"k of {workers} workers", ylabel="time in the step (s)")
    _whole(axes)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, loc="lower left" if low[0] > 0.4 * high[-1] else "upper left")


def _gains(axes: Axes, made: Choices, backup: int | None) -> None:
    last = max(10, _FARTHEST * made.best.backup)
    shown = [one for one in made.options if one.gain >= _LEAST_GAIN and one.backup <= last]
    b = [one.backup for one in shown]

    def percent(name: str) -> list[float]:
        return [(getattr(one, name) - 1) * 100 for one in shown]

    marker = _marker(len(b))
    axes.fill_between(b, percent("low"), percent("high"), color=_BLUE, alpha=0.2, linewidth=0, label="its 95 % band")
    axes.plot(b, percent("gain"), color=_BLUE, marker=marker, markersize=4, label="time to target")
    axes.plot(b, percent("per_step"), color=_ORANGE, linestyle="--", label="steps a second")
    if not np.allclose(percent("per_sample"), percent("gain")):
        axes.plot(b, percent("per_sample"), color=_GREEN, linestyle="-.", label="accepted gradients a second")
    axes.axhline(0, color=_GREY, linewidth=0.8)
    if backup in b:
        at = percent("gain")[b.index(backup)]
        axes.plot([backup], [at], marker="o", markersize=11, markerfacecolor="none", color=_GREY, linestyle="none",
                  label=f"advised: b = {backup}")  # fmt: skip
    noise = made.efficiency.noise
    basis = "noise not known: samples count" if np.isinf(noise) else f"$N_c$ = {noise:.3g}"
    axes.set(title=f"Gain over b = 0 ({basis})", xlabel="backup workers b", ylabel="gain (%)")
    _whole(axes)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)  # curves go anywhere


def _picture(axes: Axes, advice: Advice, figure: Any) -> None:
    from matplotlib.colors import LogNorm, Normalize

    times_s, numbers = advice.whole.times_s, advice.whole.step_numbers
    first = int(numbers[0]) if len(numbers) else 0
    blocks = _blocks(times_s / np.median(times_s))
    low, top = float(np.quantile(blocks, 0.005)), max(float(np.quantile(blocks, 0.995)), 1.02)
    steps, workers = times_s.shape
    image = axes.imshow(
        blocks.T, aspect="auto", origin="lower", interpolation="nearest", cmap="cividis",
        norm=(LogNorm if top > _LOGARITHMIC else Normalize)(min(1.0, low), top),
        extent=(first - 0.5, first + steps - 0.5, -0.5, workers - 0.5),
    )  # fmt: skip
    bar = figure.colorbar(image, ax=axes, extend="both")
    if top > _LOGARITHMIC:
        ticks = [x for x in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000, 10_000) if min(1.0, low) <= x <= top]
        bar.set_ticks(ticks, labels=[f"{x:g}" for x in ticks], minor=False)
        bar.minorticks_off()
    bar.set_label("time / median of all")
    bar.outline.set_visible(False)
    coarse = " (longest of each cell)" if blocks.shape != times_s.shape else ""
    axes.set(title=f"Who was slow, and when{coarse}", xlabel="step", ylabel="worker")
    for end in () if advice.regimes is None else (advice.regimes.start, advice.regimes.stop):
        if 0 < end < steps:  # the steps that the advice is for
            axes.axvline(first + end - 0.5, color="white", linewidth=1.4, linestyle="--")
            axes.annotate(
                "change", (first + end - 0.5, 0.97), xycoords=("data", "axes fraction"), ha="center", va="top",
                fontsize=7, color="white", bbox={"facecolor": _GREY, "linewidth": 0, "pad": 1.5},
            )  # fmt: skip
    names = advice.observed.workers
    if names != list(range(workers)):
        axes.set_yticks(range(workers), [str(name) for name in names])
    else:
        _whole(axes, both=True)


def _blocks(values: Seconds) -> Seconds:
    """Reduce an array to the longest times of at most 200 × 200 cells."""
    for axis in (0, 1):
        size = values.shape[axis]
        if size > _MOST_CELLS:
            starts = np.linspace(0, size, _MOST_CELLS, endpoint=False).astype(int)
            values = np.maximum.reduceat(values, starts, axis=axis)
    return values


def _tail(axes: Axes, times_s: Seconds, fits: list[Fit]) -> None:
    times = np.sort(times_s, axis=None)
    beyond = 1 - np.arange(len(times)) / len(times)
    if len(times) > 5000:  # a curve needs no more points, but all of its tail
        last = len(times) - 1
        keep = np.unique(np.concatenate([np.linspace(0, last, 3000).astype(int), np.arange(last - 499, last + 1)]))
        times, beyond = times[keep], beyond[keep]
    grid = np.geomspace(times[0], times[-1] * 1.2, 300)
    styles = [(_ORANGE, "--"), (_GREEN, "-."), (_GREY, ":")]
    for fit, (colour, dashes) in zip(fits[:_LAWS_DRAWN], styles, strict=False):
        axes.plot(grid, np.exp(-fit.law.hazard(grid)), color=colour, linestyle=dashes, label=fit.law.NAME)
    axes.step(times, beyond, where="post", color=_BLUE, label="times", linewidth=1.8)
    axes.set_yscale("log")
    if times[-1] > 5 * times[0]:
        axes.set_xscale("log")
    axes.set_ylim(0.5 / times_s.size, 1.5)
    axes.set(title="How long gradients take", xlabel="t (s)", ylabel="share of gradients longer than t")
    axes.legend(frameon=False, loc="lower left")


def _whole(axes: Axes, *, both: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if both:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _marker(count: int) -> str:
    return "o" if count <= 40 else ""
