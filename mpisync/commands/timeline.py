"""Write the timeline of a run for https://ui.perfetto.dev or chrome://tracing: a row a rank.

  mpisync timeline run.jsonl --out trace.json
  mpisync timeline run.jsonl --out trace.json --steps 100:200

A RUN is what Session(record=...) wrote, or a directory with a record.jsonl. The viewers open the file on
your own machine; nothing is sent anywhere.
"""

import argparse
import os
import sys

NAME = "timeline"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mpisync timeline`."""
    parser.add_argument("run", metavar="RUN", help="the record of a run")
    parser.add_argument(
        "--out", required=True, metavar="FILE.json", help="the file to write; one that exists is replaced"
    )
    parser.add_argument(
        "--steps", metavar="FIRST:END", help="show these steps, END not among them (default: the last that fit)"
    )


def main(options: argparse.Namespace) -> int:
    """Read the record and write the trace."""
    from mpisync.reports import check_target, read_run, steps_that_fit, write_trace

    run = read_run(options.run)
    for notice in run.notices:
        print(f"mpisync timeline: {notice}", file=sys.stderr)
    if not len(run):
        return 1
    steps = _chosen(options.steps, run.first, len(run)) if options.steps else steps_that_fit(run)
    check_target(options.out, [run])
    with open(options.out, "w", encoding="ascii") as file:
        events = write_trace(run, steps, file)
    size = f"{os.path.getsize(options.out) / 1e6:,.1f} MB"
    print(f"{options.out}: steps {steps.start} to {steps.stop - 1} of {len(run):,}, {events:,} events, {size}")
    return 0


def _chosen(text: str, first: int, steps: int) -> range:
    begin, colon, end = text.partition(":")
    try:
        chosen = range(int(begin or first), int(end or first + steps))
    except ValueError:
        colon = ""
    if not colon or not first <= chosen.start < chosen.stop <= first + steps:
        raise ValueError(
            f"--steps must be FIRST:END within {first}:{first + steps}, the steps of this run, not {text!r}"
        )
    return chosen
