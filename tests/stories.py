"""Records for tests of reports: a short story whose every second is known, and runs in virtual time."""

from dataclasses import replace

from playing import cycling, play

from mpisync.policies import parse_policy
from mpisync.records import ArrivalRecord, RecordWriter, RunEnd, RunHeader, StepRecord

HEADER = RunHeader("backup:1", 2, 7, 1.5e9, "0.1.0", ["alpha", "beta"], {"weight": "equal", "ema": None})


def _came(worker, sequence, version, verdict, offset_s, data_s, compute_s, **more):
    times = {"data_s": data_s, "compute_s": compute_s}
    return ArrivalRecord(worker, sequence, version, verdict, offset_s, samples=8, bytes=1000, **times, **more)


# Worker 0 counts three times. Worker 1 is late, is late while the root is busy, and sends a NaN.
STORY = [
    StepRecord(
        0, 10.0, 11.0, 11.4, 1, 2, [(0, 0, 0)],
        [_came(0, 0, 0, "accepted", 1.0, 0.25, 0.5, loss=4.0)],
        samples_used=8, reduce_s=0.1, update_s=0.2, publish_s=0.1,
    ),
    StepRecord(
        1, 11.5, 12.5, 13.0, 1, 2, [(0, 1, 1)],
        [
            _came(1, 0, 0, "late", 0.5, 0.0, 2.0, late_by=1, loss=4.5),
            _came(0, 1, 1, "accepted", 1.0, 0.125, 0.75, loss=2.0),
        ],
        samples_used=8, reduce_s=0.25, update_s=0.125, publish_s=0.125,
    ),
    StepRecord(
        2, 13.0, 14.0, 14.5, 1, 2, [(0, 2, 2)],
        [
            _came(1, 1, 1, "late", -0.25, 0.0, 0.5, late_by=1),
            _came(1, 2, 2, "rejected", 0.5, 0.0, 0.5, reason="the gradient has NaN or Inf"),
            _came(0, 2, 2, "accepted", 1.0, 0.0, 0.5, loss=1.0),
        ],
        samples_used=8, reduce_s=0.25, update_s=0.125, publish_s=0.125, updated=False,
    ),
]  # fmt: skip

# Worker 0 has a batch in its hands still; worker 1 is late once more, and leaves with another.
END = RunEnd(
    version=3, failure="",
    arrivals=[_came(1, 3, 2, "late", 0.25, 0.0, 0.5, late_by=1)],
    handed=[32, 40], used=[24, 0], discarded=[0, 32], lost=[0, 8],
    requeued=[0, 0], peak_rss_bytes=[1_200_000_000, 900_000_000, 2_500_000_000],
)  # fmt: skip
# As `HEADER`, with what a session of today tells.
TOLD = replace(
    HEADER,
    command=["train.py", "--lr", "0.1", "--name", "two words"], steps=5,
    root_host="gamma", root_cores=8, root_threads=4, cores=12, transports=["shared memory", "messages"],
    parameters={"float32": 25_000_000, "bfloat16": 7}, parameters_bytes=100_000_014,
    optimizer="SGD(lr=0.1, momentum=0.9)", scheduler="StepLR",
    versions={"python": "3.11.7", "torch": "2.13.0", "mpi4py": "4.1.2", "MPI": "Open MPI v5.0.11"},
)  # fmt: skip


def write(path, steps=STORY, header=HEADER, end=None):
    """Write a record; return its path."""
    with RecordWriter(path) as writer:
        writer.header(header)
        for step in steps:
            writer.step(step)
        if end is not None:
            writer.end(end)
    return path


def played(policy, delays, steps):
    """Return the header and steps of a policy in virtual time, with what the player leaves out."""
    records = play(parse_policy(policy), cycling(delays), workers=len(delays), steps=steps)
    filled = []
    for record in records:
        arrivals = [
            replace(
                arrival,
                compute_s=delays[arrival.worker][arrival.sequence % len(delays[arrival.worker])],
                data_s=0.0, samples=4, bytes=64, loss=1 / (1 + arrival.version),
            )
            for arrival in record.arrivals
        ]  # fmt: skip
        filled.append(replace(record, arrivals=arrivals, samples_used=4 * len(record.accepted)))
    hosts = [f"node{worker // 2}" for worker in range(len(delays))]
    return replace(HEADER, policy=policy, workers=len(delays), hosts=hosts), filled
