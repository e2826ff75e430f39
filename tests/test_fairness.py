"""I4 among equals: whom a step drops is whoever came last, by scripted arrivals and among real processes."""

import math
import random
import time
from collections import Counter, defaultdict

import numpy as np
import pytest
from scripted import ScriptedWorker, World

from mpisync.policies import BackupWorkers
from mpisync.session.partial_reduce import PartialReduce
from mpisync.transport.wire import Status

WORKERS = 5
ALL = tuple(range(WORKERS))


# -- scripted arrivals: exact ----------------------------------------------------------------------


def equals(seed):
    """Workers whose computing times are drawn from the same law."""
    rng = np.random.default_rng(seed)
    table = rng.uniform(1.0, 1.4, (WORKERS, 100))
    return [ScriptedWorker(w, lambda sequence, w=w: table[w, sequence]) for w in range(WORKERS)]


def look_every(world, period_s):
    """Make the root look so seldom that one look finds several arrivals, in whatever order."""
    sleep = world.sleep

    def oversleep(timeout_s):
        sleep(timeout_s)
        while world.now_s % period_s > 1e-6:
            sleep(period_s - world.now_s % period_s)

    world.sleep = oversleep


def scripted_race(world):
    """Of every version on which all computed: who was dropped, and who was last by the script."""
    told, said = {}, defaultdict(list)
    for worker in world.workers:
        for header in worker.said.values():
            if header.sequence in worker.verdicts:
                said[header.version].append((header.stamp_s, worker.number))
                told[header.version, worker.number] = worker.verdicts[header.sequence].status
    return [
        ([w for _, w in heard if told[version, w] != Status.ACCEPTED], max(heard)[1])
        for version, heard in said.items()
        if len(heard) == WORKERS
    ]


# Not with both kinds under a root that looks seldom: there a gradient in pieces is whole only a look after it was asked
# for, and one in a slot at once.
@pytest.mark.parametrize(
    ("pieces", "period_s"),
    [((), None), ((), 0.05), ((), 0.5), (ALL, None), (ALL, 0.05), (ALL, 0.5), ((1, 3), None)],
)
def test_by_script_whoever_came_last_is_dropped(pieces, period_s):
    world = World(equals(7), BackupWorkers(1), pieces=pieces)
    if period_s is not None:
        look_every(world, period_s)
    world.serve(60)
    race = scripted_race(world)
    assert len(race) > 30
    assert [dropped for dropped, _ in race] == [[last] for _, last in race]
    assert len({last for _, last in race}) == WORKERS, "everyone must have been last"


# -- real processes: in shares ---------------------------------------------------------------------

STEPS = 200
FEWEST = 120  # of them in which all must have computed
# Five standard errors of a share of 1/5. Drops and lasts are nearly the same steps; holding the difference of their
# shares to five sigma of two independent ones leaves room for stamps that are not quite the arrivals. A loop that
# polled in rank order was 0.49 off.
SHARE_5_SIGMA = 5 * math.sqrt(0.2 * 0.8 / FEWEST)
DIFFERENCE_5_SIGMA = math.sqrt(2) * SHARE_5_SIGMA


def run_equals(comm, size):
    """Train as one of five equal workers; (version, when its gradient was there, accepted) of each step."""
    like, seen, rng = np.zeros(size, np.float32), [], random.Random(comm.rank)
    with PartialReduce(comm, like=like, policy=BackupWorkers(1)) as reduction:
        for step in reduction.serve(STEPS) if reduction.is_root else ():
            step.publish(reduction.parameters)
        while not reduction.is_root and reduction.pull(reduction.parameters):
            reduction.gradient[:] = 1.0
            time.sleep(0.004 + 0.003 * rng.random())
            stamp_s = time.monotonic()
            verdict = reduction.push()
            seen.append((verdict.step - verdict.late_by, stamp_s, verdict.accepted))
    return seen


def race_of(of_workers):
    """Of every version on which all computed: who was dropped, and who was last by their own clocks."""
    came, accepted = defaultdict(list), defaultdict(set)
    for worker, seen in enumerate(of_workers):
        for version, stamp_s, counts in seen:
            came[version].append((stamp_s, worker))
            accepted[version].update({worker} if counts else ())
    full = [version for version, of_version in came.items() if len(of_version) == WORKERS]
    return [(set(ALL) - accepted[version], max(came[version])[1]) for version in full]


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("size", [250, 250_000], ids=["1 kB", "1 MB"])
@pytest.mark.parametrize("transport", ["shared", "messages"])
def test_among_processes_drops_are_shared_out_as_being_last_is(comm, monkeypatch, transport, size):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    race = race_of(comm.allgather(run_equals(comm, size))[:WORKERS])
    assert len(race) >= FEWEST
    # the last step's loser may not have lost to four others: the training had ended
    drops = Counter(worker for dropped, _ in race for worker in dropped)
    lasts = Counter(last for _, last in race)
    assert len(race) <= drops.total() <= len(race) + WORKERS
    for worker in ALL:
        assert abs(drops[worker] - lasts[worker]) / len(race) < DIFFERENCE_5_SIGMA, (drops, lasts)
    # and it is the same steps: by chance it would be a fifth of them
    assert np.mean([last in dropped for dropped, last in race]) > 0.2 + SHARE_5_SIGMA
