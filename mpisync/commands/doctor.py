"""Look whether this machine, or the ranks of this job, are fit for mpisync: one line a finding.

  mpisync doctor                               this machine, with a trial start of two ranks
  mpirun -n 4 python -m mpisync doctor         this job: what its ranks see (srun alike)
  mpisync doctor --model-mb 400                will a model of 100 million float32 parameters fit?

Nothing is changed, and nothing sent anywhere. Exit code 0: nothing must be done; 1: see the lines with FIX.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpisync.commands.checkup.probes import Case, Finding

NAME = "doctor"
_WIDEST = 120  # columns; longer lines are hard to read
_MARKS = {"ok": "ok", "note": "note", "fix": "FIX"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mpisync doctor`."""
    parser.add_argument(
        "--model-mb", type=float, metavar="MB", help="the size of your parameters: 4 MB a million of float32"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document: findings, and what was seen")


def main(options: argparse.Namespace) -> int:
    """Look, judge and print; of a job only one rank prints."""
    from mpisync.commands.checkup.examine import examine
    from mpisync.commands.checkup.probes import Case
    from mpisync.commands.checkup.probing import probe

    if options.model_mb is not None and not 0 < options.model_mb < math.inf:
        raise ValueError(f"--model-mb must be greater than 0, not {options.model_mb:g}")
    ranks = probe()
    if not ranks:  # rank 0 speaks for all
        return 0
    case = Case(tuple(ranks), options.model_mb)
    findings = examine(case)
    if options.json:
        print(json.dumps(as_document(case, findings), allow_nan=False))
    else:
        print("\n".join(as_lines(findings, shutil.get_terminal_size().columns if sys.stdout.isatty() else None)))
    return int(any(finding.must for finding in findings))


def as_document(case: Case, findings: list[Finding]) -> dict[str, object]:
    """Return what --json prints."""
    return {
        "findings": [
            {"subject": one.subject, "level": one.level, "says": one.says, "do": one.do} for one in findings
        ],
        "ranks": [probe.to_json() for probe in case.ranks],
    }


def as_lines(findings: list[Finding], columns: int | None) -> list[str]:
    """Return the findings as text, wrapped where there is a terminal of so many columns."""
    width = max(len(finding.subject) for finding in findings)
    lines = []
    for finding in findings:
        head = f"{_MARKS[finding.level]:<4}  {finding.subject:<{width}}  "
        text = finding.says + (f" -> {finding.do}" if finding.do else "")
        if columns is None:
            lines.append(head + text)
        else:
            lines += textwrap.wrap(
                head + text, max(min(columns, _WIDEST), len(head) + 20), subsequent_indent=" " * len(head),
                break_long_words=False, break_on_hyphens=False, drop_whitespace=True,
            )  # fmt: skip
    must = sum(finding.must for finding in findings)
    return [*lines, f"{must} to fix" if must else "nothing must be done"]
