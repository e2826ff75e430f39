"""Train a small CNN on real digits while one worker straggles, without backup workers and with.

  mpisync demo                       four workers; worker 0 sleeps 0.2 s at every batch
  mpisync demo --policy deadline:0.05,at_least=2 --delay 0.5
  mpisync demo --task text --delay 0     long batches take long: who is late is no matter of machines

Both runs are the script mpisync/commands/digits.py, or task.py for another task, started by `mpisync run`.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from mpisync.policies import parse_policy
from mpisync.records import RunHeader, StepRecord, read_record
from mpisync.tasks.table import TASKS, make_task

NAME = "demo"
SCRIPT = Path(__file__).with_name("digits.py")
TASK_SCRIPT = Path(__file__).with_name("task.py")
_BASELINE = "backup:0"  # full synchronous SGD


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run has to show."""

    header: RunHeader
    steps: list[StepRecord]
    metric: str
    value: float

    @property
    def quality(self) -> str:
        """The final metric in words."""
        digits = ".1%" if self.metric == "test accuracy" else ".3f"
        return f"{self.metric} {self.value:{digits}}"

    @property
    def took_s(self) -> float:
        """From the first step's opening to the last one's publication."""
        return self.steps[-1].published_s - self.steps[0].opened_s

    @property
    def samples(self) -> int:
        """How many samples went into updates."""
        return sum(step.samples_used for step in self.steps)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mpisync demo`."""
    parser.add_argument(
        "--policy", default="backup:1", help="the policy to show (default %(default)s)"
    )
    parser.add_argument(
        "--delay", type=float, default=0.2, metavar="SECONDS",
        help="how long worker 0 sleeps at every batch (default %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=100, help="updates (default %(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="workers (default %(default)s)")
    parser.add_argument("--task", choices=TASKS, help="what to train instead of the script digits.py")
    parser.add_argument("--data", metavar="FOLDER", help="where the files of mnist and cifar10 are")
    parser.add_argument(
        "--on-late", choices=("discard", "retry", "carry", "requeue"), default="discard",
        help="what becomes of late gradients' samples, with --task (default %(default)s)",
    )


def main(options: argparse.Namespace) -> int:
    """Run the script twice and compare."""
    _check(options)
    with tempfile.TemporaryDirectory(prefix="mpisync-demo-") as folder:
        plain = _run(_BASELINE, options, os.path.join(folder, "plain.jsonl"))
        shown = _run(options.policy, options, os.path.join(folder, "shown.jsonl"))
    times = plain.took_s / shown.took_s
    pace = f"{times:.1f} times faster" if times >= 1 else f"{1 / times:.1f} times slower"
    print(
        f"\n{shown.header.policy} is {pace} than full synchronous: {shown.took_s:.1f} s against "
        f"{plain.took_s:.1f} s for {len(shown.steps)} steps; {shown.quality} against "
        f"{plain.quality.removeprefix(plain.metric).strip()}"
    )
    return 0


def _check(options: argparse.Namespace) -> None:
    lacking = [name for name in ("torch", "sklearn") if importlib.util.find_spec(name) is None]
    if lacking:
        raise RuntimeError(
            f"the demo needs {' and '.join(lacking)}: pip install torch scikit-learn, or use `make demo`"
        )
    if options.workers < 2:
        raise ValueError(f"the demo needs at least 2 workers, not {options.workers}")
    if options.steps < 1:
        raise ValueError(f"the number of steps must be at least 1, not {options.steps}")
    if options.task is None and (options.data or options.on_late != "discard"):
        raise ValueError("--data and --on-late belong to a task: name one by --task")
    if not 0 <= options.delay < 60:
        raise ValueError(f"the delay must be from 0 to 60 seconds, not {options.delay}")
    parse_policy(options.policy).check(options.workers)
    if options.task is not None:
        make_task(options.task, options.data)  # what is wrong with its files is said once, here


def _run(policy: str, options: argparse.Namespace, record: str) -> Outcome:
    """Run the script under a policy, print what came of it and return that."""
    script = [str(SCRIPT)]
    if options.task is not None:
        script = [str(TASK_SCRIPT), options.task, "--on-late", options.on_late]
        script += ["--data", options.data] if options.data else []
    command = [
        sys.executable, "-m", "mpisync", "run", "-n", str(options.workers + 1),
        "--policy", policy, *script,
        "--steps", str(options.steps), "--delay", str(options.delay), "--record", record,
    ]  # fmt: skip
    name = "full synchronous (backup:0)" if policy == _BASELINE else policy
    print(
        f"\n=== {name}: {options.workers} workers, worker 0 sleeps {options.delay:g} s a batch",
        flush=True,
    )
    printed = _echoed(command)
    found = re.search(r"^([a-z ]+): ([\d.]+)$", printed, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"the script printed no metric such as `test accuracy: 0.97`: {script[0]}")
    header, steps = read_record(record, strict=True)
    outcome = Outcome(header, steps, found[1], float(found[2]))
    print("\n".join(_table(outcome)), flush=True)
    return outcome


def _echoed(command: Sequence[str]) -> str:
    """Run a command, showing its output as it comes; return that output.

    Raises:
        RuntimeError: It failed; what it said is on the terminal.
    """
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
    if process.returncode:
        raise RuntimeError(f"the run ended with exit code {process.returncode}")
    return "".join(lines)


def _table(outcome: Outcome) -> list[str]:
    """Return the lines that sum a run up: the whole, then each worker."""
    arrivals = [arrival for step in outcome.steps for arrival in step.arrivals]
    discarded = sum(arrival.verdict != "accepted" for arrival in arrivals)
    lines = [
        f"{len(outcome.steps)} steps in {outcome.took_s:.1f} s, "
        f"{outcome.samples / outcome.took_s:,.0f} samples/s, "
        f"{outcome.quality}, {discarded} gradients discarded",
        "worker  accepted  late  rejected  median compute  host",
    ]
    for worker, host in enumerate(outcome.header.hosts):
        own = [arrival for arrival in arrivals if arrival.worker == worker]
        verdicts = [arrival.verdict for arrival in own]
        spent_s = [arrival.compute_s for arrival in own if arrival.compute_s is not None]
        spent = f"{median(spent_s) * 1e3:.1f} ms" if spent_s else "none"
        lines.append(
            f"{worker:6}  {verdicts.count('accepted'):8}  {verdicts.count('late'):4}  "
            f"{verdicts.count('rejected'):8}  {spent:>14}  {host}"
        )
    return lines
