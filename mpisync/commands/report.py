"""Write a report of one run, or of several side by side: one HTML file that needs nothing else.

  mpisync report run.jsonl --out report.html
  mpisync report sync.jsonl backup.jsonl --out both.html

A RUN is what Session(record=...) wrote, or a directory with a record.jsonl. It may still be going on.
"""

import argparse
import sys
from pathlib import Path

NAME = "report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mpisync report`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the record of a run")
    parser.add_argument(
        "--out", required=True, metavar="FILE.html", help="the file to write; one that exists is replaced"
    )


def main(options: argparse.Namespace) -> int:
    """Read the records and write the page; one that cannot be read is named there, and exits with 1."""
    from mpisync.reports import check_target, page, read_run

    runs, problems = [], []
    for path in options.runs:
        try:
            runs.append(read_run(path))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if not runs:
        raise ValueError("; ".join(problems))
    for text in [*problems, *(notice for run in runs for notice in run.notices)]:
        print(f"mpisync report: {text}", file=sys.stderr)
    check_target(options.out, runs)
    written = page(runs, problems).encode()
    Path(options.out).write_bytes(written)
    print(f"{options.out}: {len(written) / 1e3:,.0f} kB")
    return 1 if problems else 0
