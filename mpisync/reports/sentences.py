"""A run in a few sentences, as HTML."""

from __future__ import annotations

from collections import Counter

import numpy as np

from mpisync.records.schema import recorded_late_work
from mpisync.reports.columns import ACCEPTED, LATE, REJECTED, Run
from mpisync.reports.figures import SPLIT, Figures, seconds_to_loss
from mpisync.reports.selection import AGAIN, Selection
from mpisync.reports.words import costs, count, many, safe, seconds, share

__all__ = ["bias", "comparison", "ending", "policy_of", "summary"]

_NOT_DISCARDED = (*AGAIN, "carry")
_NOTEWORTHY = 1.5  # times the typical worker's, from which a worker is called slow


def policy_of(run: Run) -> str:
    """Return a run's policy, and what it does with late work if not discard it."""
    kind, _ = recorded_late_work(run.header)
    return f"{safe(run.header.policy, 60)}{f', on_late={kind}' if kind in _NOT_DISCARDED else ''}"


def ending(run: Run) -> str:
    """Return how a run ended, in a few words."""
    if run.end is not None:
        return f"{'failed ' if run.end.failure else ''}at version {run.end.version:,}"
    return "not known" if run.is_damaged else "goes on, or was killed"


def bias(selection: Selection) -> str:
    """Say in a sentence whether what counts was selected by its cost."""
    if not selection.dropped.any():
        return "Nothing was dropped."
    if not selection.groups:
        return "Too little was dropped, or kept, to tell whether cost makes a difference."
    p = f"p = {selection.p:.2g}" if selection.p >= 1e-12 else "p &lt; 10⁻¹²"
    test = (
        f"χ² test that all costs are dropped alike: χ² = {selection.chi_square:.3g}, "
        f"{many(len(selection.groups) - 1, 'degree')} of freedom, {p}"
    )
    if not selection.is_biased:
        return f"Cost makes no difference beyond chance to what is dropped ({test})."
    low, high = (end(selection.groups, key=lambda group: group.share) for end in (min, max))
    return (
        f"<b>What counts is biased by cost</b>: of gradients that cost {costs(high.first, high.last)}, "
        f"{share(high.share)} were dropped, of those that cost {costs(low.first, low.last)}, {share(low.share)} "
        f"({test})."
    )


def summary(figures: Figures) -> list[str]:
    """Return a run in sentences, as HTML."""
    run = figures.run
    hosts = Counter(run.header.hosts)
    where = safe(run.header.hosts[0]) if len(hosts) == 1 else f"{len(hosts):,} hosts"
    begin = f"<b>{policy_of(run)}</b> with {many(run.header.workers, 'worker')} on {where}"
    if not len(run):
        return [f"{begin}: no step has closed.", _ended(figures)]
    lines = [
        f"{begin}: {many(len(run), 'step')} in {seconds(run.took_s)}, "
        f"<b>{count(figures.rate)} samples/s</b>; a step takes {seconds(figures.step_s[0])} "
        f"(median), 95 % take less than {seconds(figures.step_s[1])}."
    ]
    lines += [tell(figures) for tell in _SENTENCES]
    return [line for line in lines if line]


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio >= 99.5 else f"{ratio:.2g} times" if ratio >= 2 else f"{ratio:.2f} times"


def _fates(figures: Figures) -> str:
    totals = figures.verdicts.sum(axis=1)
    given, counted = int(totals.sum()), int(figures.run.gradients["counted"].sum())
    if not given:
        return ""
    if totals[ACCEPTED] == given:
        return f"All {many(given, 'gradient')} counted."
    lines = [f"<b>{share(counted, given)}</b> of {many(given, 'gradient')} counted"]
    if totals[LATE]:
        late = figures.verdicts[LATE]
        worst = int(late.argmax())
        lines.append(
            f"{totals[LATE]:,} came too late and {_became(figures, int(totals[LATE]))}, "
            f"{late[worst]:,} of them worker {worst}'s"
        )
    if totals[REJECTED]:
        reasons = "; ".join(f"{safe(reason)} ×{n:,}" for reason, n in figures.run.reasons.most_common(3))
        lines.append(f"{totals[REJECTED]:,} rejected ({reasons})")
    return "; ".join(lines) + "."


def _became(figures: Figures, late: int) -> str:
    """Say what became of so many late gradients."""
    verb = "was" if late == 1 else "were"
    if recorded_late_work(figures.run.header)[0] in AGAIN:
        return f"{verb} computed again"
    added = int((figures.run.gradients["counted"] & (figures.run.gradients["verdict"] == LATE)).sum())
    return f"{verb} discarded{f' but for {added:,} that were added to later ones' if added else ''}"


def _slowest(figures: Figures) -> str:
    known = np.flatnonzero(np.isfinite(figures.typical_s))
    if len(known) < 2:
        return ""
    usual_s = float(np.median(figures.typical_s[known]))
    worst = int(known[figures.typical_s[known].argmax()])
    own_s = float(figures.typical_s[worst])
    if own_s < _NOTEWORTHY * usual_s:
        return f"Workers are about equally fast: the slowest, {worst}, takes {seconds(own_s)} a gradient."
    slow = int((figures.typical_s[known] >= _NOTEWORTHY * usual_s).sum())
    others = f" {slow:,} workers take at least {_NOTEWORTHY:g} times the median." if slow > 1 else ""
    times = f", {_times(own_s / usual_s)} the median of {seconds(usual_s)}" if usual_s else ""
    return (
        f"<b>Worker {worst}</b> on {safe(figures.run.header.hosts[worst])} is the slowest: "
        f"{seconds(own_s)} a gradient{times}.{others}"
    )


def _waited_for(figures: Figures) -> str:
    """Name the worker that most steps waited for, if they are many and it is not by chance."""
    steps, workers = int(figures.lasts.sum()), figures.run.header.workers
    most = int(figures.lasts.max(initial=0))
    if not steps or workers < 2 or most < max(2 * steps / workers + 3, steps / 5):
        return ""
    return f"{share(most, steps)} of the steps had worker {int(figures.lasts.argmax())}'s gradient as their last."


def _time(figures: Figures) -> str:
    shares = dict(zip(SPLIT, figures.shares, strict=True))
    root = shares["reduce"] + shares["update"] + shares["publish"]
    discarded = f", {share(shares['discarded'])} on gradients that did not count" if shares["discarded"] else ""
    data = f"{share(shares['data'])} for data, " if shares["data"] >= 0.02 else ""
    return (
        f"Workers spent {share(shares['compute'])} of the time computing what counted{discarded}; they "
        f"waited {data}{share(shares['wait'])} for each other and {share(root)} for the root."
    )


def _losses(figures: Figures) -> str:
    loss = figures.curve.values
    if not len(loss):
        return ""
    return f"The training loss went from {count(float(loss[0]))} to {count(float(loss[-1]))}."


def _metric(figures: Figures) -> str:
    found = figures.metric.values
    if not len(found):
        return ""
    if len(found) == 1:
        return f"The metric was {count(float(found[0]))} when it was evaluated."
    went = f"{count(float(found[0]))} to {count(float(found[-1]))}"
    return f"The metric went from {went} in {len(found):,} evaluations."


def _selected(figures: Figures) -> str:
    return bias(figures.selection) if figures.selection is not None and figures.selection.is_biased else ""


def _ended(figures: Figures) -> str:
    run = figures.run
    end, planned = run.end, run.planned
    if end is None:
        how = "is not known" if run.is_damaged else "is not recorded: it goes on, or was killed"
        return f"How the run ended {how}.{f' {planned:,} steps were planned.' if planned is not None else ''}"
    if end.failure:
        return f"<b>It failed at version {end.version:,}</b>: {safe(end.failure, 500)}"
    before = f", before the {many(planned, 'step')} that were planned" if planned and end.version < planned else ""
    return f"It ended at version {end.version:,}{before}."


def _dead(figures: Figures) -> str:
    alive = int(figures.run.steps["alive"][-1])
    if alive >= figures.run.header.workers:
        return ""
    return f"<b>{many(figures.run.header.workers - alive, 'worker')}</b> had left or died by the last step."


_SENTENCES = (_ended, _fates, _selected, _slowest, _waited_for, _time, _losses, _metric, _dead)


def comparison(runs: list[Figures], names: list[str]) -> list[str]:
    """Return how runs compare, in sentences, as HTML; the first is the measure."""
    lines = []
    first = runs[0]
    for figures, name in zip(runs[1:], names[1:], strict=True):
        if first.rate and figures.rate:
            times = figures.rate / first.rate
            pace = f"<b>{_times(times)}</b> as many" if times >= 1 else f"only {share(times)} as many"
            lines.append(f"{name} used {pace} samples per second as {names[0]}.")
    reached = seconds_to_loss([figures.curve for figures in runs])
    if reached is not None and len(runs) > 1:
        loss, times_s = reached
        each = ", ".join(
            f"{name} after {seconds(time_s)}" for name, time_s in zip(names, times_s, strict=True)
        )
        lines.append(f"A training loss of {count(loss)}, the lowest that all reached, came: {each}.")
    return lines
