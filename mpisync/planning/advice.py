"""How many backup workers: the answer in plain words, how sure it is, and what would help instead."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mpisync.planning import words
from mpisync.planning.bounds import drop_rates, drop_rates_by_cost
from mpisync.planning.choices import Choice, Choices, DeadlineChoice, Watched, best_deadline, choices, needed_steps
from mpisync.planning.diagnosis import LEVEL, Straggling, diagnose
from mpisync.planning.efficiency import Efficiency
from mpisync.planning.laws import Seconds
from mpisync.planning.observed import Observed, during
from mpisync.planning.regimes import Regimes, find_regimes
from mpisync.planning.remedies import Remedies, remedies

__all__ = ["FEWEST_STEPS", "UNKNOWN_NOISE", "Advice", "advise", "since_last_change"]

FEWEST_STEPS = 20  # below, resampling tells nothing of how sure an answer is
GOOD_STEPS = 200
UNKNOWN_NOISE = Efficiency(
    math.inf, source="not known, so only accepted samples count, which is the least that backups can gain"
)

_ALIKE = 1.02  # E[max]/mean up to which workers are alike
_NOTHING, _LITTLE = 1.01, 1.06  # gains up to which backups gain nothing, little
_REMEDY = 1.03  # the gain from which a remedy is named first
_CHANGED = 1.03  # what a half's best choice may cost in the other half


@dataclass(frozen=True)
class Advice:
    """The answer.

    Attributes:
        verdict: 'use' backups, they gain 'little' or 'nothing', 'rebalance' first, 'unsure', or
            'declined' where too little is known.
        backup: b that is advised; None where the answer was declined.
        headline: The answer in a sentence or two.
        reasons: What it rests on and what else is to be known, one sentence or more each.
        choices: What each b costs and gains; None where the answer was declined.
        straggling: How workers straggle; None likewise.
        remedies: What else would help; None likewise.
        deadline: The best deadline in place of a number; None likewise.
        observed: The times it is from: those since the last change, if there was one.
        whole: All times that were observed.
        regimes: What changed in them; None where the answer was declined, or they are a law's.
        dropped: The share of each worker's gradients that b would discard.
        dropped_by_cost: The same for the cheapest to the dearest quarter of the gradients.
    """

    verdict: str
    backup: int | None
    headline: str
    reasons: list[str]
    observed: Observed
    whole: Observed
    regimes: Regimes | None = None
    choices: Choices | None = None
    straggling: Straggling | None = None
    remedies: Remedies | None = None
    deadline: DeadlineChoice | None = None
    dropped: list[float] = field(default_factory=list)
    dropped_by_cost: list[float] = field(default_factory=list)


def advise(
    observed: Observed, efficiency: Efficiency = UNKNOWN_NOISE, *, stopped_s: Seconds | None = None,
    is_law: bool = False, late_stop: bool = False, seed: int = 0, watched: Watched = iter,
) -> Advice:
    """Say how many backup workers to use.

    Args:
        observed: Times that were measured, or drawn from a law.
        efficiency: J(N).
        stopped_s: E[T_(N)] for N = 1..P where it is known exactly, in seconds.
        is_law: Whether the times are a law's, so that more of them could be had.
        late_stop: Whether late gradients are stopped at once (`session.stale()`).
        seed: Of everything drawn.
        watched: Goes through the choices; may show a bar.

    Example:
        >>> import numpy as np
        >>> from mpisync.planning.observed import observe
        >>> rng = np.random.default_rng(0)
        >>> advise(observe(rng.normal(1.0, 0.001, (50, 4)))).headline
        'b = 0: the workers are alike, and waiting for all of them costs 0.1 % of a step.'
    """
    whole, regimes = observed, None
    declined = _declined(observed.times_s)
    if declined:
        return Advice("declined", None, declined, _so_far(observed.times_s), observed, observed)
    if not is_law:
        observed, regimes = since_last_change(whole)
    times_s = observed.times_s
    steps, workers = times_s.shape
    straggling = diagnose(times_s, seed=seed)
    made = choices(
        times_s, efficiency, overhead_s=observed.overhead_s, stopped_s=stopped_s, late_stop=late_stop,
        seed=seed, watched=watched,
    )  # fmt: skip
    others = remedies(
        times_s, [one.column for one in straggling.slow], efficiency, overhead_s=observed.overhead_s,
        data_s=observed.data_s, samples=observed.samples,
    )  # fmt: skip
    verdict, headline, best = _answer(observed, straggling, made, others, steps, is_law)
    dropped = drop_rates(times_s, best.backup)
    by_cost = drop_rates_by_cost(times_s, best.backup)
    deadline = best_deadline(times_s, efficiency, overhead_s=observed.overhead_s) if steps * workers < 1e7 else None
    reasons = [
        *([] if regimes is None else words.regimes(regimes, whole, FEWEST_STEPS)),
        *words.straggling(straggling, observed)[: 1 if is_law else None],
        *words.infinite(stopped_s),
        *words.sureness(best, made, steps, is_law=is_law, late_stop=late_stop),
        *words.noise(made),
        *words.policy(made.best, deadline),
        *words.asynchronous(best, made, straggling.mean_s),
        *words.discarding(best, by_cost, straggling),
        *([] if is_law else words.others(others, straggling)),
        *words.check(observed, made),
    ]
    if straggling.slow and verdict == "rebalance":
        usual = [c for c in range(workers) if c not in {one.column for one in straggling.slow}]
        if len(usual) > 1:
            rest = choices(times_s[:, usual], efficiency, overhead_s=observed.overhead_s, late_stop=late_stop)
            reasons.append(words.rest(rest))
    if not is_law and _regime_changes(times_s, made, late_stop):
        reasons.append("The two halves of the run want different b: `Adaptive` follows such changes.")
    if regimes is not None:
        headline += words.when(regimes, whole)
    return Advice(
        verdict, best.backup, headline, reasons, observed, whole, regimes, made, straggling, others, deadline,
        dropped.tolist(), by_cost.tolist(),
    )  # fmt: skip


def since_last_change(observed: Observed) -> tuple[Observed, Regimes]:
    """Return the steps that an advice is for, and what changed.

    Example:
        >>> import numpy as np
        >>> from mpisync.planning.observed import observe
        >>> times_s = np.random.default_rng(0).lognormal(0.0, 0.1, (100, 4))
        >>> times_s[60:] *= 2
        >>> since_last_change(observe(times_s))[0].step_numbers[[0, -1]].tolist()
        [60, 99]
    """
    regimes = find_regimes(observed.times_s, observed.measured, fewest=FEWEST_STEPS)
    if (regimes.start, regimes.stop) == (0, len(observed.times_s)):
        return observed, regimes
    return during(observed, regimes.start, regimes.stop), regimes


def _declined(times_s: Seconds) -> str:
    """Say why there can be no answer; "" if there can."""
    steps, workers = times_s.shape
    if workers == 1:
        return "There is one worker, which waits for nobody: backups take two workers at least."
    if steps < FEWEST_STEPS:
        takes_s = GOOD_STEPS * float(times_s.max(axis=1).mean())
        return words.too_few(steps, FEWEST_STEPS, GOOD_STEPS, takes_s)
    return ""


def _so_far(times_s: Seconds) -> list[str]:
    if times_s.shape[1] == 1:
        return [f"Its gradients took {words.seconds(float(times_s.mean()))} on average."]
    ratio = float(times_s.max(axis=1).mean() / times_s.mean())
    return [
        f"So far a gradient takes {words.seconds(float(times_s.mean()))} on average, and the slowest of a step "
        f"{ratio:.2f} times as long."
    ]


def _answer(
    observed: Observed, straggling: Straggling, made: Choices, others: Remedies, steps: int, is_law: bool
) -> tuple[str, str, Choice]:
    """Return the verdict, the headline and the choice that is advised."""
    none, best = made.options[0], made.best
    if straggling.slowest_over_mean < _ALIKE:
        return "nothing", words.alike(straggling), none
    lasting = straggling.slow or (straggling.rank_p < LEVEL and straggling.rank_effect > 0.1)
    if lasting and others.rebalanced >= _REMEDY:
        return "rebalance", words.rebalance(straggling, others, best, observed), none if straggling.slow else best
    if best.gain <= _NOTHING:
        return "nothing", words.nothing(made), none
    if best.low <= 1 and not is_law:
        more = needed_steps(steps, best.gain, best.low, best.high)
        return "unsure", words.unsure(best, steps, more), none
    if best.gain < _LITTLE:
        return "little", words.little(made, straggling), best
    return "use", words.use(made), best


def _regime_changes(times_s: Seconds, made: Choices, late_stop: bool) -> bool:
    """Whether one half's best choice costs the other half more than 3 % beyond its own best."""
    steps = len(times_s)
    if steps < 2 * FEWEST_STEPS or made.best.gain < _NOTHING:
        return False
    halves = [
        choices(half, made.efficiency, overhead_s=made.overhead_s, late_stop=late_stop)
        for half in (times_s[: steps // 2], times_s[steps // 2 :])
    ]
    for own, other in (halves, halves[::-1]):
        same = next(one for one in own.options if one.backup == other.best.backup)
        # Only what is beyond the noise of so few steps counts.
        if own.best.gain / same.gain > _CHANGED and own.best.low > same.high:
            return True
    return False
