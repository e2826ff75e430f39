"""The sentences of an advice."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import median

from mpisync.planning.bounds import selection_bias
from mpisync.planning.choices import Choice, Choices, DeadlineChoice
from mpisync.planning.diagnosis import LEVEL, Straggling
from mpisync.planning.laws import Seconds
from mpisync.planning.observed import Observed
from mpisync.planning.regimes import Change, Regimes
from mpisync.planning.remedies import Remedies

_NAMED = 5  # workers in a sentence
_CHANGES_NAMED = 5


def many(number: int, noun: str) -> str:
    """Return for example `1 step`, `3 steps`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def seconds(value_s: float) -> str:
    """Return seconds for people: 3 digits, in ms below a second."""
    return f"{value_s * 1e3:.3g} ms" if value_s < 1 else f"{value_s:.3g} s" if value_s < 1000 else f"{value_s:,.0f} s"


def duration(value_s: float) -> str:
    """Return a longer time for people."""
    if value_s < 100:
        return seconds(value_s)
    return f"{value_s / 60:.0f} minutes" if value_s < 6000 else f"{value_s / 3600:.1f} hours"


def faster(gain: float, than: str = "") -> str:
    """Return for example `3.5 % faster`, `1.97 times as fast as now`."""
    if gain >= 1.5:
        return f"{gain:.2f} times as fast" + (than and f" as {than}")
    text = f"{(gain - 1) * 100:.1f} % faster" if gain >= 1 else f"{(1 - gain) * 100:.1f} % slower"
    return text + (than and f" than {than}")


def _split(one: Choice) -> str:
    return f"b = {one.backup} (N = {one.accepted} of {one.accepted + one.backup})"


def _known(made: Choices) -> bool:
    return not math.isinf(made.efficiency.noise)


# -- headlines -------------------------------------------------------------------------------------


def too_few(steps: int, fewest: int, good: int, takes_s: float) -> str:
    """The headline where there are too few steps."""
    return (
        f"{many(steps, 'step')} {'is' if steps == 1 else 'are'} too few to tell: at least {fewest} are needed, and "
        f"{good} are good, which take about {duration(takes_s)} here."
    )


def alike(found: Straggling) -> str:
    """The headline where nobody straggles."""
    return (
        f"b = 0: the workers are alike, and waiting for all of them costs {(found.slowest_over_mean - 1) * 100:.1f} % "
        "of a step."
    )


def _if_stopped(best: Choice) -> str:
    """What is to be added to a gain that supposes that late gradients are finished."""
    if best.stopped_gain < best.gain + 0.003:
        return ""
    return f" ({faster(best.stopped_gain)} if late workers stop early)"


def use(made: Choices) -> str:
    """The headline where backups pay."""
    best = made.best
    least = "" if _known(made) else "at least "
    return (
        f"Use {_split(best)}: training is {least}{faster(best.gain, 'with b = 0')}{_if_stopped(best)}, its steps "
        f"{faster(best.per_step)}. In code policy=mpisync.BackupWorkers({best.backup}), on the command line "
        f"--policy backup:{best.backup}."
    )


def little(made: Choices, found: Straggling) -> str:
    """The headline where backups gain little."""
    best = made.best
    least = "" if _known(made) else "at least "
    return (
        f"Backups gain little here: with {_split(best)} training is {least}{faster(best.gain, 'with b = 0')}"
        f"{_if_stopped(best)}, although the slowest of a step takes {(found.slowest_over_mean - 1) * 100:.0f} % longer "
        "than the mean."
    )


def nothing(made: Choices) -> str:
    """The headline where backups gain nothing."""
    first = made.options[1]
    text = (
        f"b = 0: backups gain nothing here. With b = {first.backup} steps are {faster(first.per_step)}, but each uses "
        f"{first.accepted} of {first.accepted + first.backup} gradients"
    )
    if _known(made) or first.pays_below <= 0:
        return f"{text}."
    tells = "--noise-scale or --iterations would tell"
    if math.isinf(first.pays_below):
        return f"{text}: {faster(first.per_sample)} where noise dominates, more where it does not, which {tells}."
    return f"{text}; that pays only where the noise scale is below {first.pays_below:.3g} gradients, which {tells}."


def unsure(best: Choice, steps: int, more: int) -> str:
    """The headline where the steps leave it open."""
    return (
        f"Not sure yet: b = {best.backup} seems {faster(best.gain, 'b = 0')}, but from {faster(best.low)} to "
        f"{faster(best.high)} fits these {steps} steps too (95 %). About {more} steps would tell; b = 0 until then."
    )


def rebalance(found: Straggling, remedies: Remedies, best: Choice, observed: Observed) -> str:
    """The headline where slowness is the machines'."""
    if not found.slow:
        return (
            "Rebalance: the workers differ in speed, always in the same way. With batches in proportion to it "
            f"(weight=\"samples\") all is {faster(remedies.rebalanced, 'now')}; {_split(best)} is {faster(best.gain)}."
        )
    slow, one = found.slow, len(found.slow) == 1
    if 2 * len(slow) > len(remedies.shares):
        fast = [c for c in range(len(remedies.shares)) if c not in {each.column for each in slow}]
        return (
            f"Rebalance: {workers(fast, observed)} {'is' if len(fast) == 1 else 'are'} fast, and the other {len(slow)} "
            f"take {_times([each.ratio for each in slow])} as long, in {slow[-1].share:.0%} of the steps. With batches "
            f"in proportion to speed (weight=\"samples\") all is {faster(remedies.rebalanced, 'now')}."
        )
    usual = [c for c in range(len(remedies.shares)) if c not in {each.column for each in slow}]
    share = remedies.shares[slow[0].column] / median(remedies.shares[usual])
    return (
        f"Rebalance or exclude {workers(sorted(each.column for each in slow), observed)}: "
        f"{'it takes' if one else 'they take'} {_times([each.ratio for each in slow])} as long as the others in "
        f"{slow[0].share:.0%} of the steps. With a batch {share:.2f} times as large as "
        f"theirs (weight=\"samples\") all is {faster(remedies.rebalanced, 'now')}; without {'it' if one else 'them'} "
        f"{faster(remedies.excluded)}, on {'one machine' if one else many(len(slow), 'machine')} fewer. Backups "
        f"({_split(best)}: {faster(best.gain)}) would discard {'its' if one else 'their'} work for ever."
    )


def workers(columns: list[int], observed: Observed) -> str:
    """Return workers' names in a sentence."""
    if len(columns) == len(observed.workers) > 1:
        return "all workers"
    names = [f"{observed.workers[c]}{_on(observed, c)}" for c in columns[:_NAMED]]
    more = f" and {len(columns) - _NAMED} more" if len(columns) > _NAMED else ""
    return f"worker{'' if len(columns) == 1 else 's'} {', '.join(names)}{more}"


def _times(ratios: list[float]) -> str:
    """Return for example `2.36 times`, `3 to 4 times`."""
    low, high = min(ratios), max(ratios)
    return f"{median(ratios):.2f} times" if high <= 1.15 * low else f"{low:.2f} to {high:.2f} times"


# -- changes ---------------------------------------------------------------------------------------


def when(found: Regimes, whole: Observed) -> str:
    """What is to be added to a headline that is not for all steps."""
    numbers = whole.step_numbers
    if found.stop < len(numbers):
        return f" That is for steps {numbers[found.start]} to {numbers[found.stop - 1]}, before the last change."
    return f" That is since step {numbers[found.start]}, when speeds changed." if found.start else ""


def regimes(found: Regimes, whole: Observed, fewest: int) -> list[str]:
    """What changed in the run, and which steps the advice is for."""
    numbers = whole.step_numbers
    lines = [_change(one, whole) for one in found.changes[:_CHANGES_NAMED]]
    if (more := len(found.changes) - _CHANGES_NAMED) > 0:
        lines.append(f"After that there are {many(more, 'change')} more.")
    if found.drift:
        columns, ratios = list(found.drift), list(found.drift.values())
        lines.append(
            f"{_capital(workers(columns, whole))} {_s('change', columns)} speed little by little: at the end a "
            f"gradient takes {_times(ratios)} as long as at the start. `Adaptive` follows that; the advice is for the "
            "mean."
        )
    if found.switching:
        lines.append(
            f"{_capital(workers(found.switching, whole))} {_s('switch', found.switching)} between speeds again and "
            "again, which is counted as chance, not as a change."
        )
    last = [one for one in found.changes if one.stop is None]
    if not last:
        return lines
    rows = len(numbers)
    if (found.start, found.stop) == (0, rows):
        why = f"no speed holds for {fewest} steps" if len(last) < 5 else "speeds change too often"
        lines.append(f"The advice is for all steps, since {why}: `Adaptive` follows such changes.")
    elif found.stop == rows:
        lines.append(
            f"The advice is for what holds since the last change: the {rows - found.start} steps from "
            f"{numbers[found.start]} on."
        )
    else:
        lines.append(
            f"Since the last change there are {rows - last[-1].start} steps, and {fewest} are needed: the advice is "
            f"for steps {numbers[found.start]} to {numbers[found.stop - 1]}, before it. Whether it lasts cannot be "
            "told yet."
        )
    return lines


def _change(one: Change, whole: Observed) -> str:
    numbers, who = whole.step_numbers, workers(one.columns, whole)
    if one.stop is None:
        take = f"{_s('take', one.columns)} {_times(one.ratios)}"
        return f"From step {numbers[one.start]} on {who} {take} as long as before."
    return (
        f"{_capital(who)} took {_times(one.ratios)} as long in steps {numbers[one.start]} to {numbers[one.stop - 1]} "
        f"({many(one.stop - one.start, 'step')}) as before and after."
    )


def _s(verb: str, columns: list[int]) -> str:
    """Return a verb for one worker or several."""
    return verb if len(columns) > 1 else verb + ("es" if verb.endswith("ch") else "s")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


# -- reasons ---------------------------------------------------------------------------------------


def straggling(found: Straggling, observed: Observed) -> list[str]:
    """How workers straggle: who, when, together or not."""
    lines = [
        f"A gradient takes {seconds(found.mean_s)} on average (median {seconds(found.median_s)}); the slowest of a "
        f"step takes {found.slowest_over_mean:.2f} times the mean."
    ]
    if found.slow:
        each = ", ".join(
            f"{observed.workers[one.column]}{_on(observed, one.column)} ×{one.ratio:.2f}" for one in found.slow[:_NAMED]
        )
        more = f" and {len(found.slow) - _NAMED} more" if len(found.slow) > _NAMED else ""
        usual = len(observed.workers) - len(found.slow)
        lines.append(f"Persistently slow, against the median of the other {usual}: worker {each}{more}.")
    elif found.rank_p < LEVEL:
        lines.append(
            f"Some workers are slower than others, always the same ones (Kendall's W {found.rank_effect:.3f}, "
            f"p {found.rank_p:.2g}), but none stands out."
        )
    else:
        lines.append(f"No worker is slower than the others (Friedman's test: p {found.rank_p:.2g}).")
    if found.is_clustered:
        index = found.clustering if found.clustering_p < LEVEL else found.together
        lines.append(
            f"Slowness clusters: how much of it there is in a step varies {index:.1f} times as much as if workers were "
            f"independent (p {min(found.clustering_p, found.together_p):.2g}). Laws of independent times mislead here."
        )
    else:
        lines.append("It does not cluster: workers are slow independently of one another.")
    if min(found.autocorrelation_p, found.drift_p) < LEVEL:
        lines.append(
            f"It lasts: times resemble those one step before (rank correlation {found.autocorrelation:.2f} within "
            f"workers, {found.drift:.2f} of the steps)."
        )
    elif not found.slow:
        lines.append("It is transient: who is slow in one step is as fast as others in the next.")
    return lines


def infinite(stopped_s: Seconds | None) -> list[str]:
    """Whether the law has no mean to wait for."""
    endless = 0 if stopped_s is None else sum(map(math.isinf, stopped_s))
    if not endless:
        return []
    return [
        f"The tail of this law is so heavy that the mean time to the last {many(endless, 'gradient')} is infinite: "
        "what is said of few backups is what the steps drawn had, and more of them would say worse."
    ]


def _on(observed: Observed, column: int) -> str:
    return f" on {observed.hosts[column]}" if observed.hosts else ""


def sureness(best: Choice, made: Choices, steps: int, *, is_law: bool, late_stop: bool) -> list[str]:
    """How sure the choice is."""
    if not best.backup:
        return []
    what = f"{many(steps, 'step')} {'drawn from the law' if is_law else 'measured'}, resampled in blocks"
    chosen = f"b = {made.fewest}" if made.fewest == made.most else f"b from {made.fewest} to {made.most}"
    lines = [
        f"How sure: b = {best.backup} is between {faster(best.low)} and {faster(best.high)} (95 %), and resamples "
        f"choose {chosen} ({what})."
    ]
    if not late_stop:
        lines.append(
            "Late workers finish their gradients here, and may miss several steps. If the loop stops them early "
            f"(session.stale()), it is {faster(best.stopped_gain)}."
        )
    return lines


def noise(made: Choices) -> list[str]:
    """By what steps with different N were compared."""
    efficiency, best = made.efficiency, made.best
    if not _known(made):
        text = f"The gradients' noise is {efficiency.source}."
        if best.backup:
            text += f" With little noise b = {best.backup} gains up to what its steps do, {faster(best.per_step)}."
        return [text]
    text = f"Noise scale N_c = {efficiency.noise:.3g} gradients ({efficiency.source}): J(N) ∝ 1 + N_c/N."
    if efficiency.low is not None and efficiency.high is not None:
        ends = [made.best_for(replace(efficiency, noise=one)).backup for one in (efficiency.high, efficiency.low)]
        choice = f"b = {ends[0]}" if ends[0] == ends[1] else f"b from {ends[0]} to {ends[1]}"
        text += f" It is between {efficiency.low:.3g} and {efficiency.high:.3g} (95 %), for which {choice} is best."
    workers = made.options[0].accepted
    if efficiency.noise > 10 * workers:
        text += " Noise dominates: accepted samples are what counts."
    elif efficiency.noise < 0.1 * workers:
        text += " There is little noise: fewer gradients a step would do."
    return [text]


def policy(best: Choice, deadline: DeadlineChoice | None) -> list[str]:
    """Whether a deadline would do better."""
    if deadline is None or max(deadline.gain, best.gain) < 1.01:
        return []
    form = f"deadline:{deadline.seconds:.3g},at_least={deadline.at_least}"
    if deadline.gain > 1.01 * best.gain:
        return [
            f"A deadline is better: --policy {form} is {faster(deadline.gain, 'b = 0')}, accepting "
            f"{deadline.accepted:.1f} gradients on average; but it must be tuned anew when speeds change."
        ]
    return [f"A deadline is no better: the best, {form}, is {faster(deadline.gain, 'b = 0')}."]


def asynchronous(best: Choice, made: Choices, mean_s: float) -> list[str]:
    """What waiting for nobody would gain in updates: K·E[X]/P for K-batch-async."""
    if made.best.gain < 1.01:
        return []
    workers = best.accepted + best.backup
    update_s = best.accepted * mean_s / workers + made.overhead_s
    return [
        f"Asynchronously (--policy async:k={best.accepted}) an update would take {seconds(update_s)}, "
        f"{faster(best.step_s / update_s, f'steps with b = {best.backup}')}, by gradients about "
        f"{workers / best.accepted:.1f} versions old; what that costs in convergence cannot be told from times."
    ]


def discarding(best: Choice, by_cost: Seconds, found: Straggling) -> list[str]:
    """What is discarded, and who bears it."""
    if not best.backup:
        return []
    workers = best.backup + best.accepted
    lines = [
        f"With b = {best.backup}, {best.backup / workers:.1%} of the gradients and {best.discarded:.1%} of the "
        "computing are discarded."
    ]
    if not found.slow:
        lines.append(
            "If slowness is the samples' (long sequences, large images), the mean gradient is biased, by "
            f"{selection_bias(best.backup, workers):.2f} standard deviations of one gradient at most: of the dearest "
            f"quarter {by_cost[-1]:.0%} are discarded, of the cheapest {by_cost[0]:.0%}. If it is the machines', and "
            "all sample the whole data, there is no bias."
        )
    return lines


def others(remedies: Remedies, found: Straggling) -> list[str]:
    """What else would help."""
    lines = []
    if remedies.data_share > 0.5:
        lines.append(
            f"{remedies.data_share:.0%} of what slow gradients take beyond the usual is waiting for data: give the "
            "loader more workers or faster storage first."
        )
    if remedies.samples_correlation > 0.5:
        lines.append(
            f"Time goes with the number of samples (correlation {remedies.samples_correlation:.2f}): make batches of "
            "equal cost, since discarding the dear ones is biased."
        )
    transient = not found.slow and not found.is_clustered and found.rank_p >= LEVEL
    if transient and found.event_rate < 0.005 and 1.05 < found.slowest_over_mean < 1.5:
        lines.append(
            "Light, independent and transient is how batches of unequal cost look (sequence lengths). Batches of equal "
            f"cost would be up to {faster(remedies.equal, 'now')}."
        )
    return lines


def rest(made: Choices) -> str:
    """What backups would do among those that are not slow."""
    workers = made.options[0].accepted
    if not made.best.backup:
        return f"The other {workers} workers alone need no backups."
    gain = faster(made.best.gain, "with b = 0")
    return f"With the other {workers} workers alone, {_split(made.best)} is {gain}."


def check(observed: Observed, made: Choices) -> list[str]:
    """How this model of a step compares with the run's own steps."""
    name, _, backup = (observed.policy or "").partition(":")
    if name != "backup" or observed.step_s is None:
        return []
    same = [one for one in made.options if str(one.backup) == backup]
    if not same:
        return []
    off = abs(same[0].step_s / observed.step_s - 1)
    text = (
        f"The run's own steps ({observed.policy}) took {seconds(observed.step_s)} on average; this model says "
        f"{seconds(same[0].step_s)}."
    )
    return [text if off <= 0.1 else f"{text} They differ by {off:.0%}: trust the gains no further than that."]
