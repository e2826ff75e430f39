"""benchmarks/paired.py: its statistics, its pairs, what it refuses, and which package a run measures."""

import ast
import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from launch import ROOT, environment

SCRIPT = ROOT / "benchmarks/paired.py"


def load():
    spec = importlib.util.spec_from_file_location("paired", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


paired = load()


# -- statistics ------------------------------------------------------------------------------------


def test_a_constant_ratio_has_an_interval_of_no_width():
    before_ms = [1.0, 2.0, 4.0, 8.0]
    assert paired.compared(before_ms, [1.5 * ms for ms in before_ms]) == {"ratio": 1.5, "interval": [1.5, 1.5]}


def test_the_ratio_is_after_to_before_pair_by_pair():
    # pairs of a busy machine are slow on both sides: medians of each side would say 1
    assert paired.compared([1.0, 10.0, 1.0], [2.0, 20.0, 1.0])["ratio"] == 2.0


def test_one_disturbed_pair_of_many_moves_little():
    found = paired.compared([1.0] * 15, [1.0, 1.01, 0.99] * 4 + [1.0, 1.02, 50.0])
    low, high = found["interval"]
    assert found["ratio"] == 1.0 and 0.99 <= low <= 1.0 <= high <= 1.02


def test_the_interval_holds_the_truth_as_often_as_it_says():
    random, held = np.random.default_rng(1), 0
    for _ in range(200):
        noise = random.lognormal(0.0, 0.1, 15)
        low, high = paired.compared(np.ones(15), 1.03 * noise)["interval"]
        held += low <= 1.03 <= high
    assert 0.88 * 200 <= held <= 200, "a bootstrap of few pairs holds a little less than 95 %"


def test_a_limit_is_exceeded_where_the_whole_interval_lies_above():
    found = {name: {"interval": interval} for name, interval in {"a": [1.03, 1.2], "b": [1.02, 1.1]}.items()}
    assert paired.slower(found, 1.02) == ["a"]
    assert paired.slower(found, 1.2) == paired.slower(found, None) == []


# -- pairs -----------------------------------------------------------------------------------------


def test_pairs_alternate_and_so_does_their_order(monkeypatch, tmp_path):
    asked = paired.parser().parse_args(["--before", "HEAD", "--pairs", "2", "--only", "fold"])
    ran, ms = [], {"before": 2.0, "after": 3.0, "same": 2.0}
    monkeypatch.setattr(paired, "unpack", lambda revision, folder: folder)
    monkeypatch.setattr(paired, "run_once", lambda name, copy: ran.append(copy.name) or {name: ms[copy.name]})
    found = paired.measure(asked, tmp_path)
    assert ran[:2] == ["before", "after"], "once each for the kernels' sake"
    assert ran[2:] == ["before", "after", "before", "same", "after", "before", "same", "before"]
    assert found == {
        "fold": {
            "before_ms": 2.0, "after_ms": 3.0, "ratio": 1.5, "interval": [1.5, 1.5],
            "identical": {"ratio": 1.0, "interval": [1.0, 1.0]},
        }
    }  # fmt: skip


def test_a_run_measures_the_copy_that_it_is_given(monkeypatch, tmp_path):
    script = tmp_path / "measured.py"
    script.write_text("import json, mpisync\nprint(json.dumps({'file': mpisync.__file__, 'ms': mpisync.MS}))\n")
    monkeypatch.setattr(paired, "SCRIPT", script)
    for name, text in {"before": "MS = {'fold': 1.0}", "after": "MS = {'fold': 2.0}", "bad": "oh no"}.items():
        package = tmp_path / name / "mpisync"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(text)
    (tmp_path / "empty").mkdir()
    assert paired.run_once("fold", tmp_path / "before") == {"fold": 1.0}
    assert paired.run_once("fold", tmp_path / "after") == {"fold": 2.0}
    with pytest.raises(RuntimeError, match=r"(?s)fold ended with 1 with the package in bad:.*SyntaxError"):
        paired.run_once("fold", tmp_path / "bad")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "before"))
    with pytest.raises(RuntimeError, match="imported .* and not the package in"):
        paired.run_once("fold", tmp_path / "empty")


def test_a_run_that_does_not_end_is_ended(monkeypatch, tmp_path):
    script = tmp_path / "measured.py"
    script.write_text("import time\ntime.sleep(100)\n")
    monkeypatch.setattr(paired, "SCRIPT", script)
    monkeypatch.setattr(paired, "RUN_LIMIT_S", 0.2)
    with pytest.raises(RuntimeError, match="fold took more than 0 s"):
        paired.run_once("fold", tmp_path)


def test_every_measure_has_its_number_of_ranks():
    tree = ast.parse((ROOT / "benchmarks/measured.py").read_text())  # importing it would start MPI here
    (table,) = (node.value for node in tree.body if isinstance(node, ast.AnnAssign))
    assert [key.value for key in table.keys] == list(paired.RANKS)


def test_a_copy_of_the_working_tree_is_the_package_as_it_is(tmp_path):
    paired.unpack(None, tmp_path)
    copied = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.py")}
    assert copied == {path.relative_to(ROOT): path.read_bytes() for path in (ROOT / "mpisync").rglob("*.py")}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="revisions are git's, and this is no clone")
def test_a_copy_of_a_revision_is_the_package_as_it_was(tmp_path):
    paired.unpack(paired.commit("HEAD"), tmp_path)
    shown = subprocess.run(["git", "show", "HEAD:mpisync/version.py"], cwd=ROOT, capture_output=True, check=True)
    assert (tmp_path / "mpisync/version.py").read_bytes() == shown.stdout


# -- the command line ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ([], "required: --before"),
        pytest.param(
            ["--before", "no-such-revision"],
            "must name a commit of this repository (see git log), not 'no-such-revision'",
            marks=pytest.mark.skipif(shutil.which("git") is None, reason="revisions are git's"),
        ),
        (["--before", "HEAD", "--after", "-x"], "--after"),
        (["--before", "HEAD", "--pairs", "1"], "must be a whole number and at least 2, not '1'"),
        (["--before", "HEAD", "--pairs", "many"], "must be a whole number and at least 2, not 'many'"),
        (["--before", "HEAD", "--only", "fold,swim"], "must be of fold,step-100mb,step-1kb,session, with commas "),
        (["--before", "HEAD", "--limit", "0"], "must be a ratio greater than 0, as 1.02, not '0'"),
        (["--before", "HEAD", "--limit", "2%"], "must be a ratio greater than 0, as 1.02, not '2%'"),
    ],
)
def test_what_cannot_be_compared_is_refused(typed, message, capsys, monkeypatch):
    if typed[1:2] != ["no-such-revision"]:  # an sdist has no git
        monkeypatch.setattr(paired, "commit", lambda text: text)
    with pytest.raises(SystemExit) as ended:
        paired.parser().parse_args(typed)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_table_the_document_and_the_exit_code(tmp_path):
    """All but the measurements, which the script's own functions are replaced for."""
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("paired", {str(SCRIPT)!r})
paired = importlib.util.module_from_spec(spec)
spec.loader.exec_module(paired)
paired.commit = lambda text: text
paired.unpack = lambda revision, folder: folder
paired.run_once = lambda name, copy: {{name: 2.0 if copy.name == "after" else 1.0}}
sys.exit(paired.main())
"""
    out = tmp_path / "results.jsonl"
    for limit, code_wanted in (("1.5", 1), ("2.5", 0)):
        typed = ["--before", "old", "--pairs", "2", "--only", "fold", "--limit", limit, "--out", str(out)]
        run = subprocess.run(
            [sys.executable, "-c", code, *typed], env=environment(), capture_output=True, text=True, timeout=60
        )
        assert run.returncode == code_wanted, run.stderr
        assert ("fold is slower: its ratio is at least 2, and --limit is 1.5" in run.stderr) == bool(code_wanted)
        head, row, line = run.stdout.splitlines()
        assert row.split() == "fold 1.000 2.000 2.000 2.000 to 2.000 1.000 1.000 to 1.000".split()
        document = json.loads(line)
        assert list(document) == ["benchmark", "machine", "versions", "settings", "measures"]
        assert document["settings"]["before"] == "old" and document["settings"]["after"] == "the working tree"
    assert len(out.read_text().splitlines()) == 2
