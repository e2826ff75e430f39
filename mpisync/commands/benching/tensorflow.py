"""A step with backup workers in TensorFlow's SyncReplicasOptimizer and in mpisync, in turns in one run.

The last rank is the root, the others are W workers; rank 0 also starts TensorFlow's processes. In a turn TensorFlow
makes a number of updates while all ranks sleep, then mpisync trains for as long while TensorFlow's processes wait for
their next order.

TensorFlow's chief begins with N tokens in the queue, which is its hook's default. A worker takes a token after each
gradient, and with it the step its next one is for; W come with every update. So where fewer than W were taken, or with
those of the beginning, some are old: a worker that gets the open step's may count twice in it, and one that gets an
older step's computes in vain.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

from mpi4py import MPI

from mpisync.commands.benching import marks
from mpisync.commands.benching.blocks import Case, Played, ours, theirs
from mpisync.commands.benching.cluster import Cluster
from mpisync.commands.benching.measuring import COLUMNS, machine, meet, report, summary, table, versions

_T = TypeVar("_T")
_CASES = (Case(0, False), Case(1, False), Case(1, True))
_SIZES = (100_000_000,)
_TURNS = 2  # at every case
_UPDATES, _SKIPPED = 10, 3  # of TensorFlow in a turn
_SLEEP_STEPS = 4  # how many of TensorFlow's steps the straggler sleeps
_THEIRS, _OURS = "TensorFlow", "mpisync"
# A step as it would be without what TensorFlow's workers cannot do without, and ours with what no gradient is spared.
_BARE, _CHECKED = "TensorFlow, nothing fetched", "mpisync, gradients checked for NaN"
_FATES = {
    "updates": "updates",
    "computed": "gradients computed",
    "computed_by_worker": "  by worker",
    "used": "gradients in an update",
    "used_by_worker": "  by worker",
    "dropped": "gradients dropped",
    "dropped_late": "  late: enough others had come",
    "dropped_fresh": "  up to date, but handed in for a step before",
    "dropped_after": "  of the last version, which no update followed",
    "dropped_told": "gradients of whose drop the worker was told",
    "two_of_one": "updates with two gradients of one worker",
    "more_than_n": "updates with more than N gradients",
    "used_stale": "gradients in an update of newer parameters",
}


class Turns:
    """All that is played at one size.

    Args:
        asked: The options of `mpisync bench`.
        comm: The ranks.
        cluster: TensorFlow's processes, on rank 0.
        elements: Of the vector.
    """

    def __init__(
        self, asked: argparse.Namespace, comm: MPI.Intracomm, cluster: Cluster | None, elements: int
    ) -> None:
        self._comm, self._cluster, self._elements = comm, cluster, elements
        self._skipped = _SKIPPED if asked.skip is None else asked.skip
        # a version more than there are times between versions
        self._updates = self._skipped + 1 + (_UPDATES if asked.iterations is None else asked.iterations)
        self._played: dict[tuple[Case, str], list[Played]] = {}

    def take(self) -> None:
        """Play every case once, by TensorFlow and by us. Collective."""
        step_s = 0.0
        for case in _CASES:
            sleep_s = _SLEEP_STEPS * step_s if case.straggles else 0.0
            lasted_s, step_s = on_first(self._comm, partial(self._theirs, case, _THEIRS, sleep_s))
            self._ours(case, _OURS, sleep_s, lasted_s)
            if not case.backup:
                lasted_s, _ = on_first(self._comm, partial(self._theirs, case, _BARE, sleep_s))
                self._ours(case, _CHECKED, sleep_s, lasted_s)

    def _theirs(self, case: Case, name: str, sleep_s: float) -> tuple[float, float]:
        """Let TensorFlow play; how long it took, and the middle step of it, in seconds."""
        assert self._cluster is not None
        played = theirs(self._cluster, self._elements, self._updates, case, sleep_s, fetch=name == _THEIRS)
        self._note(case, name, played)
        return played.made_s[-1] - played.made_s[0], statistics.median(played.steps_s(self._skipped))

    def _ours(self, case: Case, name: str, sleep_s: float, lasted_s: float) -> None:
        played = ours(
            self._comm, self._elements, case, sleep_s=sleep_s, least=self._updates, play_s=lasted_s,
            checked=name == _CHECKED,
        )  # fmt: skip
        if played is not None:
            self._note(case, name, played)

    def _note(self, case: Case, name: str, played: Played) -> None:
        self._played.setdefault((case, name), []).append(played)

    def found(self, workers: int) -> dict[str, Any]:
        """Return times, ratios of their medians to ours, and what became of the gradients, on rank 0."""
        found: dict[str, Any] = {"ms": {}, "ratios": {}, "gradients": {}}
        for (case, name), turns in self._played.items():
            what = f"{name}, {case.named(workers)}"
            found["ms"][what] = summary([step_s for played in turns for step_s in played.steps_s(self._skipped)])
            counted = [marks.fates(played.updates, played.pushes, workers - case.backup) for played in turns]
            found["gradients"][what] = marks.together(counted)
        for case, name in self._played:
            if name != _OURS:
                what, our = (f"{each}, {case.named(workers)}" for each in (name, _OURS))
                found["ratios"][what] = round(found["ms"][what]["p50"] / found["ms"][our]["p50"], 2)
        middle = [found["ms"][f"{name}, {_CASES[0].named(workers)}"]["p50"] for name in (_THEIRS, _CHECKED)]
        found["ratios"][f"{_THEIRS}/{_CHECKED}"] = round(middle[0] / middle[1], 2)
        return found


def on_first(comm: MPI.Intracomm, action: Callable[[], _T]) -> _T:
    """Do something on rank 0 while the others sleep; its result on every rank. Collective.

    Raises:
        RuntimeError: It failed, on rank 0; the others exit.
    """
    result: Any = None
    failed: Exception | None = None
    if comm.rank == 0:
        try:
            result = action()
        except (RuntimeError, ValueError, OSError) as error:
            failed = error
    meet(comm, 1e-2)
    result, is_bad = comm.bcast((result, failed is not None))
    if failed is not None:
        raise failed
    if is_bad:
        raise SystemExit(1)
    return result  # type: ignore[no-any-return]


# -- the report ------------------------------------------------------------------------------------


def show(size_bytes: int, workers: int, found: dict[str, Any]) -> None:
    """Print the tables of one size."""
    print(f"\n# {size_bytes} bytes, {workers} workers, ms from version to version")
    rows: list[list[object]] = []
    for what, each in found["ms"].items():
        ratio = f"{found['ratios'][what]:.1f} x {_OURS}" if what in found["ratios"] else ""
        rows.append([what, *(float(each[column]) for column in COLUMNS), ratio])
    print(table(["", *COLUMNS, ""], rows))
    last = f"{_THEIRS}/{_CHECKED}"
    print(f"  {last} {found['ratios'][last]:.1f}")
    print("\n# what became of the gradients")
    for case in _CASES:
        counted = [found["gradients"][f"{name}, {case.named(workers)}"] for name in (_THEIRS, _OURS)]
        rows = [[words.ljust(50), *(_cell(each[key]) for each in counted)] for key, words in _FATES.items()]
        print(table([case.named(workers).ljust(50), _THEIRS, _OURS], rows), flush=True)


def _cell(value: int | list[int]) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def compare(asked: argparse.Namespace, comm: MPI.Intracomm) -> None:
    """Measure every size and print the tables and the line of JSON. Collective.

    Args:
        asked: The options of `mpisync bench`.
        comm: The ranks, on one machine; the last one is the root.
    """
    workers, sizes = comm.size - 1, asked.sizes or _SIZES
    if workers < 2:
        raise ValueError(f"the comparison needs two workers and a root at least, and this is {comm.size} of 3 ranks")
    if comm.Split_type(MPI.COMM_TYPE_SHARED).size < comm.size:
        raise ValueError("--tensorflow compares on one machine, and these ranks are on several")
    about, results = machine(), {}
    cluster: Cluster | None = None
    with ExitStack() as ends:

        def start() -> str:
            nonlocal cluster
            cluster = ends.enter_context(Cluster(asked.tensorflow, workers))
            return cluster.version

        version = on_first(comm, start)
        for size_bytes in sizes:
            turns = Turns(asked, comm, cluster, size_bytes // 4)
            for _ in range(_TURNS):
                turns.take()
            if comm.rank == 0:
                results[size_bytes] = turns.found(workers)
                show(size_bytes, workers, results[size_bytes])
    if comm.rank == 0:
        names = ("sizes", "iterations", "skip", "out")
        settings = {"workers": workers, "turns": _TURNS, **{name: getattr(asked, name) for name in names}}
        report(
            {
                "benchmark": "tensorflow", "machine": about, "versions": {**versions(), "tensorflow": version},
                "settings": settings, "sizes": results,
            },
            asked.out,
        )  # fmt: skip
