"""`mpisync bench` and benchmarks/collective.py: one comparison, by either name."""

import argparse
import json
import subprocess
import sys

import pytest
from launch import ROOT, environment, run_script

from mpisync.commands import bench

SHORT = ["--sizes", "4096", "--iterations", "3", "--skip", "1", "--methods", "shared", "allreduce", "--no-kernel"]


def options(*typed):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(typed)


def command(*typed, cwd, env=None):
    plain = {k: v for k, v in environment(env).items() if not k.startswith(("OMPI_", "PRTE_"))}
    return subprocess.run(
        [sys.executable, "-m", "mpisync", "bench", *typed],
        cwd=cwd, env=plain, capture_output=True, text=True, timeout=100,
    )  # fmt: skip


def check_document(line, workers):
    document = json.loads(line)
    assert list(document) == ["benchmark", "machine", "versions", "settings", "sizes", "kernel"]
    assert document["settings"] == {
        "workers": workers, "backup": 0, "min": 4, "max": 1 << 20, "sizes": [4096], "iterations": 3, "skip": 1,
        "burst": None, "methods": ["shared", "allreduce"], "optimizer": "sgd", "no_kernel": True, "out": None,
    }  # fmt: skip
    (found,) = document["sizes"].values()
    assert list(found["ms"]) == ["mpisync shared", "MPI_Allreduce"] and list(found["ratios"]) == ["shared/allreduce"]
    assert all(each["p50"] > 0 for each in found["ms"].values())


def test_it_needs_no_repository_and_starts_its_own_workers(tmp_path):
    run = command(*SHORT, "--workers", "2", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[1] == "# 4096 bytes, ms" and lines[2].split() == ["avg", "p50", "p95", "p99"]
    check_document(lines[-1], workers=2)


@pytest.mark.long
def test_the_script_of_the_repository_is_the_same():
    run = run_script(3, ROOT / "benchmarks/collective.py", args=SHORT)
    assert run.returncode == 0 and not run.left, run.stderr
    check_document(run.stdout.splitlines()[-1], workers=2)


def test_what_was_typed_is_what_the_ranks_get():
    typed = ["--sizes", "1024", "4096", "--burst", "2", "--optimizer", "adamw", "--no-kernel", "--out", "a b.json"]
    assert bench.words(options("--workers", "7", *typed)) == typed
    assert bench.words(options()) == []
    again = options(*bench.words(options("--methods", "gloo", "--max", "64")))
    assert again.methods == ["gloo"] and again.max == 64


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--workers", "1"], "at least 2 workers, not 1"),
        (["--sizes", "8", "0"], "--sizes must be at least 1, not 0"),
        (["--iterations", "0"], "--iterations must be at least 1, not 0"),
        (["--sizes", str(1 << 33)], "sizes must be below 8589934592 bytes"),
        (["--max", str(1 << 34)], "take at most 2^31 - 1 numbers"),
        (["--burst", "0"], "--burst must be at least 1"),
        (["--skip", "-1"], "--skip must be at least 0"),
        (["--min", "5", "--max", "7"], "no power of two from --min 5 to --max 7"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(typed, message, tmp_path):
    run = command(*typed, cwd=tmp_path)
    assert run.returncode == 1 and message in run.stderr and len(run.stderr.splitlines()) == 1, run.stderr


def test_sizes_that_are_powers_of_two_are_taken():
    bench.check(options("--min", "8", "--max", "8"))
    bench.check(options("--min", "5", "--max", "8"))
