"""Try on a machine with a card what only a card can show: its kernels' bits, CUDA IPC, sessions, and their times.

    python3 benchmarks/gpu.py                    all, in order of value, in 4 minutes at most
    python3 benchmarks/gpu.py checks             what must be right
    python3 benchmarks/gpu.py measures           what takes how long
    python3 benchmarks/gpu.py --only ipc,kills   some steps

Each step is a process of its own with a time limit; one that fails or hangs stops none of the others, and what it had
found until then is kept. A line of JSON a step, a table last. It ends with 0 where every check was made and was right,
with 1 where one failed or could not be made, with 2 where there is no card. Sessions want an mpirun, on PATH or beside
this Python. `--stand-in` tries this script itself where there is no card, on small arrays of the host's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

MARK = "FOUND "
_LEAST_S = 5.0  # what a step needs to come to anything


@dataclass(frozen=True)
class Step:
    """Something to try.

    Attributes:
        place: Its module and function.
        limit_s: How long it may take.
        ranks: How many mpirun starts; 0 for a process without MPI.
        is_check: Whether it can be wrong; else only slow.
    """

    place: str
    limit_s: float
    ranks: int = 0
    is_check: bool = True


STEPS = {
    "facts": Step("facts:facts", 40),
    "bits": Step("arithmetic:bits", 80),
    "sgd": Step("arithmetic:sgd", 40),
    "fold": Step("arithmetic:fold_speed", 30, is_check=False),
    "ipc": Step("sharing:ipc", 50),
    "kills": Step("sharing:kills", 60),
    "latency": Step("sharing:latency", 50, is_check=False),
    "pinned": Step("sharing:pinned", 40, is_check=False),
    "equal": Step("training:equal", 60, ranks=3),
    "steps": Step("training:step_times", 70, ranks=5, is_check=False),
    "optimizers": Step("training:optimizers", 40, ranks=3),
    "death": Step("training:death", 80),
    "mps": Step("sharing:mps", 50, is_check=False),
}
HIDDEN = {"dies": "training:dies"}  # what a step starts
FOR_TESTS = {  # of this script
    "wrong": Step("trial:wrong", 20), "hanging": Step("trial:hanging", 10), "killed": Step("trial:killed", 20),
    "skipped": Step("trial:skipped", 20), "right": Step("trial:right", 20),
}  # fmt: skip


@dataclass
class Outcome:
    """What became of a step."""

    name: str
    outcome: str  # ok, failed, skipped
    seconds: float
    reason: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


def options() -> argparse.Namespace:
    """Read the command line."""
    about, more = str(__doc__).split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", nargs="?", choices=["all", "checks", "measures"], default="all")
    parser.add_argument("--only", help="the names of some steps, with commas")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for all of them; later ones are skipped")
    parser.add_argument("--out", help="a JSON file for all results; it keeps those of steps not tried now")
    parser.add_argument("--stand-in", action="store_true", help="try this script on a stand-in for a card")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_step(name: str, *, stand_in: bool) -> None:
    """Be a step: find figures, or end with an error."""
    place = HIDDEN.get(name) or {**STEPS, **FOR_TESTS}[name].place
    module, function = place.split(":")
    from on_card.card import Card, SkipStep

    try:
        action = getattr(importlib.import_module(f"on_card.{module}"), function)
        if module in ("facts", "trial"):
            action(stand_in)
        else:
            action(Card(stand_in=stand_in))
    except SkipStep as why:
        print(MARK + json.dumps({"skipped": str(why)}), flush=True)
    except Exception as error:
        print(MARK + json.dumps({"failed": f"{type(error).__name__}: {error}"}), flush=True)
        raise


def tried(name: str, step: Step, limit_s: float, *, stand_in: bool) -> Outcome:
    """Start a step and wait for its end, or for the limit."""
    words = [str(Path(__file__).resolve()), "--step", name, *(["--stand-in"] if stand_in else [])]
    command, began_s = [sys.executable, "-u", *words], time.monotonic()
    if step.ranks:
        from on_card import starting

        if isinstance(command := starting.command(step.ranks, words), str):
            return Outcome(name, "skipped", 0.0, command)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(":")}
    environ |= {"OMP_NUM_THREADS": "1"} if step.ranks else {}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environ, cwd=ROOT, start_new_session=True
        )
        try:
            process.wait(limit_s)
            hangs = False
        except subprocess.TimeoutExpired:
            hangs = True
        finally:  # whatever it has started
            _end(process)
        took_s = time.monotonic() - began_s
        for file in (out, err):
            file.seek(0)
        figures: dict[str, Any] = {}
        for line in out:
            if line.startswith(MARK):
                figures |= json.loads(line.removeprefix(MARK))
        said = [line.rstrip() for line in err if line.strip()]
    skipped, failed = figures.pop("skipped", ""), figures.pop("failed", "")
    if hangs:
        last = next(reversed(figures), "nothing")
        return Outcome(name, "failed", took_s, f"not done after {limit_s:.0f} s; the last it found: {last}", figures)
    if failed or process.returncode:
        why = failed or f"it ended with {process.returncode}: {' | '.join(said[-4:])}"
        return Outcome(name, "failed", took_s, why, figures)
    return Outcome(name, "skipped" if skipped else "ok", took_s, skipped, figures)


def _end(process: subprocess.Popen[Any]) -> None:
    """End a step's processes: a group, whose ranks mpirun ends where it still can."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(3.0)
        except subprocess.TimeoutExpired:
            continue


def table(outcomes: list[Outcome]) -> str:
    """Lay out what became of each step, its reason or the figures that fit."""
    rows = [("step", "", "seconds", "")]
    for one in outcomes:
        text = one.reason or ", ".join(f"{name}={value}" for name, value in one.figures.items())
        rows.append((one.name, one.outcome, f"{one.seconds:.1f}", text.replace("\n", " ")[:140]))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        f"{name:<{widths[0]}}  {outcome:<{widths[1]}}  {took:>{widths[2]}}  {text}".rstrip()
        for name, outcome, took, text in rows
    ]
    return "\n".join(lines)


def keep(path: Path, outcomes: list[Outcome], *, stand_in: bool) -> None:
    """Write what was found to a file; of a run before, it keeps the steps that were not tried now."""
    before = json.loads(path.read_text())["steps"] if path.exists() else []
    names, now = {one.name for one in outcomes}, [vars(one) for one in outcomes[1:]]
    steps = [*(one for one in before if one["name"] not in names), *now]
    result = {"benchmark": "gpu", "stand_in": stand_in, "machine": outcomes[0].figures, "steps": steps}
    path.write_text(json.dumps(result, indent=1) + "\n")


def chosen(asked: argparse.Namespace) -> dict[str, Step]:
    """Return the steps that are asked for, the facts first."""
    if asked.only:
        known = {**STEPS, **FOR_TESTS}
        if unknown := [name for name in asked.only.split(",") if name not in known]:
            raise SystemExit(f"there is no step {unknown[0]!r}: {', '.join(STEPS)}")
        return {"facts": STEPS["facts"], **{name: known[name] for name in asked.only.split(",")}}
    kinds = {"all": (True, False), "checks": (True,), "measures": (False,)}[asked.which]
    return {name: step for name, step in STEPS.items() if name == "facts" or step.is_check in kinds}


def main() -> int:
    """Try the steps, one after the other."""
    asked = options()
    if asked.step:
        run_step(asked.step, stand_in=asked.stand_in)
        return 0
    began_s, outcomes = time.monotonic(), []
    steps = chosen(asked)
    for name, step in steps.items():
        left_s = asked.limit - (time.monotonic() - began_s)
        if left_s < _LEAST_S and outcomes:
            outcome = Outcome(name, "skipped", 0.0, f"no time was left of {asked.limit:.0f} s")
        else:
            outcome = tried(name, step, min(step.limit_s, left_s), stand_in=asked.stand_in)
        if name == "facts" and not outcome.figures.get("card"):
            print(f"no card here: nothing was tried ({outcome.reason or outcome.figures.get('why')})")
            return 2
        outcomes.append(outcome)
        print(json.dumps(vars(outcome)), flush=True)
        if asked.out:  # at once: a machine that is lent may be taken back
            keep(Path(asked.out), outcomes, stand_in=asked.stand_in)
    print(table(outcomes))
    missing = [one.name for one in outcomes if one.outcome == "failed" or steps[one.name].is_check and one.reason]
    print(f"not right, or not tried: {', '.join(missing)}" if missing else "every check was made, and is right")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
