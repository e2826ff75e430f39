"""Ways to go through session.batches: wrappers that work, and those that draw ahead, which are refused."""

import functools
import itertools
import queue
import threading

import pytest
import torch
import torch.nn.functional as F
from launch import run_script
from torch import nn
from training import WORKERS, fails_everywhere, flat, on_all, on_union

import mpisync

BATCHES = [
    tuple(torch.randn(4, width, generator=torch.Generator().manual_seed(n)) for width in (6, 3)) for n in range(12)
]
ALL = mpisync.BackupWorkers(0)
LATE = ("discard", "retry", "carry", "requeue")


def run(comm, wrap, late="discard", steps=6, data=None, **more):
    """Train by a loop over wrap(session.batches(...)), whose items are batches; the model and the batches used."""
    torch.manual_seed(0)
    model, used = nn.Linear(6, 3), []
    extent = {"epochs": 1} if late == "requeue" else {"steps": steps}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with mpisync.Session(comm, model, optimizer, policy=ALL, progress=False, on_late=late, **more) as session:
        for x, y in wrap(session.batches(BATCHES if data is None else data, **extent)):
            used.append(x)
            loss = F.mse_loss(model(x), y)
            loss.backward()
            session.step(loss)
    return model, session, used


@functools.cache
def reference(workers, steps=6):
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    on_union(model, optimizer, BATCHES, lambda m, x, y: F.mse_loss(m(x), y), workers=workers, steps=range(steps))
    return flat(model)


# -- what works ------------------------------------------------------------------------------------


def timed(batches):
    """A wrapper of one's own that draws nothing ahead, as progress bars are."""
    for number, batch in enumerate(batches):
        assert number >= 0
        yield batch


def by_hand(batches):
    batches = iter(batches)
    while (batch := next(batches, None)) is not None:
        yield batch


class Peekable:
    """Looks whether there is a next batch when it is asked, after the step."""

    def __init__(self, batches):
        self.batches, self.next = batches, []

    def __iter__(self):
        return self

    def __bool__(self):
        if not self.next:
            self.next += list(itertools.islice(self.batches, 1))
        return bool(self.next)

    def __next__(self):
        if not self:
            raise StopIteration
        return self.next.pop()


WORKING = {
    "for": lambda batches: batches,
    "enumerate": lambda batches: (batch for _, batch in enumerate(batches)),
    "zip": lambda batches: (batch for batch, _ in zip(batches, itertools.count(), strict=False)),
    "islice": lambda batches: itertools.islice(batches, 1000),
    "chain": lambda batches: itertools.chain([], batches),
    "map": lambda batches: map(tuple, batches),
    "timed": timed,
    "by hand": by_hand,
    "peekable": Peekable,
}


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("transport", ["shared", "messages"])
@pytest.mark.parametrize("wrap", WORKING)
def test_wrappers_that_draw_step_by_step_work(comm, monkeypatch, transport, wrap):
    monkeypatch.setenv("MPISYNC_TRANSPORT", transport)
    model, session, used = run(comm, WORKING[wrap])
    assert session.version == 6 and len(used) == (0 if comm.rank == WORKERS else 6)
    for values in on_all(comm, flat(model)):
        assert abs(values - reference(WORKERS)).max() < 1e-6


def skipping(comm, wrap, skip):
    """Train by a loop that passes batches over, the first ones too; which batches had a step."""
    model, stepped = nn.Linear(6, 3), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with mpisync.Session(comm, model, optimizer, policy=ALL, progress=False) as session:
        for number, batch in enumerate(wrap(session.batches(BATCHES, steps=4))):
            if skip == "kept":
                x, y = batch
                if number < 2:
                    continue
            else:
                batch = {"x": batch[0], "y": batch[1]}
                if number < 2:
                    continue
                x, y = batch["x"], batch["y"]
            loss = F.mse_loss(model(x), y)
            loss.backward()
            session.step(loss)
            stepped.append(number)
    return stepped


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("wrap", ["for", "timed", "islice", "by hand"])
@pytest.mark.parametrize("skip", ["kept", "made anew"])
def test_the_first_batches_may_be_passed_over(comm, wrap, skip):
    stepped = skipping(comm, WORKING[wrap], skip)
    assert stepped == ([] if comm.rank == WORKERS else [2, 3, 4, 5])


@pytest.mark.parallel(2)
def test_the_only_batch_may_be_passed_over_though_it_comes_again(comm):
    model, batch = nn.Linear(6, 3), BATCHES[0]
    with mpisync.Session(comm, model, torch.optim.SGD(model.parameters(), lr=0.1), progress=False) as session:
        for number, (x, y) in enumerate(session.batches([batch], steps=2)):
            if number:
                F.mse_loss(model(x), y).backward()
                session.step()
    assert session.version == 2


# -- what draws ahead ------------------------------------------------------------------------------


def lookahead(batches):
    """Yield each batch when the next one is known."""
    batches = iter(batches)
    try:
        current = next(batches)
    except StopIteration:
        return
    for following in batches:
        yield current
        current = following
    yield current


def prefetching(batches, depth=3):
    waiting = list(itertools.islice(batches, depth))
    while waiting:
        yield waiting.pop(0)
        waiting += itertools.islice(batches, 1)


class Preloader:
    """As many scripts have it: loads the next batch before it hands out this one."""

    def __init__(self, batches):
        self.batches = iter(batches)
        self.load()

    def load(self):
        try:
            self.following = next(self.batches)
        except StopIteration:
            self.following = None

    def __iter__(self):
        while (batch := self.following) is not None:
            self.load()
            yield batch


AHEAD = {
    "lookahead": lookahead,
    "prefetching": prefetching,
    "preloader": Preloader,
    "pairwise": lambda batches: (one for one, _ in itertools.pairwise(batches)),
    "zipped with itself": lambda batches: (one for one, _ in zip(batches, batches, strict=False)),
    "through a bar": lambda batches: timed(lookahead(batches)),
    "over a bar": lambda batches: lookahead(timed(batches)),
    "changed on the way": lambda batches: ((x * 1, y * 1) for x, y in lookahead(batches)),
    "list": list,
}


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.timeout(30)
@pytest.mark.parametrize("wrap", AHEAD)
@pytest.mark.parametrize("late", LATE)
def test_drawing_ahead_is_refused_at_the_first_step(comm, wrap, late):
    if wrap == "list" and late == "requeue":
        pytest.skip("an epoch has its end, and so has the list")
    with fails_everywhere(comm, RuntimeError, "drawn from session.batches before the step of the one before"):
        run(comm, AHEAD[wrap], late)


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("wrap", ["lookahead", "pairwise", "list"])
def test_drawing_ahead_is_refused_over_messages_too(comm, monkeypatch, wrap):
    monkeypatch.setenv("MPISYNC_TRANSPORT", "messages")
    with fails_everywhere(comm, RuntimeError, "drawn from session.batches before the step", "num_workers="):
        run(comm, AHEAD[wrap])


@pytest.mark.parametrize("wrap", AHEAD)
def test_drawing_ahead_is_refused_in_one_process_too(wrap):
    from mpi4py import MPI

    with pytest.raises(RuntimeError, match="drawn from session.batches before the step"):
        run(MPI.COMM_SELF, AHEAD[wrap])


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("where", ["in the loop", "two at a time", "kept"])
def test_drawing_ahead_by_hand_is_refused(comm, where):
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(session, *batches):
        for x, y in batches:
            F.mse_loss(model(x), y).backward()
        session.step()

    with fails_everywhere(comm, RuntimeError, "drawn from session.batches before the step"):
        with mpisync.Session(comm, model, optimizer, policy=ALL, progress=False) as session:
            batches = iter(session.batches(BATCHES, steps=4))
            current = next(batches, None)
            if where == "two at a time":
                while current is not None:
                    other = next(batches)
                    step(session, current, other)
                    current = next(batches, None)
            for following in batches:
                step(session, current if where == "in the loop" else following)
                current = following if where == "in the loop" else current


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("late", LATE)
def test_a_prefetching_thread_is_refused(comm, late):
    def in_a_thread(batches):
        waiting = queue.Queue(2)

        def draw():
            try:
                for batch in batches:
                    waiting.put(batch)
            except RuntimeError as error:
                errors.append(error)  # as a thread dies: whoever waits for it is not told

        errors = []
        thread = threading.Thread(target=draw, daemon=True)
        thread.start()
        while True:
            yield waiting.get()

    with fails_everywhere(comm, RuntimeError, "in another thread than the one that called it"):
        run(comm, in_a_thread, late)


def test_a_loop_may_be_in_a_thread_of_its_own():
    from mpi4py import MPI

    found = []
    thread = threading.Thread(target=lambda: found.append(run(MPI.COMM_SELF, lambda batches: batches)[1].version))
    thread.start()
    thread.join()
    assert found == [6]


# -- ends ------------------------------------------------------------------------------------------


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("count", [6, 1000])
def test_a_next_by_hand_that_finds_nothing_ends_the_loop_and_says_so(comm, capfd, count):
    torch.manual_seed(0)
    model, reached = nn.Linear(6, 3), False
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with mpisync.Session(comm, model, optimizer, policy=ALL, progress=False) as session:
        batches = iter(session.batches(BATCHES, steps=6))
        for _ in range(count):
            x, y = next(batches)
            F.mse_loss(model(x), y).backward()
            session.step()
        reached = True
    said = "next() found no further batch" in capfd.readouterr().err
    assert said == (not reached) == (comm.rank == WORKERS or count == 1000)
    assert session.version == 6
    for values in on_all(comm, flat(model)):
        assert abs(values - reference(WORKERS)).max() < 1e-6


@pytest.mark.parallel(WORKERS + 1)
def test_another_iterators_end_is_an_error_as_ever(comm):
    with fails_everywhere(comm, StopIteration):
        with mpisync.Session(comm, model := nn.Linear(6, 3), torch.optim.SGD(model.parameters(), lr=0.1)) as session:
            for _ in session.batches(BATCHES, steps=6):
                next(iter(()))


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("shorter", [[1, 2, 3], itertools.count()])
def test_a_loop_zipped_with_something_shorter_ends_with_it(comm, shorter):
    lasts = len(shorter) if isinstance(shorter, list) else 6
    model, session, _ = run(comm, lambda batches: (batch for batch, _ in zip(batches, shorter, strict=False)))
    assert session.version == lasts
    for values in on_all(comm, flat(model)):
        assert abs(values - reference(WORKERS, lasts)).max() < 1e-6


@pytest.mark.parallel(WORKERS + 1)
def test_batches_that_nobody_goes_through_are_an_error(comm):
    model = nn.Linear(6, 3)
    with fails_everywhere(comm, RuntimeError, "called and never gone through, so nothing was trained"):
        with mpisync.Session(comm, model, torch.optim.SGD(model.parameters(), lr=0.1), progress=False) as session:
            session.batches(BATCHES, steps=3)


@pytest.mark.parallel(WORKERS + 1)
def test_a_loop_that_was_left_may_be_gone_on_with(comm):
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def some(session, batches, count):
        for number, (x, y) in enumerate(batches, 1):
            F.mse_loss(model(x), y).backward()
            session.step()
            if number == count:
                return

    with mpisync.Session(comm, model, optimizer, policy=ALL, progress=False) as session:
        batches = session.batches(BATCHES, steps=6)
        some(session, batches, 2)
        some(session, batches, 1)
        for x, y in batches:
            F.mse_loss(model(x), y).backward()
            session.step()
    assert session.version == 6
    for values in on_all(comm, flat(model)):
        assert abs(values - reference(WORKERS)).max() < 1e-6


@pytest.mark.parallel(WORKERS + 1)
def test_a_loop_that_is_left_lets_its_loader_go_at_once(comm):
    ended = []

    class Data:
        def __iter__(self):
            try:
                while True:
                    yield BATCHES[comm.rank]
            finally:
                ended.append(True)

    model = nn.Linear(6, 3)
    with mpisync.Session(comm, model, torch.optim.SGD(model.parameters(), lr=0.1), progress=False) as session:
        for x, y in session.batches(Data(), steps=6):
            F.mse_loss(model(x), y).backward()
            session.step()
            break
        assert ended == [True] * (comm.rank < WORKERS)


# -- two sessions ----------------------------------------------------------------------------------


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.timeout(20)
@pytest.mark.parametrize("nested", [False, True])
def test_two_loops_at_a_time_are_refused(comm, nested):
    models = [nn.Linear(6, 3) for _ in range(2)]
    one, two = (
        mpisync.Session(comm, model, torch.optim.SGD(model.parameters(), lr=0.1), progress=False) for model in models
    )
    with fails_everywhere(comm, RuntimeError, "another session of the same root is not at its end"):
        with one, two:
            if nested:
                for _ in one.batches(BATCHES, steps=3):
                    for _ in two.batches(BATCHES, steps=3):
                        pass
            for _ in zip(one.batches(BATCHES, steps=3), two.batches(BATCHES, steps=3), strict=False):
                pass


@pytest.mark.parallel(WORKERS + 1)
def test_one_loop_after_the_other_is_no_two_at_a_time(comm):
    models = [nn.Linear(6, 3) for _ in range(2)]
    one, two = (
        mpisync.Session(comm, model, torch.optim.SGD(model.parameters(), lr=0.1), progress=False) for model in models
    )
    with one, two:
        for session, model in ((one, models[0]), (two, models[1])):
            for x, y in session.batches(BATCHES, steps=3):
                F.mse_loss(model(x), y).backward()
                session.step()
    assert one.version == two.version == 3


def test_in_one_process_two_loops_go_together():
    from mpi4py import MPI

    models = [nn.Linear(6, 3) for _ in range(2)]
    one, two = (
        mpisync.Session(MPI.COMM_SELF, model, torch.optim.SGD(model.parameters(), lr=0.1), progress=False)
        for model in models
    )
    with one, two:
        for (x, y), (z, t) in zip(one.batches(BATCHES, steps=3), two.batches(BATCHES, steps=3), strict=True):
            (F.mse_loss(models[0](x), y) + F.mse_loss(models[1](z), t)).backward()
            one.step()
            two.step()
    assert one.version == two.version == 3


SCRIPT = """
import torch
from mpi4py import MPI
import mpisync

model = torch.nn.Linear(6, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with mpisync.Session(MPI.COMM_WORLD, model, optimizer, progress=False) as session:
    batches = session.batches([torch.ones(4, 6)] * 4, steps=5)
    while True:
        model(next(batches)).mean().backward()
        session.step()
print("done", session.version, flush=True)
"""


def test_a_script_that_draws_by_hand_until_the_end_ends_well():
    run = run_script(3, SCRIPT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("done 5") == 3 and run.stderr.count("give next() a default") == 3
