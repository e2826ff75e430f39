"""What `make gpu-test` tries, on a card where there is one; and that its script would notice what is wrong."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from launch import ROOT, environment
from stand_in import StandIn

from mpisync import launchers

sys.path.append(str(ROOT / "benchmarks"))
import gpu  # noqa: E402 (a script of that folder)
from on_card import arithmetic, card  # noqa: E402

HAS_CARD = any(Path("/proc/driver/nvidia/gpus").glob("*"))  # torch would take seconds to say so
CHECKS = [name for name, step in gpu.STEPS.items() if step.is_check and name != "facts"]
pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(launchers.placement() is not None, reason="it starts MPI jobs itself"),
]


def run(*words, python=(sys.executable,)):
    """Run the script; return its exit code, what it says of each step, and all that it prints."""
    command = [*python, str(ROOT / "benchmarks/gpu.py"), *words]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=230)
    outcomes = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    return ended.returncode, {one["name"]: one for one in outcomes}, ended.stdout + ended.stderr


@pytest.mark.skipif(not HAS_CARD, reason="this machine has no NVIDIA card")
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_card(name):
    code, outcomes, said = run("--only", name)
    assert code == 0 and outcomes[name]["outcome"] == "ok", said


@pytest.mark.skipif(HAS_CARD, reason="this machine has a card")
def test_without_a_card_nothing_passes():
    code, outcomes, said = run("checks")
    assert (code, outcomes) == (2, {}) and said.startswith("no card here: nothing was tried (torch "), said


def test_a_step_that_fails_in_any_way_stops_none_of_the_others(tmp_path):
    path = tmp_path / "found.json"
    words = ["--stand-in", "--only", ",".join(gpu.FOR_TESTS), "--out", str(path)]
    code, outcomes, said = run(*words)
    assert code == 1
    assert {name: (one["outcome"], one["reason"]) for name, one in outcomes.items() if name != "facts"} == {
        "wrong": ("failed", "AssertionError: two is not one"),
        "hanging": ("failed", "not done after 10 s; the last it found: one"),
        "killed": ("failed", "it ended with -9: "),
        "skipped": ("skipped", "there is no second card"),
        "right": ("ok", ""),
    }
    assert outcomes["hanging"]["figures"] == {"one": 1}, "what a step had found before it hung counts"
    assert said.splitlines()[-1] == "not right, or not tried: wrong, hanging, killed, skipped"
    kept = json.loads(path.read_text())
    assert kept["machine"]["card"] and kept["steps"] == [one for one in outcomes.values() if one["name"] != "facts"]
    assert run("--stand-in", "--only", "right", "--out", str(path))[0] == 0
    names = [one["name"] for one in json.loads(path.read_text())["steps"]]
    assert names == [*(name for name in gpu.FOR_TESTS if name != "right"), "right"], "what was not tried again stays"


def test_what_is_not_tried_is_not_right(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--stand-in", "--only", "right"])
    assert gpu.main() == 0
    monkeypatch.setattr(gpu, "_LEAST_S", 1000.0)
    assert gpu.main() == 1
    assert "right  skipped      0.0  no time was left of 240 s" in capfd.readouterr().out


def test_a_bit_that_differs_is_found(monkeypatch):
    stand_in = StandIn()
    compared = arithmetic.Compared(types.SimpleNamespace(memory=stand_in, array=None))
    compared.card.array = types.MethodType(card.Card.array, compared.card)
    gradients = [np.ones(100, np.float32), np.linspace(0, 1, 100, dtype=np.float32)]
    compared.fold(gradients, arithmetic.DTYPES["float32"], divisor=3.0)
    real = StandIn.to_host

    def spoilt(self, array):
        result = real(self, array)
        result.view(np.uint32)[-1] ^= array.dtype == np.float32
        return result

    monkeypatch.setattr(StandIn, "to_host", spoilt)
    with pytest.raises(AssertionError, match="1 of 100 elements differ from the CPU's: float32, 2 gradients of 100"):
        compared.fold(gradients, arithmetic.DTYPES["float32"], divisor=3.0)
    nan, zero = np.array([np.nan, 0.0], np.float32), np.array([-np.nan, -0.0], np.float32)
    assert arithmetic.differing(nan, zero) == 1 and arithmetic.differing(nan, nan[::-1].copy()) == 2


@pytest.mark.parametrize("names", ["bits,ipc", pytest.param(",".join(CHECKS), marks=pytest.mark.long)])
def test_the_steps_pass_on_a_stand_in(names):
    code, outcomes, said = run("--stand-in", "--only", names, "--limit", "200")
    assert code == 0, said
    assert {one["outcome"] for one in outcomes.values()} == {"ok"}


@pytest.mark.long
def test_the_measures_run_on_a_stand_in():
    _, outcomes, said = run("measures", "--stand-in", "--limit", "200")
    assert {name for name, one in outcomes.items() if one["outcome"] != "ok"} == {"mps"}, said


def test_the_targets_take_a_python_that_is_named():
    def commands(*words):
        # without those of a make that runs the tests
        own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        run = subprocess.run(["make", "-n", *words], cwd=ROOT, env=own, capture_output=True, text=True, timeout=60)
        return run.stdout

    assert commands("gpu-test", "gpu-bench", "PYTHON=python9", "ARGS=--x").splitlines() == [
        "python9 benchmarks/gpu.py checks --limit 150 --x",
        "python9 benchmarks/gpu.py measures --limit 90 --x",
    ]
    assert commands("gpu-test").splitlines()[-1].startswith(".venv/bin/python benchmarks/gpu.py checks")
