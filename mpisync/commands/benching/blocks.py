"""The same training for a while in TensorFlow's SyncReplicasOptimizer, and in mpisync.

Both train one float32 vector by SGD at rate 1, with gradients that lie ready and bear marks (see marks.py). Where a
worker straggles it is the last: it sleeps before every gradient.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

from mpisync.aggregation.participant import Participant, compile_at_root
from mpisync.aggregation.shutdown import leave_root, leave_worker
from mpisync.commands.benching import marks
from mpisync.commands.benching.cluster import Cluster
from mpisync.commands.benching.marks import Gradient, Push
from mpisync.commands.benching.measuring import meet
from mpisync.kernels.dtypes import DTYPES
from mpisync.policies import BackupWorkers
from mpisync.transport import rendezvous
from mpisync.transport.layout import Layout, SgdSpan
from mpisync.transport.rendezvous import Proposal
from mpisync.transport.wire import GradientInfo


@dataclass(frozen=True)
class Case:
    """What is trained: with how many backup workers, and whether the last worker straggles."""

    backup: int
    straggles: bool

    def named(self, workers: int) -> str:
        """Say it in words."""
        return f"{workers - self.backup} of {workers}" + (", one straggles" if self.straggles else "")


@dataclass(frozen=True)
class Played:
    """A block: when each version was made, the gradients of each update, what the workers know of theirs."""

    made_s: list[float]
    updates: list[list[Gradient]]
    pushes: list[list[Push]]

    def steps_s(self, skipped: int) -> list[float]:
        """Return the times from one version to the next, without the first."""
        return [float(step_s) for step_s in np.diff(self.made_s)[skipped:]]


def theirs(cluster: Cluster, elements: int, updates: int, case: Case, sleep_s: float, *, fetch: bool = True) -> Played:
    """Let TensorFlow make some updates."""
    workers = cluster.workers
    answers = cluster.play(
        elements=elements, aggregate=workers - case.backup, updates=updates, sleep_s=sleep_s, fetch=fetch
    )
    chief = answers[0]
    if not chief["right"]:
        raise RuntimeError(f"TensorFlow's variable is not what {updates} updates make it")
    pushes = [[Push(version, step) for version, step in answer["pushes"]] for answer in answers]
    return Played(chief["made_s"], [marks.averaged(mean, workers) for mean in chief["means"]], pushes)


def ours(
    comm: MPI.Intracomm, elements: int, case: Case, *, sleep_s: float, least: int, play_s: float, checked: bool
) -> Played | None:
    """Train with mpisync; what was played, on rank 0. Collective.

    Args:
        comm: The ranks; the last one is the root.
        elements: Of the vector.
        case: What is trained.
        sleep_s: How long the straggler sleeps.
        least: Updates to make at least.
        play_s: How long to go on making them.
        checked: Whether workers look for NaN and Inf, as they do in a `Session`; else that is left out, as in the rest
            of `mpisync bench`.
    """
    layout, workers = Layout.of([("float32", elements)]), comm.size - 1
    own = comm.Dup()
    compile_at_root(own, layout)
    meeting = rendezvous.meet(own, Proposal("", ""), lambda a, b: None)
    participant = Participant(meeting, layout, layout, BackupWorkers(case.backup))
    mine: Any = None
    if participant.is_root:
        mine = _serve(participant, workers, least, play_s)
    else:
        mine = _work(participant, workers, sleep_s if comm.rank == workers - 1 else 0.0, checked=checked)
    meet(comm, 1e-3)
    own.Free()
    gathered = comm.gather(mine, root=0)
    if gathered is None:
        return None
    made_s, updates = gathered.pop()
    return Played(made_s, updates, gathered)


def _serve(
    participant: Participant, workers: int, least: int, play_s: float
) -> tuple[list[float], list[list[Gradient]]]:
    """Be the root."""
    root = participant.root()
    parameters, last = participant.layout.arrays(participant.parameters)[0], marks.count(workers) - 1
    made_s: list[float] = []
    means: list[list[float]] = []
    try:
        for closed in root.serve():
            if not closed.fused_sgd_step([SgdSpan(0, 0, parameters.size, 1.0)]):
                raise RuntimeError(f"step {closed.step} has no finite mean")
            means.append([*(-parameters[:last]).tolist(), 1.0])
            parameters[:last] = 0  # so that the next change is read as exactly
            made_s.append(closed.publish().published_s)
            if len(made_s) >= least and made_s[-1] >= made_s[0] + play_s:
                root.stop()
        if not np.all(parameters[last:] == -len(made_s)):
            raise RuntimeError(f"the parameters are not what {len(made_s)} updates make them")
    except BaseException as error:
        leave_root(root, error)
        raise
    leave_root(root, None)
    return made_s, [marks.averaged(mean, workers) for mean in means]


def _work(participant: Participant, workers: int, sleep_s: float, *, checked: bool) -> list[Push]:
    """Be a worker; what became of its gradients."""
    worker = participant.worker()
    gradient, rank = participant.layout.arrays(worker.link.gradient)[0], participant.meeting.comm.rank
    gradient[:] = 1
    stored = DTYPES["float32"].stored(gradient)
    pushes: list[Push] = []
    try:
        while worker.pull() is not None:
            time.sleep(sleep_s)
            own = Gradient(rank, worker.sequence, worker.version)
            gradient[: marks.count(workers)] = marks.marked(workers, own)
            peak = float(max(1, own.sequence, own.version))
            if checked:
                peak = participant.memory.reducer.peak(stored, DTYPES["float32"])
            verdict = worker.push(GradientInfo(1, peak=peak))
            pushes.append(Push(own.version, own.version, verdict.accepted))
    except BaseException as error:
        leave_worker(worker, error)
        raise
    leave_worker(worker, None)
    return pushes
