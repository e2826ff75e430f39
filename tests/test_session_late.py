"""What becomes of late work in a session: discarded, computed again, carried along, or given to others."""

import contextlib
import io
import time
from collections import Counter

import numpy as np
import pytest
import torch
from launch import run_script
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import fails_everywhere, on_all

import mpisync
from mpisync.aggregation.late_work import late_work_of
from mpisync.policies import Replay
from mpisync.records import RecordReader

RANKS, WORKERS = 4, 3
NUMBERS = TensorDataset(torch.arange(67).double())  # nine batches of eight, the last of three
ENDED = "the training has ended"


def numbers(**more):
    return DataLoader(NUMBERS, **{"batch_size": 8, "shuffle": True, **more})


def be_late(session):
    """Wait until the open step has closed without this worker."""
    give_up_s = time.monotonic() + 20
    while not session.stale():
        assert time.monotonic() < give_up_s, "no step closes"
        time.sleep(1e-3)


class Sum(nn.Module):
    """Its gradient is the mean sine of what it is shown, whatever the parameter is: no two batches' are equal."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        return self.weight * x.sin().mean()


def run(comm, body=lambda session, number, x: None, data=None, each=1, curved=False, **more):
    """Train the sum; (numbers, verdict) of each gradient, the session and the final weight.

    Its gradient depends on the weight where the loss is `curved`.
    """
    extent = {name: more.pop(name) for name in ("steps", "epochs", "resume") if name in more}
    model, got, batch = Sum(), [], []
    more = {"policy": mpisync.BackupWorkers(1), "progress": False, **more}
    with mpisync.Session(comm, model, torch.optim.SGD(model.parameters(), lr=1.0), **more) as session:
        for number, (x,) in enumerate(session.batches(numbers() if data is None else data, **extent)):
            batch += [int(value) for value in x]
            word = body(session, number, x)
            if word == "leave":
                break
            if word == "pass over":
                batch = []
                continue
            (model(x).add(-1).square() if curved else model(x)).backward()
            if (number + 1) % each == 0:
                got.append((batch, session.step(cost=float(len(x)))))
                batch = []
    return got, session, model.weight.item()


def used(comm, got):
    """How often each number was part of an accepted gradient, over all workers."""
    everyone = sum(on_all(comm, got), [])
    return Counter(value for batch, verdict in everyone if verdict.accepted for value in batch)


def read(comm, path):
    """The steps and the end of a record, on every rank."""
    found = None
    if comm.rank == comm.size - 1:
        reader = RecordReader(path)
        found = list(reader), reader.end
    return comm.bcast(found, root=comm.size - 1)


def check_accounts(end):
    """I10, when all is over."""
    for handed, *fates in zip(end.handed, end.used, end.discarded, end.requeued, end.lost, strict=True):
        assert handed == sum(fates)


# -- retry -----------------------------------------------------------------------------------------


@pytest.mark.parallel(RANKS)
@pytest.mark.parametrize("transport", ["shared", "messages"])
def test_a_late_batch_comes_again_so_often_and_then_another(comm, transport, monkeypatch, tmp_path):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    path, seen = comm.bcast(str(tmp_path / "record.jsonl")), []

    def body(session, number, x):
        seen.append((tuple(x.tolist()), session.version, torch.rand(1).item()))
        if session.worker == 0 and number < 5:
            be_late(session)

    got, *_ = run(comm, body, steps=30, on_late=mpisync.Retry(2), record=path)
    _, end = read(comm, path)
    check_accounts(end)
    if comm.rank == 0:
        batches, versions, chances = zip(*seen, strict=True)
        assert [verdict.accepted for _, verdict in got[:5]] == [False] * 5
        assert batches[0] == batches[1] == batches[2] != batches[3] == batches[4] == batches[5]
        assert chances[0] == chances[1] == chances[2] != chances[3], "under the same random numbers"
        assert versions[0] < versions[1] < versions[2], "at newer parameters each time"
        assert end.requeued[0] >= 4 * 8 and end.discarded[0] >= 8


@pytest.mark.parallel(RANKS)
def test_all_batches_of_a_late_gradient_come_again(comm):
    seen = []

    def body(session, number, x):
        seen.append(tuple(x.tolist()))
        if session.worker == 0 and number == 2:
            be_late(session)
        elif session.worker:
            time.sleep(0.01)  # so that worker 0 is in time else

    run(comm, body, each=3, steps=10, on_late="retry")
    if comm.rank == 0:
        assert seen[:3] == seen[3:6] and seen[6] not in seen[:6]


@pytest.mark.parallel(RANKS)
@pytest.mark.parametrize("backup", [0, 1])
def test_what_the_loop_passes_over_comes_again_if_it_was_late_and_not_else(comm, backup, tmp_path):
    path, seen = comm.bcast(str(tmp_path / "record.jsonl")), []

    def body(session, number, x):
        seen.append(tuple(x.tolist()))
        if session.worker == 0 and number == 0:
            if backup:
                be_late(session)
            return "pass over"
        return None

    run(comm, body, steps=20, on_late="retry", record=path, policy=mpisync.BackupWorkers(backup))
    _, end = read(comm, path)
    check_accounts(end)
    if comm.rank == 0:
        assert (seen[0] == seen[1]) == bool(backup)
        assert end.requeued[0] >= 8 if backup else (end.requeued[0], end.discarded[0]) == (0, 8)


# -- carry -----------------------------------------------------------------------------------------


def contributions(steps, sent):
    """What each gradient of a record must have been: its own mean, and those that it carries."""
    held = {}
    for arrival in (arrival for step in steps for arrival in step.arrivals):
        own = np.sin(sent[arrival.worker][arrival.sequence]).mean()
        carried = [held[arrival.worker, sequence] for sequence in (arrival.carried or [])]
        held[arrival.worker, arrival.sequence] = own
        yield arrival, own, carried


@pytest.mark.parallel(RANKS)
@pytest.mark.parametrize("transport", ["shared", "messages"])
@pytest.mark.parametrize("weight", ["equal", "samples"])
def test_late_gradients_are_added_to_the_next_one(comm, transport, weight, monkeypatch, tmp_path):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    path = comm.bcast(str(tmp_path / "record.jsonl"))

    def body(session, number, x):
        if session.worker == 0 and number in (1, 2, 6):
            be_late(session)
        elif session.worker:
            time.sleep(0.01)  # so that worker 0 is in time where it does not wait

    got, _, final = run(comm, body, steps=40, on_late=mpisync.Carry(9), record=path, weight=weight)
    sent = on_all(comm, [batch for batch, _ in got])
    steps, end = read(comm, path)
    check_accounts(end)
    value, weights = {}, {}
    for arrival, own, carried in contributions(steps, sent):
        gradient = arrival.worker, arrival.sequence
        lengths = [len(sent[arrival.worker][s]) for s in [arrival.sequence, *(arrival.carried or [])]]
        value[gradient] = own + sum(carried) if weight == "equal" else np.average([own, *carried], weights=lengths)
        weights[gradient] = 1 if weight == "equal" else sum(lengths)
        assert arrival.samples == sum(lengths)
    means = [
        np.average([value[w, s] for w, s, _ in step.accepted], weights=[weights[w, s] for w, s, _ in step.accepted])
        for step in steps
    ]
    assert final == pytest.approx(-sum(means), rel=1e-12, abs=1e-12)
    carried = {(a.worker, a.sequence): a.carried for step in steps for a in step.arrivals if a.carried}
    assert carried[0, 2][-1] == 1 and carried[0, 3][-2:] == [1, 2] and carried[0, 7][-1] == 6
    assert end.used[0] > 0 and end.discarded[0] <= sum(len(batch) for batch in sent[0][-2:]), "none was given up"


@pytest.mark.parallel(RANKS)
def test_what_has_become_too_old_is_given_up(comm, tmp_path):
    path = comm.bcast(str(tmp_path / "record.jsonl"))

    def body(session, number, x):
        if session.worker == 0 and number < 2:
            be_late(session)
            time.sleep(0.3 * number)  # the others make more than two versions in the second one's time
        elif session.worker:
            time.sleep(0.01)

    run(comm, body, steps=60, on_late=mpisync.Carry(max_staleness=2), record=path)
    steps, end = read(comm, path)
    check_accounts(end)
    carried = {(a.worker, a.sequence): a.carried for step in steps for a in step.arrivals}
    assert carried[0, 1] == [0] and carried[0, 2] is None
    assert end.discarded[0] >= 16


@pytest.mark.parallel(RANKS)
def test_a_late_gradient_with_nan_is_never_carried(comm, tmp_path):
    path = comm.bcast(str(tmp_path / "record.jsonl"))

    def body(session, number, x):
        if session.worker == 0 and number == 1:
            be_late(session)
            x[0] = float("nan")

    _, _, final = run(comm, body, steps=20, on_late="carry", record=path)
    steps, end = read(comm, path)
    check_accounts(end)
    assert np.isfinite(final)
    late = next(a for step in steps for a in step.arrivals if (a.worker, a.sequence) == (0, 1))
    after = next(a for step in steps for a in step.arrivals if (a.worker, a.sequence) == (0, 2))
    assert late.verdict == "late" and after.carried is None, "it is late, which is judged first, and no more"


# -- requeue ---------------------------------------------------------------------------------------


@pytest.mark.parallel(RANKS)
@pytest.mark.parametrize("transport", ["shared", "messages"])
@pytest.mark.parametrize("processes", [0, 2])
def test_every_sample_is_used_once_an_epoch_with_a_slow_worker(comm, transport, processes, monkeypatch, tmp_path):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    path = comm.bcast(str(tmp_path / "record.jsonl"))

    def body(session, number, x):
        time.sleep(0.04 if session.worker == 0 else 0.002)

    got, *_ = run(comm, body, numbers(num_workers=processes), epochs=5, on_late="requeue", record=path)
    assert used(comm, got) == dict.fromkeys(range(67), 5)
    steps, end = read(comm, path)
    check_accounts(end)
    assert sum(end.used) == 5 * 67 and sum(end.discarded) == 0 and end.requeued[0] > 0
    lots = [tuple(lot) for step in steps for a in step.arrivals if a.verdict == "accepted" for lot in a.lots]
    assert sorted(lots) == [(epoch, batch) for epoch in range(5) for batch in range(9)]
    place = {lot: n for n, lot in enumerate(lots)}
    if not processes:  # which fetch ahead, and so hold batches of an epoch when the others have gone on
        assert max(n for (epoch, _), n in place.items() if epoch == 0) < place[2, 0], "epochs follow one another"


@pytest.mark.parallel(RANKS)
def test_epochs_are_shuffled_anew_and_a_list_keeps_its_order(comm):
    got, *_ = run(comm, epochs=2, on_late="requeue", policy=mpisync.Async())
    firsts = [tuple(batch) for batch, _ in sum(on_all(comm, got), []) if len(batch) == 8]
    assert len(set(firsts)) > 12, "other batches in the second epoch"
    rows = [(torch.full((2,), float(n), dtype=torch.float64),) for n in range(5)]
    got, *_ = run(comm, data=rows, epochs=3, on_late="requeue")
    assert used(comm, got) == dict.fromkeys(range(5), 3 * 2)


@pytest.mark.parallel(RANKS)
@pytest.mark.parametrize(
    "policy", [mpisync.Deadline(0.05), mpisync.Async(k=2, max_staleness=1), mpisync.BackupWorkers(0)], ids=str
)
def test_every_policy_comes_to_the_end_of_the_samples(comm, policy):
    def body(session, number, x):
        time.sleep(0.01 if session.worker == 0 else 0.002)

    got, session, _ = run(comm, body, epochs=3, on_late="requeue", policy=policy)
    assert used(comm, got) == dict.fromkeys(range(67), 3)
    assert session.version > 0


@pytest.mark.parallel(RANKS)
def test_what_a_worker_leaves_behind_others_do(comm, tmp_path):
    path = comm.bcast(str(tmp_path / "record.jsonl"))

    def body(session, number, x):
        return "leave" if session.worker == 1 and number == 3 else None

    got, *_ = run(comm, body, epochs=4, on_late="requeue", record=path)
    assert used(comm, got) == dict.fromkeys(range(67), 4)
    _, end = read(comm, path)
    check_accounts(end)
    assert end.lost == [0, 0, 0] and end.requeued[1] >= 3


@pytest.mark.parallel(RANKS)
def test_gradients_of_several_batches_are_used_whole(comm, tmp_path):
    path = comm.bcast(str(tmp_path / "record.jsonl"))

    def body(session, number, x):
        if session.worker == 0 and number == 3:
            be_late(session)

    got, *_ = run(comm, body, each=2, epochs=4, on_late="requeue", record=path)
    counts = used(comm, got)
    check_accounts(read(comm, path)[1])
    assert all(count <= 4 for count in counts.values()), "none twice"
    # a gradient that lacks its second batch at the end is none: at most one batch a worker
    assert sum(counts.values()) >= 4 * 67 - WORKERS * 8


@pytest.mark.parallel(RANKS)
@pytest.mark.parametrize("backup", [0, 1])
def test_what_is_passed_over_as_late_goes_back_and_what_is_passed_over_else_does_not(comm, backup):
    passed = []

    def body(session, number, x):
        if session.worker == 0 and number == 0:
            if backup:
                be_late(session)
            else:
                passed.extend(int(value) for value in x)
            return "pass over"
        return None

    got, *_ = run(comm, body, epochs=2, on_late="requeue", policy=mpisync.BackupWorkers(backup))
    lacking = sum(on_all(comm, passed), [])
    assert used(comm, got) == {value: 2 - lacking.count(value) for value in range(67)}


@pytest.mark.parallel(RANKS)
def test_a_batch_with_nan_is_not_given_to_everyone_in_turn(comm):
    rows = [(torch.full((2,), float(n), dtype=torch.float64),) for n in range(6)]
    rows[2][0][0] = float("nan")
    model, verdicts = Sum(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with mpisync.Session(
        comm, model, optimizer, policy=mpisync.BackupWorkers(1), on_late="requeue", progress=False
    ) as session:
        for (x,) in session.batches(rows, epochs=3):
            model(x).backward()
            verdicts.append((bool(x.isnan().any()), session.step()))
    everyone = sum(on_all(comm, verdicts), [])
    assert sum(is_nan for is_nan, _ in everyone) >= 3
    assert sum(verdict.accepted for _, verdict in everyone) == 3 * 5


@pytest.mark.parallel(RANKS)
def test_a_run_goes_on_where_another_ended(comm, tmp_path):
    path = comm.bcast(str(tmp_path / "record.jsonl"))

    def body(session, number, x):
        time.sleep(0.01 if session.worker == 0 else 0.002)

    first, session, _ = run(comm, body, steps=7, on_late="requeue")
    state = comm.bcast(session.state_dict().get("samples"), root=comm.size - 1)
    second, *_ = run(comm, body, epochs=3, on_late="requeue", resume=state, record=path)
    assert used(comm, first + second) == dict.fromkeys(range(67), 3)
    _, end = read(comm, path)
    check_accounts(end)
    assert sum(end.used) == 3 * 67, "the accounts go on too"


@pytest.mark.parallel(RANKS)
def test_shares_go_on_where_another_run_ended(comm):
    first, session, _ = run(comm, steps=4, policy=mpisync.BackupWorkers(0))
    state = comm.bcast(session.state_dict().get("samples"), root=comm.size - 1)
    second, *_ = run(comm, steps=5, policy=mpisync.BackupWorkers(0), resume=state)
    whole, *_ = run(comm, steps=9, policy=mpisync.BackupWorkers(0))
    ours = [batch for batch, verdict in first + second if verdict.accepted]
    assert ours == [batch for batch, verdict in whole if verdict.accepted]


@pytest.mark.parallel(RANKS)
@pytest.mark.parametrize("on_late", ["discard", "retry", "carry", "requeue"])
def test_a_replay_repeats_the_run_bit_for_bit(comm, on_late, tmp_path):
    path = comm.bcast(str(tmp_path / "record.jsonl"))

    def body(session, number, x):
        if session.worker == 0 and number in (1, 2, 5):
            be_late(session)

    recorded, _, final = run(comm, body, steps=20, on_late=on_late, record=path, curved=True)
    comm.barrier()
    replayed, _, again = run(comm, steps=20, on_late=on_late, policy=Replay(path), curved=True)
    assert again == final
    if comm.rank < WORKERS:
        shared = min(len(recorded), len(replayed))
        last = next((i for i, (_, v) in enumerate(recorded) if v.reason == ENDED), len(recorded))
        assert [b for b, _ in recorded[: min(shared, last)]] == [b for b, _ in replayed[: min(shared, last)]]


SCRIPT = """
import os, signal, time, torch
from collections import Counter
from mpi4py import MPI
from torch.utils.data import DataLoader, TensorDataset
import mpisync
comm, used = MPI.COMM_WORLD, Counter()
model = torch.nn.Linear(1, 1)
loader = DataLoader(TensorDataset(torch.arange(67.0)), batch_size=8, shuffle=True)
session = mpisync.Session(comm, model, torch.optim.SGD(model.parameters(), lr=1e-6),
                          policy=mpisync.BackupWorkers(1), on_late="requeue")
with session:
    for number, (x,) in enumerate(session.batches(loader, epochs=6)):
        time.sleep(0.005)
        if session.worker == 1 and number == 2:
            {fault}
        model(x[:, None]).mean().backward()
        if session.step().accepted:
            used.update(x.tolist())
            print("used", *(int(v) for v in x), flush=True)
print(comm.rank, "done", flush=True)
"""


def test_a_worker_that_is_stopped_for_ever_keeps_no_sample():
    run = run_script(4, SCRIPT.format(fault="os.kill(os.getpid(), signal.SIGSTOP)"), timeout_s=45.0)
    counts = Counter(int(v) for line in run.stdout.splitlines() if "used " in line for v in line.split()[1:])
    assert counts == dict.fromkeys(range(67), 6), f"{run.stdout}\n{run.stderr}"
    assert run.stdout.count("done") == 3 and not run.timed_out and run.left == ()


@pytest.mark.parallel(RANKS)
def test_twenty_epochs_of_digits_with_a_worker_twenty_times_slower(comm):
    from sklearn.datasets import load_digits

    digits, used = load_digits(), Counter()
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
    data = TensorDataset(images, torch.tensor(digits.target), torch.arange(1797))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with mpisync.Session(comm, model, optimizer, policy=mpisync.BackupWorkers(1), on_late="requeue") as session:
        for x, y, number in session.batches(DataLoader(data, batch_size=32, shuffle=True), epochs=20):
            time.sleep(0.002 * (20 if session.worker == 0 else 1))
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            if session.step(loss).accepted:
                used.update(number.tolist())
    total = sum(on_all(comm, used), Counter())
    assert total == dict.fromkeys(range(1797), 20)
    assert (model(images).argmax(1) == torch.tensor(digits.target)).float().mean() > 0.95


# -- what is said, and what is refused -------------------------------------------------------------


@pytest.mark.parallel(RANKS)
def test_the_end_tells_what_became_of_the_samples(comm):
    def body(session, number, x):
        time.sleep(0.05 if session.worker == 0 else 0.002)

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        run(comm, body, steps=20, progress=True)
    if comm.rank == comm.size - 1:
        lines = said.getvalue().splitlines()
        head = next(i for i, line in enumerate(lines) if line.startswith("samples:"))
        for line in lines[head + 1 : head + 5]:
            handed, fates = line[9:].replace(",", "").split("=")
            assert int(handed) == sum(int(number) for number in fates.split("+"))
        assert any(line.startswith("cost 8 to 16: ") for line in lines)


@pytest.mark.parallel(RANKS)
def test_ranks_that_differ_in_what_they_want_are_told(comm):
    mine = "retry" if comm.rank == 1 else "requeue"
    with fails_everywhere(comm, ValueError, "on_late", "'retry:limit=3'", "'requeue'"):
        run(comm, steps=3, on_late=mine)


@pytest.mark.parallel(RANKS)
def test_ranks_whose_loaders_differ_are_told(comm):
    own = numbers(batch_size=4) if comm.rank == 1 else numbers()
    with fails_everywhere(comm, ValueError, "makes 17 batches an epoch and the root's 9"):
        run(comm, data=own, epochs=3, on_late="requeue")


@pytest.mark.parametrize(
    ("more", "extent", "kind", "words"),
    [
        ({"on_late": "ignore"}, {}, ValueError, "on_late must be one of 'discard', 'retry', 'carry', 'requeue'"),
        ({"on_late": 3}, {}, TypeError, "on_late must be a word such as 'retry' or an object such as Retry"),
        ({"on_late": "retry:many"}, {}, ValueError, "on_late must be one of"),
        ({"on_late": "requeue:3"}, {}, ValueError, "on_late must be one of"),
        ({}, {"epochs": 2}, ValueError, "epochs are counted under on_late='requeue' only"),
        ({"on_late": "requeue"}, {"epochs": -1}, ValueError, "epochs must be at least 0 and below"),
        ({"on_late": "requeue"}, {"resume": {"pool": {}}}, TypeError, "resume must be"),
        (
            {"on_late": "requeue"},
            {"resume": {"on_late": "requeue", "seed": 0, "accounts": [], "pool": {}}},
            ValueError,
            "the run to go on with was a replay",
        ),
        (
            {"on_late": "requeue"},
            {"resume": {"on_late": "discard", "seed": 0, "accounts": []}},
            ValueError,
            "had on_late='discard' and this session has 'requeue'",
        ),
        (
            {},
            {"resume": {"on_late": "discard", "seed": 0, "accounts": [{}, {}]}},
            ValueError,
            "had 2 workers and this one has 1",
        ),
    ],
)
def test_what_cannot_be_is_refused(more, extent, kind, words):
    from mpi4py import MPI

    with pytest.raises(kind, match=words):
        run(MPI.COMM_SELF, **more, **extent)


def test_a_sampler_of_ones_own_cannot_be_pooled():
    from mpi4py import MPI

    data = DataLoader(NUMBERS, batch_size=8, sampler=list(range(5)))
    with pytest.raises(ValueError, match="this DataLoader draws in a way of its own"):
        run(MPI.COMM_SELF, data=data, epochs=1, on_late="requeue")


def test_alone_every_sample_is_used_once_an_epoch_and_a_run_can_go_on():
    from mpi4py import MPI

    first, session, _ = run(MPI.COMM_SELF, steps=4, on_late="requeue")
    second, *_ = run(
        MPI.COMM_SELF, epochs=2, on_late="requeue", resume=session.state_dict()["samples"], data=numbers(num_workers=1)
    )
    assert used(MPI.COMM_SELF, first + second) == dict.fromkeys(range(67), 2)


@pytest.mark.parametrize("cost", [0, -1, float("nan"), float("inf")])
def test_a_cost_must_be_a_cost(cost):
    from mpi4py import MPI

    model = Sum()
    with pytest.raises(ValueError, match="cost must be finite and greater than 0"):
        with mpisync.Session(MPI.COMM_SELF, model, torch.optim.SGD(model.parameters()), progress=False) as session:
            for (x,) in session.batches(numbers(), steps=2):
                model(x).backward()
                session.step(cost=cost)


@pytest.mark.parallel(RANKS)
def test_what_was_accepted_counts_though_the_samples_do_not_make_the_last_k_gradients(comm, tmp_path):
    path = comm.bcast(str(tmp_path / "record.jsonl"))
    rows = [(torch.full((1,), float(n), dtype=torch.float64),) for n in range(7)]  # one is left over
    got, *_ = run(comm, data=rows, each=2, epochs=1, on_late="requeue", policy=mpisync.Async(k=2), record=path)
    told = sum(used(comm, got).values())
    steps, end = read(comm, path)
    check_accounts(end)
    assert told == sum(end.used) == sum(step.samples_used for step in steps)


def test_late_work_is_an_object_of_its_form_in_words():
    for text in ("discard", "retry:limit=5", "carry:max_staleness=2", "requeue"):
        assert str(late_work_of(text)) == text
    assert late_work_of("retry") == mpisync.Retry() == mpisync.Retry(limit=3) != mpisync.Retry(2)
    assert late_work_of(mpisync.Carry(2)) == late_work_of("carry:2")
    with pytest.raises(ValueError, match="limit must be at least 1, not 0; Discard"):
        mpisync.Retry(0)
    with pytest.raises(TypeError, match="max_staleness must be a whole number, not 1.5"):
        mpisync.Carry(1.5)
