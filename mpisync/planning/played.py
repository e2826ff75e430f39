"""The plots of what policies make of a plan's delays: error against time, and the decisions of `Adaptive`."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING

import numpy as np

from mpisync.planning.advice import Advice
from mpisync.planning.trials import Decisions, Trials
from mpisync.records import StepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["decided", "raced"]

_GREY = "#595959"
_STATIC = ("#0072B2", "#56B4E9", "#7A8FB8", "#A3C4DC")  # the advised or best number first, then others
_OTHERS = {"deadline": ("#009E73", "-."), "async": ("#E69F00", ":"), "adaptive": ("#D55E00", "-")}
_POINTS = 400  # of a curve
_TOLD = 5  # decisions whose reason is told
_WIDTH = 92  # characters of a line below the decisions


def raced(axes: Axes, trials: Trials | None, advice: Advice) -> None:
    """Draw the error against time of each policy."""
    if trials is None:
        return _nothing(axes, "too many workers to play every gradient")
    first = advice.backup or (advice.choices.best.backup if advice.choices else 0)
    shades = iter(_STATIC[1:])
    for one in trials.each:
        kind, _, value = one.policy.partition(":")
        if kind == "backup" and value == "0":
            colour, dashes, width = _GREY, "-", 1.4
        elif kind == "backup":
            is_first = value == str(first)
            colour, dashes, width = (_STATIC[0] if is_first else next(shades)), "-" if is_first else "--", 1.4
        else:
            (colour, dashes), width = _OTHERS[kind], 1.8
        keep = np.unique(np.linspace(0, len(one.times_s) - 1, _POINTS).astype(int))
        axes.plot(
            one.times_s[keep], one.errors[keep], color=colour, linestyle=dashes, linewidth=width,
            label=f"{_short(one.policy)}  ×{one.sooner:.2f}",
        )  # fmt: skip
    axes.axhline(trials.target, color=_GREY, linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.set_xlim(0, trials.each[0].times_s[-1])
    noise = f"$N_c$ = {trials.noise:,.0f}" + (" assumed" if trials.is_assumed else " at its start")
    axes.set(
        title=f"Error against time (a model: a quadratic, {noise})", xlabel="time (s)", ylabel="error, of the first"
    )
    axes.legend(
        frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, fontsize=8,
        title="at the dotted line × times as soon as b = 0", title_fontsize=8,
    )  # fmt: skip


def _short(policy: str) -> str:
    """Return a policy's name for a legend."""
    kind, _, value = policy.partition(":")
    if kind == "deadline":
        return f"deadline, {value.rpartition('mads=')[2]} mads"
    return f"b = {value}" if kind == "backup" else policy


def decided(axes: Axes, decisions: Decisions | None, workers: int) -> None:
    """Draw the N of each step, with marks where it changed, and below them the reasons."""
    if decisions is None:
        return _nothing(axes, "too many workers to play every gradient")
    steps = decisions.steps
    number = np.array([step.step for step in steps])
    target = np.array([step.target for step in steps])
    axes.step(number, target, where="post", color="#D55E00", linewidth=1.6)
    axes.axhline(workers, color=_GREY, linewidth=0.8, linestyle=":")
    changed = [step for step in steps if step.why and " instead of " in step.why]
    axes.plot(
        [step.step for step in changed], [step.target for step in changed], "o", color="#D55E00", markersize=5,
        markeredgecolor="white",
    )  # fmt: skip
    told = sorted(sorted(changed, key=_saves, reverse=True)[:_TOLD], key=lambda step: step.step)
    for place, step in enumerate(told):
        axes.annotate(
            "abcde"[place], (step.step, step.target), xytext=(3, 5), textcoords="offset points", fontsize=8,
            fontweight="bold",
        )  # fmt: skip
    low, high = int(target.min()), max(int(target.max()), workers)
    axes.set_ylim(low - 0.06 * (high - low) - 0.6, high + 0.12 * (high - low) + 0.6)
    whose = "in this run" if decisions.is_own else "with these delays (played)"
    axes.set(title=f"What Adaptive decided {whose}", ylabel=f"N of {workers} workers")
    axes.set_xlabel("step")
    axes.annotate(
        _reasons(steps, told, len(changed) - len(told)), (0, 0), xytext=(0, -36), xycoords="axes fraction",
        textcoords="offset points", va="top", fontsize=6.5, linespacing=1.4,
    )  # fmt: skip
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _saves(step: StepRecord) -> int:
    found = re.search(r" saves (\d+)%", step.why or "")
    return int(found[1]) if found else 0


def _reasons(steps: list[StepRecord], told: list[StepRecord], more: int) -> str:
    """Return why N changed, and in the end stays."""
    lines = [
        textwrap.shorten(f"{'abcde'[place]}, step {step.step}: {step.why}", _WIDTH, placeholder=" …")
        for place, step in enumerate(told)
    ]
    if more:
        lines.append(f"and {more} that saved less")
    if last := next((step for step in reversed(steps) if step.why), None):
        lines.append(textwrap.shorten(f"last, step {last.step}: {last.why}", _WIDTH, placeholder=" …"))
    return "\n".join(lines)


def _nothing(axes: Axes, why: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, ha="center", va="center")
