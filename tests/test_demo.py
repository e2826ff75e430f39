"""The demo: what it refuses, and a short one from end to end."""

import subprocess
import sys

import pytest
from launch import environment

from mpisync import launchers
from mpisync.commands import demo, main


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--workers", "1"], "the demo needs at least 2 workers, not 1"),
        (["--steps", "0"], "the number of steps must be at least 1, not 0"),
        (["--delay", "-1"], "the delay must be from 0 to 60 seconds, not -1.0"),
        (["--policy", "backup:4"], "backup must be less than the number of workers"),
        (["--policy", "nonsense"], "a policy must be one of backup:B"),
        (["--on-late", "retry"], "--data and --on-late belong to a task: name one by --task"),
        (["--task", "mnist"], "the task mnist reads local files: give the folder"),
        (["--task", "mnist", "--data", "."], ". has neither train-images-idx3-ubyte nor"),
    ],
)
def test_refuses_before_anything_is_started(arguments, rule, capsys, monkeypatch):
    monkeypatch.setattr(demo.subprocess, "Popen", None)
    assert main.main(["demo", *arguments]) == 1
    assert f"mpisync demo: {rule}" in capsys.readouterr().err


def test_says_what_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert main.main(["demo"]) == 1
    assert "the demo needs torch and sklearn: pip install torch scikit-learn" in capsys.readouterr().err


def test_a_script_that_fails_is_an_error_of_the_demo():
    with pytest.raises(RuntimeError, match="the run ended with exit code 3"):
        demo._echoed([sys.executable, "-c", "print('so far'); raise SystemExit(3)"])


@pytest.mark.timeout(240)
@pytest.mark.skipif(launchers.placement() is not None, reason="it starts mpirun itself")
def test_shows_both_runs_side_by_side():
    plain = {k: v for k, v in environment().items() if not k.startswith(("OMPI_", "PRTE_"))}
    run = subprocess.run(
        [sys.executable, "-m", "mpisync", "demo", "--steps", "5", "--workers", "2", "--delay", "0.05"],
        capture_output=True, text=True, env=plain, timeout=230,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert [line for line in lines if line.startswith("===")] == [
        "=== full synchronous (backup:0): 2 workers, worker 0 sleeps 0.05 s a batch",
        "=== backup:1: 2 workers, worker 0 sleeps 0.05 s a batch",
    ]
    assert sum(line.startswith("5 steps in ") for line in lines) == 2
    tables = [line.split() for line in lines if line[:7].strip().isdecimal()]
    assert [(row[0], row[1]) for row in tables[:2]] == [("0", "5"), ("1", "5")]  # all of both
    assert sum(int(row[1]) for row in tables[2:]) == 5  # one gradient a step
    assert lines[-1].startswith("backup:1 is ") and "test accuracy" in lines[-1]
