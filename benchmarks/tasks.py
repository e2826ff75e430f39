"""Training tasks under several policies and seeds: time and versions to a target, and what varies from run to run.

    python benchmarks/tasks.py                              digits, a spike of 30 ms at one batch in ten of any worker
    python benchmarks/tasks.py --task text --spike 0        slowness that belongs to the sample
    python benchmarks/tasks.py --task hyperplane --seeds 5

Every run is mpisync/commands/task.py under `mpisync run`; its worker 0 evaluates once in --every versions, while the
others train. Time counts from its first batch to the first evaluation that reaches the target. A case is a policy,
with what becomes of late work behind a slash. The last line is JSON.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mpisync.commands.benching.measuring import machine, report, table, versions
from mpisync.records import read_record
from mpisync.tasks.table import TASKS, make_task

CASES = ("backup:0", "backup:1", "backup:1/retry", "backup:1/carry", "backup:1/requeue", "deadline:0.015", "async:k=3")
SCRIPT = Path(__file__).parent.parent / "mpisync" / "commands" / "task.py"
LIMIT_S = 300.0


def options() -> argparse.Namespace:
    """Read the command line."""
    about, more = str(__doc__).split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, default="digits-cnn")
    parser.add_argument("--data", help="the folder of the files of mnist and cifar10")
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="POLICY[/ON_LATE]")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each case")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--steps", type=int, help="updates; the task's own number unless given")
    parser.add_argument("--every", type=int, default=10, help="versions from one evaluation to the next")
    parser.add_argument("--spike", type=float, default=0.03, help="seconds")
    parser.add_argument("--out", help="append the JSON line to this file")
    return parser.parse_args()


def play(asked: argparse.Namespace, case: str, seed: int, record: Path) -> dict[str, float | None]:
    """Run a case once; what came of it."""
    policy, _, on_late = case.partition("/")
    command = [
        sys.executable, "-m", "mpisync", "run", "-n", str(asked.workers + 1), "--policy", policy,
        str(SCRIPT), asked.task, "--on-late", on_late or "discard", "--seed", str(seed), "--every", str(asked.every),
        "--spike", str(asked.spike), "--record", str(record), *(["--data", asked.data] if asked.data else []),
        *(["--steps", str(asked.steps)] if asked.steps else []),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {run.returncode}:\n{run.stderr[-2000:]}")
    task, (_, steps) = make_task(asked.task, asked.data), read_record(record)
    found = re.findall(r"^version (\d+) after ([\d.]+) s: (-?[\d.]+)$", run.stdout, re.MULTILINE)
    sign = 1 if task.higher_is_better else -1
    reached = [(int(v), float(s)) for v, s, value in found if sign * float(value) >= sign * task.target]
    final = re.search(rf"^{task.metric}: ([\d.]+)$", run.stdout, re.MULTILINE)
    assert final is not None
    arrivals = [arrival for step in steps for arrival in step.arrivals]
    return {
        "final": float(final[1]),
        "versions_to_target": reached[0][0] if reached else None,
        "s_to_target": reached[0][1] if reached else None,
        "s": steps[-1].published_s - steps[0].opened_s,
        "late": sum(arrival.verdict == "late" for arrival in arrivals) / max(len(arrivals), 1),
    }


def spread(values: list[float | None]) -> str:
    """Mean and standard deviation over the runs, of those that have a value."""
    known = [value for value in values if value is not None]
    if not known:
        return "never"
    share = "" if len(known) == len(values) else f" ({len(known)} of {len(values)})"
    deviation = f" ± {statistics.stdev(known):.2g}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.4g}{deviation}{share}"


def main() -> None:
    """Play every case with every seed, in turns, and compare."""
    asked = options()
    task, about = make_task(asked.task, asked.data), machine()
    found: dict[str, list[dict[str, float | None]]] = {case: [] for case in asked.cases}
    with tempfile.TemporaryDirectory(prefix="mpisync-tasks-") as folder:
        for seed in range(asked.seeds):
            for number, case in enumerate(asked.cases):
                outcome = play(asked, case, seed, Path(folder) / f"{seed}-{number}.jsonl")
                found[case].append(outcome)
                print(f"{case}, seed {seed}: {task.metric} {outcome['final']:.4f}, {outcome['s']:.2f} s", flush=True)
    columns = ("final", "versions_to_target", "s_to_target", "s", "late")
    heads = ["", task.metric, f"versions to {task.target}", f"s to {task.target}", "s in all", "share late"]
    rows = [[case, *(spread([run[name] for run in runs]) for name in columns)] for case, runs in found.items()]
    print(table(heads, rows))
    result: dict[str, Any] = {"benchmark": "tasks", "machine": about, "versions": versions(), "settings": vars(asked)}
    report({**result, "metric": task.metric, "target": task.target, "runs": found}, asked.out)


if __name__ == "__main__":
    main()
