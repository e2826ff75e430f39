"""What a run of jobs/train.py must have printed and recorded, whoever started it."""

import re
from pathlib import Path

from mpisync.records import read_record

# Twenty runs of one process (seeds 0 to 9, batches of 32 and 64) get 0.911 to 0.931 of the 360 test
# images right, with a standard deviation of 0.006: this is six of those below their mean.
GOOD = 0.88


def check(output: str, run: Path, *, policy: str, workers: int) -> None:
    """Check that a run of 400 steps trained to the end, and well, and that its files are whole."""
    (accuracy,) = re.findall(r"^final parameters: test accuracy (\S+)$", output, re.M)
    assert float(accuracy) > GOOD, output
    header, steps = read_record(run / "record.jsonl")
    assert (header.policy, header.workers, len(steps)) == (policy, workers, 400)
    needed = workers - int(policy.removeprefix("backup:"))
    assert {len({worker for worker, *_ in step.accepted}) for step in steps} == {needed}
    assert (run / "average.pt").stat().st_size > 0
