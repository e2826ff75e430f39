"""Records that an earlier version made are replayed to the bits that it had."""

import zlib

import numpy as np
import pytest
from launch import ROOT

from mpisync import PartialReduce, Replay
from mpisync.records import RunHeader
from mpisync.records.schema import recorded_late_work

# CRC-32 of the final parameters where they were recorded, by mpisync 0.1.0 before its rooms were split. NumPy's sums
# and products are those of IEEE 754, so they are the same on every machine.
FINAL = {"backup": 3834830332, "async": 2310591424}


@pytest.mark.parallel(4)
@pytest.mark.parametrize("name", FINAL)
def test_the_arrays_have_the_recorded_bits(comm, name):
    theta = np.zeros(101, np.float32)
    with PartialReduce(comm, like=theta, policy=Replay(str(ROOT / f"tests/data/{name}-0.1.0.jsonl"))) as reduction:
        if reduction.is_root:
            for step in reduction.serve():
                theta -= np.float32(0.1) * step.mean
                step.publish(theta)
        else:
            sequence = 0
            while reduction.pull(theta):
                noise = np.random.default_rng((comm.rank, sequence)).standard_normal(101)
                reduction.push((noise * 0.1 + theta).astype(np.float32))
                sequence += 1
    assert zlib.crc32(theta.tobytes()) == FINAL[name]


def test_what_became_of_late_work_is_read_as_it_was_written_then():
    def header(**settings):
        return RunHeader("backup:1", 2, 0, 0.0, "0.1.0", ["a", "b"], settings=settings)

    assert recorded_late_work(header()) == ("discard", None)
    assert recorded_late_work(header(on_late="retry", late_limit=5)) == ("retry", 5)
    assert recorded_late_work(header(on_late="discard", late_limit=3)) == ("discard", None)
    assert recorded_late_work(header(on_late="carry:max_staleness=2")) == ("carry", 2)
