"""Say whether a change made anything slower: two revisions of this repository, measured in alternating pairs.

    python benchmarks/paired.py --before main                    the working tree against main
    python benchmarks/paired.py --before v1 --after v2 --only fold,session --pairs 30
    python benchmarks/paired.py --before main --limit 1.02       exit code 1 where something is surely 2 % slower

A pair is one run of each, in processes of their own, and gives one ratio, after to before; every second pair begins
with the other. A machine that gets slower by and by, or is busy for a while, thus slows both alike. Beside each such
pair runs one of identical code, before against before: what its ratios are away from 1 is noise. Where the two
intervals overlap widely, take more pairs or a quieter machine.

Measured are (in ms): the fold of four gradients of 25M float32; a step of 100 MB and of 1 kB by PartialReduce with four
workers on shared memory; a version of a Session with two workers, of a linear layer 20x20 and of a model with 25M
parameters. All pairs of all measures take about half an hour on two cores; with less than ten pairs an interval is
little more than a guess. The last line is JSON. Exit codes: 0; 1 where --limit is exceeded; 2 where something could not
be measured.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks/measured.py"
# How many ranks each measure of measured.py takes.
RANKS = {"fold": 1, "step-100mb": 5, "step-1kb": 5, "session": 3}
WORKING_TREE = "the working tree"
RUN_LIMIT_S = 600.0  # a first run compiles kernels; a usual one takes some ten seconds
RESAMPLES = 10_000


def parser() -> argparse.ArgumentParser:
    """Declare the command line."""
    about, more = str(__doc__).split("\n\n", 1)
    made = argparse.ArgumentParser(description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--before", required=True, metavar="REV", type=commit, help="a revision, as git names it")
    made.add_argument("--after", metavar="REV", type=commit, help=f"another (default: {WORKING_TREE})")
    made.add_argument("--pairs", type=number_of_pairs, default=15, help="of each measure (default 15)")
    made.add_argument("--only", type=measures, default=list(RANKS), metavar="NAMES", help=f"of {','.join(RANKS)}")
    made.add_argument("--limit", type=ratio, help="the largest ratio that will do, as 1.02")
    made.add_argument("--out", help="append the JSON line to this file")
    return made


def commit(text: str) -> str:
    """Parse a revision into its commit."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", "--end-of-options", f"{text}^{{commit}}"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise argparse.ArgumentTypeError(f"must name a commit of this repository (see git log), not {text!r}")
    return run.stdout.strip()


def number_of_pairs(text: str) -> int:
    """Parse a number of pairs."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be a whole number and at least 2, not {text!r}")
    return int(text)


def measures(text: str) -> list[str]:
    """Parse names of measures."""
    names = text.split(",")
    if unknown := [name for name in names if name not in RANKS]:
        raise argparse.ArgumentTypeError(f"must be of {','.join(RANKS)}, with commas between, not {unknown[0]!r}")
    return names


def ratio(text: str) -> float:
    """Parse a ratio."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a ratio greater than 0, as 1.02, not {text!r}")
    return value


# -- statistics ------------------------------------------------------------------------------------


def compared(before_ms: Sequence[float], after_ms: Sequence[float]) -> dict[str, Any]:
    """Return the median of the pairs' ratios and its 95 % bootstrap confidence interval.

    Args:
        before_ms: One number a pair.
        after_ms: The other, pair by pair.
    """
    ratios = np.asarray(after_ms) / np.asarray(before_ms)
    drawn = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5])
    return {"ratio": round(float(np.median(ratios)), 4), "interval": [round(float(low), 4), round(float(high), 4)]}


def summarised(
    before_ms: Sequence[float], after_ms: Sequence[float], same_ms: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """Return what is known of one measure.

    Args:
        before_ms: The first of the pairs that are compared.
        after_ms: The second.
        same_ms: Both of the pairs of identical code.
    """
    return {
        "before_ms": round(statistics.median(before_ms), 4),
        "after_ms": round(statistics.median(after_ms), 4),
        **compared(before_ms, after_ms),
        "identical": compared(*same_ms),
    }


def slower(found: dict[str, dict[str, Any]], limit: float | None) -> list[str]:
    """Return the measures whose whole interval lies above the limit."""
    return [name for name, each in found.items() if limit is not None and each["interval"][0] > limit]


# -- measuring -------------------------------------------------------------------------------------


def unpack(revision: str | None, folder: Path) -> Path:
    """Put a revision's package into a folder of its own; without a revision that of the working tree."""
    if revision is None:
        shutil.copytree(ROOT / "mpisync", folder / "mpisync", ignore=shutil.ignore_patterns("__pycache__"))
    else:
        command = ["git", "-C", str(ROOT), "archive", "--format=zip", revision, "mpisync"]
        packed = subprocess.run(command, check=True, capture_output=True).stdout
        zipfile.ZipFile(io.BytesIO(packed)).extractall(folder)
    return folder


def run_once(name: str, copy: Path) -> dict[str, float]:
    """Run one measure with the package of one copy; its milliseconds, by name.

    Raises:
        RuntimeError: It failed, or took too long.
    """
    start = [] if RANKS[name] == 1 else ["-m", "mpisync", "run", "-n", str(RANKS[name])]
    path = os.pathsep.join([str(copy), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = {**os.environ, "PYTHONPATH": path, "NUMBA_CACHE_DIR": str(copy.parent / "kernels")}
    child = subprocess.Popen(
        [sys.executable, *start, str(SCRIPT), name], cwd=copy, env=environ, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        printed, errors = child.communicate(timeout=RUN_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{name} took more than {RUN_LIMIT_S:.0f} s with the package in {copy.name}") from None
    finally:
        end(child)
    if child.returncode:
        raise RuntimeError(f"{name} ended with {child.returncode} with the package in {copy.name}:\n{errors[-4000:]}")
    result = json.loads(printed.splitlines()[-1])
    if not Path(result["file"]).is_relative_to(copy):
        raise RuntimeError(f"{name} imported {result['file']} and not the package in {copy}")
    ms: dict[str, float] = result["ms"]
    return ms


def end(child: subprocess.Popen[str]) -> None:
    """End a run that goes on: politely first, so that a launcher ends its ranks."""
    if child.poll() is None:
        child.terminate()
        try:
            child.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()


def measure(asked: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Run all pairs; what is known of each measure."""
    before, after, same = (
        unpack(revision, folder / name)
        for name, revision in (("before", asked.before), ("after", asked.after), ("same", asked.before))
    )
    for copy in (before, after):  # kernels are compiled once, by one process
        run_once("fold", copy)
    found: dict[str, dict[str, Any]] = {}
    for name in asked.only:
        times_ms: dict[str, list[list[float]]] = defaultdict(lambda: [[], [], [], []])
        for pair in range(asked.pairs):
            for place, copies in ((0, (before, after)), (2, (before, same))):
                for which in (0, 1) if pair % 2 == 0 else (1, 0):
                    for measured, ms in run_once(name, copies[which]).items():
                        times_ms[measured][place + which].append(ms)
            print(f"\r{name}: {pair + 1} of {asked.pairs} pairs", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        for measured, (first, second, *identical) in times_ms.items():
            found[measured] = summarised(first, second, identical)
    return found


def rows(found: dict[str, dict[str, Any]]) -> list[list[object]]:
    """Lay out what is known, a row a measure."""

    def words(each: dict[str, Any]) -> list[object]:
        low, high = each["interval"]
        return [each["ratio"], f"{low:.3f} to {high:.3f}"]

    return [
        [name, each["before_ms"], each["after_ms"], *words(each), *words(each["identical"])]
        for name, each in found.items()
    ]


def main() -> int:
    """Compare, and judge where there is a limit."""
    asked = parser().parse_args()
    import mpi4py

    mpi4py.rc.initialize = False  # this process is no rank, it starts them
    from mpisync.commands.benching.measuring import machine, report, table, versions

    about = machine()
    try:
        with tempfile.TemporaryDirectory(prefix="mpisync-paired-") as folder:
            found = measure(asked, Path(folder))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(["", "before ms", "after ms", "ratio", "95 %", "identical", "95 %"], rows(found)))
    settings = {**vars(asked), "after": asked.after or WORKING_TREE}
    result = {"benchmark": "paired", "machine": about, "versions": versions(), "settings": settings}
    report({**result, "measures": found}, asked.out)
    for name in (over := slower(found, asked.limit)):
        low, _ = found[name]["interval"]
        print(f"{name} is slower: its ratio is at least {low:g}, and --limit is {asked.limit:g}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
