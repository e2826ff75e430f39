"""`mpisync bench --tensorflow`: what marks tell, what is refused, and that nothing outlives it.

TensorFlow itself takes part in the last tests only, where there is an interpreter that has it: $TENSORFLOW_PYTHON, else
.venv-tensorflow/bin/python of the repository. The others have a script in its place, or a module that is its namesake.
"""

import doctest
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from launch import ROOT, Job
from test_bench import command

from mpisync import launchers
from mpisync.commands.benching import cluster, marks
from mpisync.commands.benching.marks import Gradient, Push

TASK = ROOT / "mpisync/commands/benching/sync_replicas.py"
SHORT = ["--workers", "2", "--sizes", "4000", "--iterations", "3", "--skip", "1"]


def mean(gradients, workers, divisor=None):
    sums = [sum(column) for column in zip(*(marks.marked(workers, each) for each in gradients), strict=True)]
    return [total / (divisor or len(gradients)) for total in sums]


# -- what marks tell ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gradients",
    [
        [Gradient(0, 0, 0), Gradient(1, 0, 0), Gradient(2, 0, 0)],
        [Gradient(1, 6, 4), Gradient(1, 7, 4), Gradient(3, 5, 4)],  # one worker counts twice
        [Gradient(0, 7, 5), Gradient(0, 8, 6), Gradient(0, 9, 6), Gradient(2, 1000, 6)],  # and three times, once stale
        [Gradient(3, 12, 12)],
        [Gradient(worker, sequence, 90_000) for worker in range(4) for sequence in range(100_001, 100_009)],
    ],
)
def test_an_update_shows_whose_gradients_it_is_the_mean_of(gradients):
    found = marks.averaged(mean(gradients, 4), 4)
    assert len(found) == len(gradients) and set(found) == set(gradients)


def test_the_rest_of_marks_is_said_in_its_docstrings():
    assert doctest.testmod(marks).failed == 0 and marks.count(4) == 97 == len(mean([Gradient(0, 0, 0)], 4))


PAIR = [Gradient(0, 3, 2), Gradient(1, 3, 2)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (mean(PAIR, 2, divisor=3), "no mean of 2 whole gradients: place 3 of worker 0 has 0.667, 2.000, 1.333"),
        (mean([Gradient(0, 0, 0), Gradient(1, 0, 0)], 2, divisor=3), "place 0 of worker 0 has 0.667, 0.000, 0.000"),
        ([0.0] * marks.count(2), "no mean of 0 gradients"),
        (mean([PAIR[0]] * 2, 2, divisor=1), "no mean of 1 whole gradients"),  # one, counted twice
        ([*mean(PAIR, 2)[:19], 0.0, *mean(PAIR, 2)[20:]], "no mean of 2 whole gradients"),  # in part
        ([*mean(PAIR, 2)[:-1], 0.5], "the mark of all is 0.500"),
    ],
)
def test_what_is_no_mean_of_whole_gradients_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        marks.averaged(wrong, 2)


def test_the_fate_of_every_gradient_is_counted():
    # Worker 0 counts twice in update 0, and a third gradient of it is of version 1, but handed in for step 0; worker 1
    # is late for step 0; update 1 has three gradients where two are due; nobody updates version 2.
    pushes = [
        [Push(0, 0), Push(0, 0), Push(1, 0), Push(1, 1)],
        [Push(0, 0), Push(1, 1), Push(2, 1)],
        [Push(0, 1)],
    ]
    updates = [[Gradient(0, 0, 0), Gradient(0, 1, 0)], [Gradient(0, 3, 1), Gradient(1, 1, 1), Gradient(2, 0, 0)]]
    assert marks.fates(updates, pushes, aggregated=2) == {
        "updates": 2, "computed": 8, "computed_by_worker": [4, 3, 1], "used": 5, "used_by_worker": [3, 1, 1],
        "dropped": 3, "dropped_late": 1, "dropped_fresh": 1, "dropped_after": 1, "dropped_told": 0,
        "two_of_one": 1, "more_than_n": 1, "used_stale": 1,
    }  # fmt: skip


def test_what_workers_are_told_must_be_what_happened():
    update = [[Gradient(0, 0, 0)]]
    told = marks.fates(update, [[Push(0, 0, True)], [Push(0, 0, False)]], aggregated=1)
    assert (told["used"], told["dropped"], told["dropped_told"]) == (1, 1, 1)
    with pytest.raises(ValueError, match="is in an update, and as .*accepted=False.* it should not be"):
        marks.fates(update, [[Push(0, 0, False)]], aggregated=1)
    with pytest.raises(ValueError, match="no update holds gradient 0 of worker 1, which was accepted"):
        marks.fates(update, [[Push(0, 0, True)], [Push(0, 0, True)]], aggregated=1)


@pytest.mark.parametrize("pushes", [[[]], [[Push(1, 0)]]])
def test_what_nobody_handed_in_must_not_be_in_an_update(pushes):
    with pytest.raises(ValueError, match="it should not be"):
        marks.fates([[Gradient(0, 0, 0)]], pushes, aggregated=1)


def test_no_gradient_may_be_in_two_updates():
    with pytest.raises(ValueError, match="it should not be"):
        marks.fates([[Gradient(0, 0, 0)]] * 2, [[Push(0, 0)]], aggregated=1)


def test_runs_are_counted_together():
    one = {"used": 3, "used_by_worker": [2, 1]}
    assert marks.together([one, {"used": 4, "used_by_worker": [0, 4]}]) == {"used": 7, "used_by_worker": [2, 5]}


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (
            ["--tensorflow", sys.executable],
            f"must be a Python interpreter that has TensorFlow, and {sys.executable} has none; to make one: "
            "python3 -m venv .venv-tensorflow && .venv-tensorflow/bin/pip install tensorflow-cpu==2.21.0",
        ),
        (["--tensorflow", "no-such-python"], "'no-such-python' does not run: [Errno 2]"),
        (["--tensorflow", "x", "--burst", "3"], "--sizes, --iterations, --skip, --out and not --burst"),
        (["--tensorflow", "x", "--sizes", "384"], "--sizes must be at least 388 for the marks of 4 workers, not 384"),
        (["--tensorflow", "x", "--workers", "1"], "at least 2 workers, not 1"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_starts(typed, message, tmp_path):
    run = command(*typed, cwd=tmp_path)
    assert run.returncode == 1 and message in run.stderr and len(run.stderr.splitlines()) == 1, run.stderr


# -- a script in TensorFlow's place ---------------------------------------------------------------

ANSWERS = """
import sys
sys.path.insert(0, ROOT)
from mpisync.commands.benching import marks
from mpisync.commands.benching.marks import Gradient
def answer(order):
    "Worker 0 is there alone: all gradients of an update are its own; others are always late. A step takes 10 ms."
    n, updates, workers = order["aggregate"], order["updates"], len(task["cluster"]["worker"])
    if task["index"]:
        return {"pushes": [[0, 0]]}
    pushes, means = [], []
    for step in range(updates):
        own = [Gradient(0, len(pushes) + i, step) for i in range(n)]
        pushes += [[step, step]] * n
        means.append([sum(column) / n for column in zip(*(marks.marked(workers, each) for each in own))])
    return {"pushes": pushes, "means": means, "made_s": [0.01 * step for step in range(updates)], "right": RIGHT}
"""


@pytest.fixture
def stand_in(tmp_path):
    """Return a maker of interpreters that, whatever they are given to run, run a script of the test."""

    def make(answers, begin="", **names):
        path = tmp_path / "python"
        settings = "".join(f"{name} = {value!r}\n" for name, value in names.items())
        path.write_text(f"""#!{sys.executable}
import json, sys, time
if sys.argv[2] == "-c":
    sys.exit()
task = json.loads(sys.argv[3])
{begin}
{settings}{answers}
print(json.dumps({{"version": "0.0"}}), flush=True)
for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)
""")
        path.chmod(0o755)
        return str(path)

    return make


def check_document(document):
    assert list(document) == ["benchmark", "machine", "versions", "settings", "sizes"]
    assert document["benchmark"] == "tensorflow" and document["versions"]["tensorflow"]
    assert document["settings"] == {
        "workers": 2, "turns": 2, "sizes": [4000], "iterations": 3, "skip": 1, "out": None
    }  # fmt: skip
    (found,) = document["sizes"].values()
    assert list(found["ms"]) == [
        "TensorFlow, 2 of 2", "mpisync, 2 of 2", "TensorFlow, nothing fetched, 2 of 2",
        "mpisync, gradients checked for NaN, 2 of 2", "TensorFlow, 1 of 2", "mpisync, 1 of 2",
        "TensorFlow, 1 of 2, one straggles", "mpisync, 1 of 2, one straggles",
    ]  # fmt: skip
    assert list(found["gradients"]) == list(found["ms"])
    for what, counted in found["gradients"].items():
        assert counted["used"] + counted["dropped"] == counted["computed"] == sum(counted["computed_by_worker"])
        assert counted["used_stale"] == 0, what
        if what.startswith("mpisync"):  # from distinct workers, N of them, and nothing is lost without a word
            assert counted["two_of_one"] == counted["more_than_n"] == counted["dropped_fresh"] == 0, what
            assert counted["used"] == counted["updates"] * (2 if "2 of 2" in what else 1), what
            assert counted["dropped_told"] == counted["dropped"], what
        else:
            assert counted["updates"] == 2 * (3 + 1 + 1) and counted["dropped_told"] == 0, what
    return found


def test_both_are_measured_and_counted(stand_in, tmp_path):
    run = command("--tensorflow", stand_in(ANSWERS, ROOT=str(ROOT), RIGHT=True), *SHORT, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    found = check_document(json.loads(lines[-1]))
    assert found["ms"]["TensorFlow, 1 of 2"] == {"avg": 10, "p50": 10, "p95": 10, "p99": 10}
    ours = found["ms"]["mpisync, 1 of 2"]["p50"]
    assert found["ratios"]["TensorFlow, 1 of 2"] == pytest.approx(10 / ours, abs=0.01)
    assert set(found["ratios"]) == {what for what in found["ms"] if not what.startswith("mpisync, ")} | {
        "mpisync, gradients checked for NaN, 2 of 2", "TensorFlow/mpisync, gradients checked for NaN",
    }  # fmt: skip
    theirs = found["gradients"]["TensorFlow, 2 of 2"]
    assert theirs["used_by_worker"] == [20, 0] and theirs["two_of_one"] == 10 and theirs["dropped_late"] == 2
    straggler = found["gradients"]["mpisync, 1 of 2, one straggles"]["used_by_worker"][1]
    assert straggler == 0  # it sleeps four of TensorFlow's steps
    assert lines[1] == "# 4000 bytes, 2 workers, ms from version to version"
    (row,) = (line for line in lines if line.lstrip().startswith("TensorFlow, 1 of 2  "))
    assert row.split()[4:] == ["10.000"] * 4 + [f"{found['ratios']['TensorFlow, 1 of 2']:.1f}", "x", "mpisync"]
    twice = [line.split()[-2:] for line in lines if "two gradients of one worker" in line]
    assert twice == [["10", "0"], ["0", "0"], ["0", "0"]]


def test_a_wrong_variable_is_an_error(stand_in, tmp_path):
    run = command("--tensorflow", stand_in(ANSWERS, ROOT=str(ROOT), RIGHT=False), *SHORT, cwd=tmp_path)
    assert run.returncode == 1 and "bench: TensorFlow's variable is not what 5 updates make it" in run.stderr
    assert run.stderr.count("mpisync bench:") == 1 and "Traceback" not in run.stderr, run.stderr


DIES = "def answer(order):\n    print(*range(9), sep=chr(10), file=sys.stderr)\n    sys.exit(3)\n"


def test_a_task_that_dies_is_quoted_at_once(stand_in):
    with cluster.Cluster(stand_in("if task['index'] == 1:\n" + DIES.replace("def", " def").replace("\n    ", "\n      ")
                                  + "else:\n def answer(order): time.sleep(60)\n"), 2) as two:  # fmt: skip
        begin_s = time.monotonic()
        with pytest.raises(RuntimeError, match="ended with exit code 3: worker 1 said \n4\n5\n6\n7\n8$"):
            two.play(sleep_s=0.0)
        assert time.monotonic() - begin_s < 10
    assert all(task.returncode is not None for task in two._tasks)


def test_a_task_that_cannot_start_is_quoted(stand_in):
    broken = stand_in("", begin="if task['job'] == 'ps': sys.exit('no port')\ntime.sleep(60)")
    with pytest.raises(RuntimeError, match="ended with exit code 1: the parameter server said \nno port$"):
        cluster.Cluster(broken, 2)


def test_a_task_that_says_nothing_has_a_time_limit(stand_in, monkeypatch):
    monkeypatch.setattr(cluster, "_LIMIT_S", 1)
    with cluster.Cluster(stand_in("def answer(order): time.sleep(60)"), 2) as two:
        with pytest.raises(RuntimeError, match="TensorFlow gave no answer in 1 s: worker 0 said nothing"):
            two.play(sleep_s=0.0)


# -- nothing outlives it: our script of a task, and a module that is TensorFlow's namesake --------

NAMESAKE = """
import pathlib, time
from types import SimpleNamespace
__version__ = "0.0"
def nothing(*given, **named): pass
compat = SimpleNamespace(v1=SimpleNamespace(
    disable_eager_execution=nothing, disable_resource_variables=nothing,
    logging=SimpleNamespace(set_verbosity=nothing, ERROR=0), train=SimpleNamespace(Server=nothing),
))
def Graph():
    pathlib.Path(__file__).with_name("playing").touch()
    time.sleep(100)
"""


@pytest.fixture
def namesake(tmp_path):
    """Return an interpreter that has the namesake; its workers train for ever, and say so by a file."""
    folder = tmp_path / "modules/tensorflow"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(NAMESAKE)
    path = tmp_path / "python"
    path.write_text(f"""#!{sys.executable} -I
import runpy, sys
if sys.argv[2] != "-c":
    sys.path.insert(0, {str(folder.parent)!r})
    del sys.argv[:2]
    runpy.run_path(sys.argv[0], run_name="__main__")
""")
    path.chmod(0o755)
    return path


def wait_for(condition, timeout_s=20.0):
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, condition
        time.sleep(0.02)


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


OWNER = """
import sys
from mpisync.commands.benching.cluster import Cluster
owned = Cluster(sys.argv[1], 2)
print(*(task.pid for task in owned._tasks), flush=True)
owned.play(sleep_s=0.0)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_tasks_end_with_who_started_them(namesake, number):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, namesake], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        # which is ignored where tests run behind a shell
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        wait_for((namesake.parent / "modules/tensorflow/playing").exists)
        owner.send_signal(number)
        owner.wait(10)
        assert len(pids) == 3
        wait_for(lambda: all(map(is_gone, pids)), 5.0)
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()


@pytest.mark.parametrize("orders", ["", "{}\n"])
def test_a_task_ends_with_its_input_and_when_its_time_is_over(namesake, orders):
    task = {"cluster": {"ps": [], "worker": ["", ""]}, "job": "worker", "index": 0, "places": 8, "limit_s": 1}
    run = subprocess.run(
        [namesake, "-I", TASK, json.dumps({**task, "parent": os.getpid()})],
        input=orders.replace("{}", '{"name": "x"}'), capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    assert run.stdout == '{"version": "0.0"}\n' and run.returncode == (-signal.SIGALRM if orders else 0), run.stderr


@pytest.mark.skipif(launchers.placement() is not None, reason="it starts mpirun itself")
def test_ctrl_c_ends_the_command_and_all_that_it_started(namesake, tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    typed = [sys.executable, "-m", "mpisync", "bench", "--tensorflow", str(namesake), *SHORT]
    with Job(typed, folder, cwd=tmp_path) as job:
        wait_for((tmp_path / "modules/tensorflow/playing").exists, 60.0)
        assert len(job.pids()) >= 1 + 3 + 3  # the launcher, the ranks, the tasks
        job.process.send_signal(signal.SIGINT)
        run = job.finish(30.0)
    assert not run.timed_out and not run.left and run.returncode != 0, run.stderr


# -- TensorFlow itself ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tensorflow():
    """An interpreter that has TensorFlow, where there is one; one that is named must have it."""
    python = os.environ.get("TENSORFLOW_PYTHON") or str(ROOT / ".venv-tensorflow/bin/python")
    if "TENSORFLOW_PYTHON" not in os.environ and not os.path.exists(python):
        pytest.skip(f"TENSORFLOW_PYTHON names no interpreter, and there is no .venv-tensorflow with {cluster.PINNED}")
    cluster.check_python(python)
    return python


@pytest.mark.long
def test_tensorflow_drops_in_silence_and_we_do_not(tensorflow, tmp_path):
    run = command("--tensorflow", tensorflow, *SHORT, cwd=tmp_path)
    assert run.returncode == 0 and not run.stderr, run.stderr
    found = check_document(json.loads(run.stdout.splitlines()[-1]))
    assert all(found["gradients"][f"TensorFlow, {case}"]["dropped"] > 0 for case in ("2 of 2", "1 of 2"))


@pytest.mark.long
def test_tensorflows_own_errors_are_shown(tensorflow):
    said = "(?s)worker . said .*KeyError: 'fetch'"
    with cluster.Cluster(tensorflow, 2) as two, pytest.raises(RuntimeError, match=said):
        two.play(sleep_s=0.0, elements=1000, aggregate=2, updates=3)  # nothing is said about fetching
