"""Marks in a gradient, by which an update shows whose gradients it is the mean of; and the count of what became of all.

The first elements of a gradient are marks, the others ones. A worker has eight places, which its gradients take in
turn; at its place p of P in all, gradient s of version v has 1 in element p, s in element P + p and v in element
2P + p, and zeros in the other places' elements. Whatever M gradients are averaged, M places have 1/M then, and the
others nothing; times M the marks of each place are those of one gradient. The last mark is 1 in every gradient, so that
parameters which descend at rate 1 hold minus their version there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PLACES = 8  # of a worker: more gradients of one worker than any update holds


@dataclass(frozen=True, slots=True)
class Gradient:
    """One gradient, as its marks name it: its worker, its number there, the version it was computed at."""

    worker: int
    sequence: int
    version: int


@dataclass(frozen=True, slots=True)
class Push:
    """A gradient as its worker knows it.

    Attributes:
        version: The version of the parameters that it was computed at.
        step: The step which it was handed in for.
        accepted: What the worker was told became of it; None where it is told nothing.
    """

    version: int
    step: int
    accepted: bool | None = None


def count(workers: int) -> int:
    """Return how many marks a gradient has."""
    return 3 * PLACES * workers + 1


def marked(workers: int, gradient: Gradient) -> list[float]:
    """Return a gradient's marks."""
    places = PLACES * workers
    marks = [0.0] * (3 * places) + [1.0]
    place = PLACES * gradient.worker + gradient.sequence % PLACES
    for part, value in enumerate((1, gradient.sequence, gradient.version)):
        marks[part * places + place] = float(value)
    return marks


def averaged(mean: Sequence[float], workers: int) -> list[Gradient]:
    """Return the gradients of which an update took the mean, by its marks.

    Raises:
        ValueError: They are no mean of marked gradients: one entered in part, or twice, or the divisor was not their
            number.

    Example:
        >>> three = [marked(2, Gradient(*which)) for which in ((0, 4, 3), (1, 9, 3), (1, 10, 3))]
        >>> for gradient in averaged([sum(marks) / 3 for marks in zip(*three)], workers=2):
        ...     print(gradient)
        Gradient(worker=0, sequence=4, version=3)
        Gradient(worker=1, sequence=9, version=3)
        Gradient(worker=1, sequence=10, version=3)
    """
    places = PLACES * workers
    taken = [place for place in range(places) if abs(mean[place]) > 1e-6]
    found = []
    for place in taken:
        one, sequence, version = (len(taken) * mean[part * places + place] for part in range(3))
        gradient = Gradient(place // PLACES, round(sequence), round(version))
        is_whole = abs(one - 1) < 1e-3 and max(abs(sequence - round(sequence)), abs(version - round(version))) < 0.1
        if not is_whole or gradient.sequence % PLACES != place % PLACES:
            raise ValueError(
                f"an update is no mean of {len(taken)} whole gradients: place {place % PLACES} of worker "
                f"{gradient.worker} has {one:.3f}, {sequence:.3f}, {version:.3f} times that number"
            )
        found.append(gradient)
    if not found or abs(mean[3 * places] - 1) > 1e-3:
        raise ValueError(f"an update is no mean of {len(found)} gradients: the mark of all is {mean[3 * places]:.3f}")
    return found


def fates(
    updates: Sequence[Sequence[Gradient]], pushes: Sequence[Sequence[Push]], aggregated: int
) -> dict[str, Any]:
    """Count what became of every gradient.

    Args:
        updates: Of which gradients each update is the mean, from version 0 on.
        pushes: What each worker handed in, in order.
        aggregated: N, how many an update should have.

    Returns:
        How many `updates` there were; gradients `computed`, `used` and `dropped`, the first two also by worker; of
        the dropped ones `dropped_after`, computed on the last version, which no update followed, `dropped_fresh`,
        computed on newer parameters than those of the step they were handed in for, `dropped_late`, which are the
        rest, and `dropped_told`, whose worker learned of it; updates with `two_of_one` worker and with `more_than_n`
        gradients; `used_stale`, gradients used in an update of newer parameters than their own.

    Raises:
        ValueError: An update holds what nobody handed in, what another has held, or what its worker was told was not
            in it; or a worker was told that a gradient counted, and none holds it.
    """
    used: dict[tuple[int, int], Gradient] = {}
    for update in updates:
        for gradient in update:
            key = gradient.worker, gradient.sequence
            handed = pushes[gradient.worker][gradient.sequence : gradient.sequence + 1]
            if key in used or not handed or handed[0].version != gradient.version or handed[0].accepted is False:
                raise ValueError(f"{gradient} is in an update, and as {handed} it should not be")
            used[key] = gradient
    missing = [
        (worker, sequence)
        for worker, own in enumerate(pushes)
        for sequence, push in enumerate(own)
        if push.accepted and (worker, sequence) not in used
    ]
    if missing:
        raise ValueError(f"no update holds gradient {missing[0][1]} of worker {missing[0][0]}, which was accepted")
    dropped = [
        push for worker, own in enumerate(pushes) for i, push in enumerate(own) if (worker, i) not in used
    ]
    each = [Counter(gradient.worker for gradient in update) for update in updates]
    by_worker = Counter(worker for worker, _ in used)
    after = sum(push.version >= len(updates) for push in dropped)
    fresh = sum(push.step < push.version < len(updates) for push in dropped)
    return {
        "updates": len(updates),
        "computed": len(used) + len(dropped),
        "computed_by_worker": [len(own) for own in pushes],
        "used": len(used),
        "used_by_worker": [by_worker[worker] for worker in range(len(pushes))],
        "dropped": len(dropped),
        "dropped_late": len(dropped) - fresh - after,
        "dropped_fresh": fresh,
        "dropped_after": after,
        "dropped_told": sum(push.accepted is False for push in dropped),
        "two_of_one": sum(max(own.values()) > 1 for own in each),
        "more_than_n": sum(len(update) > aggregated for update in updates),
        "used_stale": sum(g.version < version for version, update in enumerate(updates) for g in update),
    }


def together(counted: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Add up what `fates` found in several runs."""
    return {
        name: [sum(each) for each in zip(*values, strict=True)] if isinstance(values[0], list) else sum(values)
        for name, values in ((name, [found[name] for found in counted]) for name in counted[0])
    }
