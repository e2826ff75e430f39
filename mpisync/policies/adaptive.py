"""The first N_t of every step, where N_t follows from what the steps before it showed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mpisync.policies.backup import FirstN
from mpisync.policies.base import OpenStep, number_text, whole_number
from mpisync.records.kept import keep, recall
from mpisync.records.schema import StepRecord
from mpisync.records.turnarounds import Turnarounds, time_per_step

__all__ = ["Adaptive", "moments", "noise_scale_of"]

_WINDOW = 48  # steps that a decision looks back on
_PERIOD = 4  # steps from one decision to the next, and before the first
_MARGIN = 0.01  # what a change must save, of the cost, to be made
_CANDIDATES = 16  # values of N weighed at a decision, about
_SECONDS_PER_TIME = 3e-7  # that weighing costs, for each step looked back on, worker and candidate
_SHARE = 0.02  # of the root's time that decisions may cost


@dataclass(frozen=True)
class Adaptive(FirstN):
    """Close each step at the N-th gradient, and choose N as the run goes.

    N minimises (1 + N_c/N) · E[T_(N)], in proportion the time to a given error: with N gradients an
    update is worth 1/(1 + N_c/N) of one without noise, and the N-th arrives after T_(N) seconds.

    * E[T_(N)] comes from playing the last steps' turnarounds, worker by worker and version by version,
      with every N in question: late gradients count with the time at which they came, and who is
      still computing counts with what it has taken so far. So it sees persistent stragglers, slow
      steps common to many, and workers that are away for several steps.
    * N_c is V̂/‖∇F‖², the noise of one gradient against the gradient, estimated from the same steps:
      V̂ = (Σ‖g_j‖² − k‖ḡ‖²)/(k − 1) and ‖∇F‖² = ‖ḡ‖² − V̂/k, for k accepted gradients with mean ḡ.
      Where that is not above 0, or unknown since N is 1, all gradients count as noise: N_c = ∞.

    The first four steps do without one worker, whose time shows all the same, and which may hang
    without holding up the others; then N is weighed every fourth step, or less often where steps
    are so short that weighing would cost more than 2 % of them. It changes only where that saves at
    least 1 % of the cost. What a worker took before it became slower or faster, as three or four
    gradients in a row tell, is forgotten. `StepRecord.why` tells each decision.

    While N is all workers, one that hangs holds its step up until it wakes or is known to be dead:
    an `at_most` below the number of workers waits for nobody.
    The rate of the optimizer is not touched: `at_least` bounds how far the noise may grow.

    Invariant: every update is the mean of exactly N gradients from N distinct workers, all computed
    at the very parameters being updated, where N is the one decided before the step opened, or as
    many as can still be had when fewer are alive.

    Source: backup workers are those of J. Chen, X. Pan, R. Monga, S. Bengio, R. Jozefowicz,
    "Revisiting Distributed Synchronous SGD" (arXiv:1604.00981). Choosing N by gain and time after
    C. Xu, G. Neglia, N. Sebastianelli, "Dynamic backup workers for parallel machine learning"
    (arXiv:2004.14696); the noise scale after S. McCandlish, J. Kaplan, D. Amodei, "An Empirical
    Model of Large-Batch Training" (arXiv:1812.06162).

    Attributes:
        at_least: The smallest N; None for half of the workers.
        at_most: The greatest N; None for all workers.
        noise_scale: N_c, in gradients, if it is known; None to measure it. infinity chooses the most
            gradients a second, 0 the most updates.

    Example:
        >>> policy = Adaptive()
        >>> step = OpenStep(step=0, opened_s=0.0, workers=4, alive={0, 1, 2, 3})
        >>> policy.target(step)  # of the first steps
        3
        >>> str(Adaptive(at_least=2, noise_scale=300))
        'adaptive:at_least=2,noise_scale=300'
    """

    at_least: int | None = None
    at_most: int | None = None
    noise_scale: float | None = None
    _workers: int = field(default=0, repr=False)
    _n: int | None = field(default=None, repr=False)
    _why: str | None = field(default=None, repr=False)
    _decided: tuple[int, float] | None = field(default=None, repr=False)  # at which step, when
    _recent: tuple[StepRecord, ...] = field(default=(), repr=False, hash=False)

    def __post_init__(self) -> None:
        """Refuse values that make no sense with any number of workers."""
        for name in ("at_least", "at_most"):
            value = getattr(self, name)
            if value is not None:
                value = whole_number(name, value, 1, "an update needs a gradient")
                object.__setattr__(self, name, value)
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(
                f"at_least must not exceed at_most, but at_least is {self.at_least} and at_most "
                f"{self.at_most}: use at_least={self.at_most} or less"
            )
        if self.noise_scale is not None:
            if not self.noise_scale >= 0:  # true for NaN
                raise ValueError(
                    f"noise_scale must not be negative, not {self.noise_scale!r}: leave it out to "
                    "have it measured"
                )
            object.__setattr__(self, "noise_scale", float(self.noise_scale))

    def check(self, workers: int) -> None:
        """Refuse to need more gradients than there are workers."""
        if workers < 1 or (self.at_least or 1) > workers:
            raise ValueError(
                f"at_least must not exceed the number of workers, or a step can never close, "
                f"but at_least is {self.at_least or 1} with {workers} worker{'s' * (workers != 1)}: "
                f"use at_least={max(workers, 1)} or less, or start more ranks"
            )

    def _bounds(self, workers: int) -> tuple[int, int]:
        most = workers if self.at_most is None else min(self.at_most, workers)
        least = (workers + 1) // 2 if self.at_least is None else self.at_least
        return min(least, most), most

    def target(self, step: OpenStep) -> int:
        """Return N_t, or as many as can still be had."""
        return min(self._chosen(step.workers), step.reachable)

    def _chosen(self, workers: int) -> int:
        if self._n is not None:
            return self._n
        least, most = self._bounds(workers)
        return min(max(least, most - 1, 2), most)  # one gradient alone tells no noise

    @property
    def wants_norms(self) -> bool:
        """Whether the policy must measure the noise."""
        return self.noise_scale is None

    @property
    def why(self) -> str | None:
        """The decision for the open step, with its reason; None where the last one goes on."""
        return self._why

    def after(self, record: StepRecord) -> Adaptive:
        """Take note of a step; every few of them, decide on N."""
        seen = max((arrival.worker + 1 for arrival in record.arrivals), default=0)
        known = replace(
            self,
            _workers=max(self._workers, record.alive, seen),
            _recent=(*self._recent, record)[-_WINDOW:],
            _why=None,
        )
        return known._decide() if known._is_due() else known

    def _is_due(self) -> bool:
        last = self._recent[-1]
        if self._decided is None:
            return len(self._recent) >= _PERIOD
        step, at_s = self._decided
        costs_s = _SECONDS_PER_TIME * len(self._recent) * self._workers * len(self._candidates())
        return last.step + 1 >= step + _PERIOD and (last.published_s - at_s) * _SHARE >= costs_s

    def _current(self) -> int:
        return max(min(self._chosen(self._workers), self._recent[-1].alive), 1)

    def _candidates(self) -> list[int]:
        """Return the values of N to be weighed: all, or closer to the greatest where they are many."""
        least, most = self._bounds(self._workers)
        most = max(min(most, self._recent[-1].alive), 1)
        least = min(least, most)
        spread = most - least
        if spread < _CANDIDATES:
            return list(range(least, most + 1))
        below = {round((spread + 1) ** (i / (_CANDIDATES - 1))) - 1 for i in range(_CANDIDATES)}
        near = {n for n in range(self._current() - 1, self._current() + 2) if least <= n <= most}
        return sorted({most - b for b in below} | near)

    def _decide(self) -> Adaptive:
        """Weigh every N on the steps that are remembered."""
        records = self._recent[1:] if self._recent[0].step == 0 else self._recent  # step 0 warms up
        table = Turnarounds(self._recent, self._workers).table(records[0].step, len(records))
        between_s = statistics.fmean(record.published_s - record.closed_s for record in records)
        noise_scale = noise_scale_of(self._recent) if self.noise_scale is None else self.noise_scale

        def cost(n: int) -> float:
            step_s[n] = statistics.fmean(time_per_step(table, n)) + between_s
            return step_s[n] * (1 + noise_scale / n if math.isfinite(noise_scale) else 1 / n)

        step_s: dict[int, float] = {}
        costs = {n: cost(n) for n in {*self._candidates(), self._current()}}
        now, best = self._current(), min(costs, key=lambda n: (costs[n], -n))
        saves = 1 - costs[best] / costs[now] if costs[now] > 0 else 0.0
        chosen = best if saves >= _MARGIN else now
        why = f"N={chosen}"
        if chosen != now:
            why += f" instead of {now} saves {saves:.0%}: {step_s[best]:.3g} s a step for {step_s[now]:.3g} s"
        elif best != now:
            why += f" stays: {best} would save {saves:.1%} only"
        else:
            why += f" stays: the cheapest at {step_s[now]:.3g} s a step"
        why += f", noise scale {noise_scale:.3g}"
        last = self._recent[-1]
        return replace(self, _n=chosen, _why=why, _decided=(last.step + 1, last.published_s))

    def state(self) -> dict[str, Any]:
        """Return N, and the steps that the next decision looks back on."""
        decided = None if self._decided is None else list(self._decided)
        kept = {"workers": self._workers, "n": self._n, "why": self._why, "decided": decided}
        return {**kept, "recent": keep(self._recent)}

    def load(self, state: Mapping[str, Any], shift_s: float = 0.0) -> Adaptive:
        """Return this policy with what another had learnt; see `Policy.load`."""
        decided = None if state["decided"] is None else (state["decided"][0], state["decided"][1] + shift_s)
        return replace(
            self,
            _workers=state["workers"],
            _n=state["n"],
            _why=state["why"],
            _decided=decided,
            _recent=recall(state["recent"], shift_s),
        )

    def __str__(self) -> str:
        """Return for example `adaptive:at_least=4`."""
        values = {name: getattr(self, name) for name in ("at_least", "at_most", "noise_scale")}
        given = [f"{name}={number_text(value)}" for name, value in values.items() if value is not None]
        return f"adaptive:{','.join(given)}" if given else "adaptive"


def noise_scale_of(records: Iterable[StepRecord]) -> float:
    """Estimate the noise of one gradient against the gradient, from norms in records.

    The sums of V̂ and of ‖∇F‖² over the steps are divided, not their quotients averaged: each is
    unbiased, a quotient is not.

    Returns:
        N_c in gradients; infinity if the gradient cannot be told from noise, or no step has norms
        of at least two gradients.

    Example:
        >>> step = StepRecord(0, 0.0, 1.0, 1.0, 2, 2, [(0, 0, 0), (1, 0, 0)], [], norms=(20.0, 7.0))
        >>> noise_scale_of([step])  # V = (20 − 2·7)/1 = 6, ‖∇F‖² = 7 − 6/2 = 4
        1.5
    """
    noise = square = 0.0
    for record in records:
        if (estimates := moments(record)) is not None:
            noise += estimates[0]
            square += estimates[1]
    return noise / square if square > 0 else math.inf


def moments(record: StepRecord) -> tuple[float, float] | None:
    """Estimate the variance of one gradient, and the square of the gradient, from a step's norms.

    Returns:
        V̂ = (Σ‖g_j‖² − k‖ḡ‖²)/(k − 1) and ‖∇F‖² = ‖ḡ‖² − V̂/k, for k accepted gradients g_j with mean
        ḡ; both without bias, the second below 0 at times. None if the step has no norms of at least
        two gradients that are not all 0.

    Example:
        >>> moments(StepRecord(0, 0.0, 1.0, 1.0, 2, 2, [(0, 0, 0), (1, 0, 0)], [], norms=(20.0, 7.0)))
        (6.0, 4.0)
    """
    k = len(record.accepted)
    if record.norms is None or k < 2 or not all(map(math.isfinite, record.norms)):
        return None
    gradient_squares, mean_square = record.norms
    if not gradient_squares > 0:
        return None
    variance = max(gradient_squares - k * mean_square, 0.0) / (k - 1)
    return variance, mean_square - variance / k
