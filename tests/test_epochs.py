"""Several loops in one session, as epochs are: every rank leaves each at one version, and late ones hold up nobody."""

import os
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from launch import run_script
from torch.utils.data import DataLoader, Dataset
from training import DATA, WORKERS, fails_everywhere, flat, loader, new_model, on_all, on_union, sgd

import mpisync
from mpisync.data.continued import ContinuedBatches

TRANSPORTS = pytest.mark.parametrize("transport", ["shared", "messages"], indirect=True)
BATCHES = [DATA[8 * number : 8 * number + 8] for number in range(8)]


@pytest.fixture
def transport(request, monkeypatch):
    monkeypatch.setenv("MPISYNC_TRANSPORT", request.param)
    return request.param


def loss_of(model, x, y):
    return F.cross_entropy(model(x), y)


def epoch(session, model, data, *, steps, each=lambda session: None):
    """One loop of an ordinary script; its verdicts."""
    verdicts = []
    for x, y in session.batches(data, steps=steps):
        loss = loss_of(model, x, y)
        loss.backward()
        each(session)
        verdicts.append(session.step(loss))
    return verdicts


def validate(model):
    model.eval()
    with torch.no_grad():
        value = sum(float(loss_of(model, x, y)) for x, y in BATCHES)
    model.train()
    return value


@pytest.mark.parallel(WORKERS + 1)
@TRANSPORTS
def test_epochs_with_validation_and_a_scheduler_equal_one_process(comm, transport):
    model, own = new_model(), new_model()
    optimizer, others = sgd(model), sgd(own)
    scheduler, theirs = (torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in (optimizer, others))
    seen = []
    with mpisync.Session(comm, model, optimizer, policy=mpisync.BackupWorkers(0), progress=False) as session:
        for number in range(3):
            verdicts = epoch(session, model, BATCHES, steps=3)
            assert all(verdict.accepted for verdict in verdicts) and len(verdicts) in (0, 3)
            seen.append((session.version, validate(model), flat(model).tolist()))
            scheduler.step()
            assert sum(comm.allgather(number)) == number * comm.size, "the script may use collectives of its own"
    assert [version for version, *_ in seen] == [3, 6, 9] and session.version == 9
    assert all(rank == seen for rank in comm.allgather(seen)), "all ranks leave each loop with the same parameters"
    for number in range(3):
        for step in range(3 * number, 3 * number + 3):
            on_union(own, others, BATCHES, loss_of, steps=[step])
        theirs.step()
    assert np.abs(flat(model) - flat(own)).max() < 1e-6


@pytest.mark.parametrize("kind", [torch.optim.lr_scheduler.StepLR, torch.optim.lr_scheduler.ReduceLROnPlateau])
@pytest.mark.parallel(WORKERS + 1)
def test_what_the_optimizer_is_set_to_between_loops_holds(comm, kind):
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # which the root folds without calling it
    plateau = kind is torch.optim.lr_scheduler.ReduceLROnPlateau
    scheduler = kind(optimizer, patience=0, threshold=1e9) if plateau else kind(optimizer, 1)
    moved = []
    with mpisync.Session(comm, model, optimizer, policy=mpisync.BackupWorkers(0), progress=False) as session:
        for _ in range(3):
            before = flat(model)
            epoch(session, model, BATCHES, steps=1)
            moved.append(np.abs(flat(model) - before).max())
            scheduler.step(*[validate(model)] * plateau)
    assert moved[0] > 5 * moved[1 + plateau] > 0, moved


def late_loops(comm, *, loops, late_in=None, late_s=0.0, step_s=0.0, between=lambda session, number: None):
    """Train in loops, worker 0 late at the start of one; of each: (number, version, batches, seconds, sums)."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(400, 100), torch.nn.BatchNorm1d(100), torch.nn.Linear(100, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = [(torch.randn(8, 400), torch.zeros(8, dtype=torch.long)) for _ in range(12)]
    told = []
    with mpisync.Session(comm, model, optimizer, policy=mpisync.BackupWorkers(1), progress=False) as session:
        for number in range(loops):
            count = 0
            for x, y in session.batches(data, steps=8):
                if session.worker == 0 and number == late_in and not count:
                    time.sleep(late_s)
                time.sleep(step_s)
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                session.step(loss)
                count += 1
            sums = [float(t.double().sum()) for t in model.state_dict().values()]
            told.append((number, session.version, count, time.monotonic(), sums))
            between(session, number)
    return told


LATE = pytest.mark.parallel(4)


@LATE
@TRANSPORTS
def test_a_late_worker_leaves_a_loop_with_its_parameters_though_the_others_have_gone_on(comm, transport):
    found = comm.allgather(late_loops(comm, loops=3, late_in=1, late_s=1.2, step_s=0.1))
    assert [each[:2] for each in found[3]] == [(0, 8), (1, 16), (2, 24)]
    ends = {number: (version, sums) for number, version, _, _, sums in found[3]}
    for rank in range(3):
        assert {number: (version, sums) for number, version, _, _, sums in found[rank]} == ends, rank
    late, others = found[0][1][3], max(found[rank][1][3] for rank in (1, 2, 3))
    assert late > others + 0.3 and late < found[3][2][3], "it left the loop while the next was under way"
    assert found[0][1][2] == 1 and found[0][2][2] >= 1, "and took part in that"


@LATE
@TRANSPORTS
def test_a_late_worker_is_waited_for_by_collectives_only(comm, transport):
    """The root sits in a collective that the late worker is to come to, and answers nobody."""
    told = late_loops(comm, loops=2, late_in=0, late_s=1.0, between=lambda session, number: comm.Barrier())
    found = comm.allgather(told)
    assert all([each[:2] for each in own] == [(0, 8), (1, 16)] for own in found)
    assert len({str([each[4] for each in own]) for own in found}) == 1


@LATE
@TRANSPORTS
def test_who_is_several_loops_late_comes_to_the_end_all_the_same(comm, transport):
    # late in the second loop: in the first a rank may take its time to start
    found = comm.allgather(late_loops(comm, loops=6, late_in=1, late_s=1.5))
    assert [each[1] for each in found[1]] == [each[1] for each in found[3]] == [8, 16, 24, 32, 40, 48]
    versions = [each[1] for each in found[0]]
    assert len(versions) == 6 and versions == sorted(versions) and versions[-1] == 48
    assert found[3][5][3] < found[0][1][3], "nobody waited for it"


DYING = f"""
import os, sys, time
sys.path.insert(0, {os.path.dirname(__file__)!r})
from mpi4py import MPI
from test_epochs import late_loops
def between(session, number):
    print("loop", MPI.COMM_WORLD.rank, number, session.version, flush=True)
    os._exit(0) if session.worker == 0 and number == 0 else time.sleep(0.3)
late_loops(MPI.COMM_WORLD, loops=3, between=between)
"""


@TRANSPORTS
def test_a_worker_that_dies_between_loops_leaves_nobody_waiting(transport):
    run = run_script(4, DYING, env={"MPISYNC_TRANSPORT": transport})
    text = f"{run.stdout}\n{run.stderr}"
    assert not run.timed_out and run.left == (), text  # plain mpirun may end the job for it
    loops = [line.split() for line in run.stdout.splitlines() if line.startswith("loop ")]
    assert sorted(loop[1:] for loop in loops if loop[2] == "0") == [[str(rank), "0", "8"] for rank in range(4)], text


@pytest.mark.parallel(WORKERS + 1)
@TRANSPORTS
@pytest.mark.parametrize("on_late", ["discard", "retry", "carry"])
@pytest.mark.parametrize("policy", ["backup:1", "async:2", "deadline:0.01"])
def test_every_sample_has_its_account_over_all_loops(comm, monkeypatch, transport, on_late, policy):
    monkeypatch.setenv("MPISYNC_POLICY", policy)
    model, rng = new_model(), np.random.default_rng(comm.rank)
    accepted = 0
    with mpisync.Session(comm, model, sgd(model), on_late=on_late, progress=False) as session:
        for number in range(6):
            verdicts = epoch(session, model, BATCHES, steps=4, each=lambda _: time.sleep(rng.exponential(0.003)))
            accepted += sum(verdict.accepted for verdict in verdicts)
            assert session.version == 4 * (number + 1) or session.worker is not None
        role = session._role
    accepted = comm.allreduce(accepted)
    if session.worker is None:
        for account in role._root.collector.accounts:
            assert account.handed == account.used + account.discarded + account.requeued + account.lost
        used = sum(account.used for account in role._root.collector.accounts)
        # a verdict is what the root has counted; carried gradients bring the samples of those before them
        assert used == 8 * accepted or on_late == "carry"


@pytest.mark.parametrize("where", ["a worker", "the root", "everywhere"])
@pytest.mark.parametrize("how", ["in place", "by data"])
@TRANSPORTS
@pytest.mark.parallel(WORKERS + 1)
def test_writes_between_loops_are_refused_unless_they_are_put_back(comm, transport, where, how):
    model = new_model()

    def write(factor):
        if where == "everywhere" or (session.worker is None) == (where == "the root"):
            with torch.no_grad():
                (model[0].weight if how == "in place" else model[0].weight.data).mul_(factor)

    with fails_everywhere(comm, RuntimeError, "parameter '0.weight' was written to between two loops"):
        with mpisync.Session(comm, model, sgd(model), progress=False) as session:
            epoch(session, model, BATCHES, steps=2)
            write(2.0)
            write(0.5)
            epoch(session, model, BATCHES, steps=2)
            assert session.version == 4
            write(2.0)
            epoch(session, model, BATCHES, steps=2)


@pytest.mark.parallel(WORKERS + 1)
def test_what_is_written_after_the_last_loop_lasts(comm):
    model = new_model(norm=True)
    with mpisync.Session(comm, model, sgd(model), progress=False) as session:
        epoch(session, model, BATCHES, steps=2)
        with torch.no_grad():
            model[0].weight.fill_(3.0)
            model[1].running_mean.fill_(4.0)
    assert (model[0].weight == 3.0).all() and (model[1].running_mean == 4.0).all()
    assert len(set(on_all(comm, float(model[0].bias.detach().sum())))) == 1


@pytest.mark.parallel(WORKERS + 1)
def test_buffers_that_change_between_loops_are_told_of_and_come_back(comm, capfd):
    model = new_model(norm=True)
    kept = []
    with mpisync.Session(comm, model, sgd(model), progress=False) as session:
        for _ in range(3):
            epoch(session, model, BATCHES, steps=2)
            kept.append(model[1].running_mean.clone())
            model(BATCHES[0][0] + 9)  # in train mode
            assert not torch.equal(kept[-1], model[1].running_mean)
    text = "".join(comm.allgather(capfd.readouterr().err))
    assert text.count("buffer '1.running_mean' was changed between two loops") == 1 + 1, text  # once a loop
    assert all(rank == kept[2].tolist() for rank in comm.allgather(kept[2].tolist()))


@pytest.mark.parallel(WORKERS + 1)
def test_loops_inside_of_loops_are_refused(comm):
    model = new_model()
    with fails_everywhere(comm, RuntimeError, "inside the loop of another call"):
        with mpisync.Session(comm, model, sgd(model), progress=False) as session:
            for _ in session.batches(BATCHES, steps=3):
                epoch(session, model, BATCHES, steps=3)


@pytest.mark.parametrize(("first", "second", "says"), [
    ({"on_late": "requeue"}, {}, "give epochs= of them together"),
    ({}, {"resume": {"on_late": "discard", "seed": 0, "accounts": []}}, "resume= belongs to its first loop"),
])  # fmt: skip
@pytest.mark.parallel(WORKERS + 1)
def test_what_a_second_loop_cannot_have_is_refused(comm, first, second, says):
    model = new_model()
    with fails_everywhere(comm, RuntimeError, says):
        with mpisync.Session(comm, model, sgd(model), progress=False, **first) as session:
            epoch(session, model, BATCHES, steps=2)
            session.batches(BATCHES, steps=2, **second)


@pytest.mark.parallel(WORKERS + 1)
@TRANSPORTS
def test_a_loop_that_was_left_by_break_is_that_loop_only(comm, transport):
    model, counts = new_model(), []
    with mpisync.Session(comm, model, sgd(model), policy=mpisync.BackupWorkers(0), progress=False) as session:
        for number in range(3):
            for count, (x, y) in enumerate(session.batches(BATCHES, steps=4)):
                loss_of(model, x, y).backward()
                if number == 1 and session.worker == 0 and count == 1:
                    break
                session.step()
            counts.append(count + 1 if session.worker is not None else 0)
    assert session.version == 12
    assert comm.allgather(counts) == [[4, 2, 4], [4, 4, 4], [0, 0, 0]]
    assert len({values.tobytes() for values in on_all(comm, flat(model))}) == 1


@pytest.mark.parallel(WORKERS + 1)
def test_all_may_leave_a_loop_by_break(comm):
    model = new_model()
    with mpisync.Session(comm, model, sgd(model), progress=False) as session:
        for _ in range(3):
            for count, (x, y) in enumerate(session.batches(BATCHES)):
                loss_of(model, x, y).backward()
                session.step()
                if count == 2:
                    break
    assert session.version >= 7


@pytest.mark.parallel(WORKERS + 1)
@TRANSPORTS
def test_stop_ends_this_loop_and_all_that_follow(comm, transport):
    model, verdicts = new_model(), []

    def stop(session):
        if session.worker == 0 and session.version >= 7:
            session.stop()

    with mpisync.Session(comm, model, sgd(model), progress=False) as session:
        for _ in range(4):
            verdicts.append(len(epoch(session, model, BATCHES, steps=5, each=stop)))
    assert 7 <= session.version < 10 and verdicts[2:] == [0, 0]
    assert len(set(on_all(comm, session.version))) == 1


@pytest.mark.parallel(2)
def test_one_worker_and_the_root(comm):
    model = new_model()
    with mpisync.Session(comm, model, sgd(model), progress=False) as session:
        for _ in range(3):
            epoch(session, model, BATCHES, steps=3)
    assert session.version == 9


def test_one_process_alone():
    from mpi4py import MPI

    model, own = new_model(), new_model()
    optimizer, others = sgd(model), sgd(own)
    with mpisync.Session(MPI.COMM_SELF, model, optimizer, progress=False) as session:
        for _ in range(3):
            assert len(epoch(session, model, BATCHES, steps=3)) == 3
            validate(model)
    on_union(own, others, BATCHES, loss_of, workers=1, steps=range(9))
    assert np.array_equal(flat(model), flat(own)) and session.version == 9


# -- data --------------------------------------------------------------------------------------------


def drawn(batches, count):
    return [next(batches) for _ in range(count)]


def test_a_loader_that_comes_again_goes_on_where_it_was():
    whole = ContinuedBatches(1, 2, seed=5)
    expected = drawn(whole.of(same := loader()), 12)
    parts = ContinuedBatches(1, 2, seed=5)
    found = [one for _ in range(4) for one in drawn(parts.of(same), 3)]
    assert [sequence for _, sequence in found] == [sequence for _, sequence in expected] == list(range(12))
    for (one, _), (other, _) in zip(found, expected, strict=True):
        assert torch.equal(one[0], other[0])
    whole.close()
    parts.close()


def test_another_loader_begins_anew_in_another_order_and_with_random_numbers_of_its_own():
    data = ContinuedBatches(0, 2, seed=5)
    first = drawn(data.of(loader()), 4)  # its share of one epoch
    second = drawn(data.of(loader()), 4)
    assert [sequence for _, sequence in second] == [4, 5, 6, 7]
    orders = [torch.cat([batch[0] for batch, _ in part]) for part in (first, second)]
    assert not torch.equal(*orders)
    data.close()


def test_an_iterator_for_each_loop_is_a_new_one():
    data = ContinuedBatches(0, 2, seed=5)
    assert [drawn(data.of(iter([1, 2, 3])), 2)[0][0] for _ in range(3)] == [1, 1, 1]
    data.close()


class Marked(Dataset):
    """Samples that tell which process has drawn them."""

    def __len__(self):
        return len(DATA)

    def __getitem__(self, index):
        return *DATA[index], os.getpid()


@pytest.mark.parallel(WORKERS + 1)
def test_processes_of_a_loader_live_on_from_loop_to_loop(comm):
    model, pids = new_model(), set()
    data = DataLoader(Marked(), batch_size=8, shuffle=True, num_workers=1, persistent_workers=True)
    with mpisync.Session(comm, model, sgd(model), progress=False) as session:
        for _ in range(3):
            for x, y, drawn_by in session.batches(data, steps=3):
                pids.update(drawn_by.tolist())
                loss_of(model, x, y).backward()
                session.step()
    assert session.version == 9 and len(pids) == (session.worker is not None) and os.getpid() not in pids
