"""Whether what counts is a fair selection: samples used and dropped by the cost of their batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mpisync.records.schema import recorded_late_work
from mpisync.reports.columns import LATE, Run

__all__ = ["AGAIN", "NO_COST", "Group", "Selection", "chi_square_tail", "select"]

AGAIN = ("retry", "requeue")  # on_late= under which late batches are computed again, and not dropped
NO_COST = -1000  # the class of costs that have no logarithm
_FEWEST_EXPECTED = 5.0  # of a kind in a class, below which the test's distribution does not hold (Cochran's rule)
_CHANCE = 1e-3  # what happens by chance more rarely is no chance


@dataclass(frozen=True)
class Group:
    """Neighbouring classes of cost that are large enough together to be tested.

    Attributes:
        first: Its least class k, of costs from 2^k to 2^(k+1).
        last: Its greatest.
        counted: How many of its gradients counted.
        dropped: How many did not.
    """

    first: int
    last: int
    counted: int
    dropped: int

    @property
    def share(self) -> float:
        """Which share of its gradients was dropped."""
        return self.dropped / (self.counted + self.dropped)


@dataclass(frozen=True)
class Selection:
    """What became of samples, by classes of cost.

    Attributes:
        classes: Class k is of costs from 2^k to 2^(k+1); the first may hold all that are not positive.
        used: Samples that went into updates, by class.
        dropped: Samples that did not.
        again: Samples that were late and are computed again.
        is_small: Whether a class has too few gradients to say anything on its own.
        groups: What was tested against each other; empty where there is too little.
        chi_square: Pearson's statistic of the groups' counted and dropped gradients.
        p: How likely chance alone makes it so large; 1 without groups.
    """

    classes: np.ndarray
    used: np.ndarray
    dropped: np.ndarray
    again: np.ndarray
    is_small: np.ndarray
    groups: list[Group]
    chi_square: float
    p: float

    @property
    def is_biased(self) -> bool:
        """Whether chance alone hardly makes some costs be dropped so much more often than others."""
        return self.p < _CHANCE


def select(run: Run) -> Selection | None:
    """Hold the costs of what counted against those of what did not; None where no cost is known."""
    gradients = run.gradients
    cost = gradients["cost"].astype(float)
    known = np.isfinite(cost)
    if not known.any():
        return None
    cost = cost[known]
    classes, row = np.unique(np.where(cost > 0, np.frexp(cost)[1] - 1, NO_COST), return_inverse=True)
    counted, again = gradients["counted"][known], _computed_again(run)[known]
    kinds = (counted, ~counted & ~again, again)
    samples = gradients["own_samples"][known].astype(float)
    used, dropped, again = (np.bincount(row[kind], samples[kind], len(classes)) for kind in kinds)
    kept, lost = (np.bincount(row[kind], minlength=len(classes)) for kind in kinds[:2])
    # So many gradients may be expected to hold enough of the rarer kind.
    enough = _FEWEST_EXPECTED * max(int(kept.sum() + lost.sum()), 1) / max(min(int(kept.sum()), int(lost.sum())), 1e-9)
    groups = _groups(classes, kept, lost, enough)
    chi_square = _chi_square(groups)
    p = chi_square_tail(chi_square, len(groups) - 1) if groups else 1.0
    return Selection(classes, used, dropped, again, kept + lost < enough, groups, chi_square, p)


def _computed_again(run: Run) -> np.ndarray:
    """Say which late gradients were not given up."""
    gradients, (kind, limit) = run.gradients, recorded_late_work(run.header)
    late = np.asarray(gradients["verdict"] == LATE)
    if kind not in AGAIN:
        return np.zeros_like(late)
    if kind == "retry" and limit:
        # After so many times in a row the next batch comes, and its count begins.
        order = np.lexsort((gradients["sequence"], gradients["worker"]))
        places, begins = np.arange(len(order)), np.diff(gradients["worker"][order], prepend=-1) != 0
        before = np.where(late[order], np.where(begins, places - 1, -1), places)
        in_a_row = places - np.maximum.accumulate(before)
        late[order[(in_a_row > 0) & (in_a_row % (limit + 1) == 0)]] = False
    return late


def _groups(classes: np.ndarray, kept: np.ndarray, lost: np.ndarray, enough: float) -> list[Group]:
    """Join neighbouring classes until each group has enough gradients; none where there are not two groups."""
    groups: list[Group] = []
    first, counted, dropped = int(classes[0]), 0, 0
    for one, own_kept, own_lost in zip(classes.tolist(), kept.tolist(), lost.tolist(), strict=True):
        first = one if not counted + dropped else first
        counted, dropped = counted + own_kept, dropped + own_lost
        if counted + dropped >= enough:
            groups.append(Group(first, one, counted, dropped))
            counted = dropped = 0
    if counted + dropped and groups:
        end = groups.pop()
        groups.append(Group(end.first, int(classes[-1]), end.counted + counted, end.dropped + dropped))
    return groups if len(groups) > 1 else []


def _chi_square(groups: list[Group]) -> float:
    table = np.array([[group.counted, group.dropped] for group in groups], float).reshape(-1, 2)
    if not table.size:
        return 0.0
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    return float(((table - expected) ** 2 / expected).sum())


def chi_square_tail(value: float, freedom: int) -> float:
    """Return how likely a chi-square variable of so many degrees of freedom is greater.

    It is the incomplete gamma function Q(freedom / 2, value / 2), by its recurrence in the first argument:
    https://dlmf.nist.gov/8.8#E6

    Example:
        >>> [round(chi_square_tail(*one), 3) for one in ((3.841, 1), (5.991, 2), (11.07, 5), (18.307, 10))]
        [0.05, 0.05, 0.05, 0.05]
    """
    half = value / 2
    if half <= 0:
        return 1.0
    a = 1.0 if freedom % 2 == 0 else 0.5
    tail = math.exp(-half) if freedom % 2 == 0 else math.erfc(math.sqrt(half))
    while a < freedom / 2:
        tail += math.exp(a * math.log(half) - half - math.lgamma(a + 1))
        a += 1
    return min(tail, 1.0)
