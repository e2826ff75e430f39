"""Measured times: what a table or a record says, torn, gapped or wrong as it may be."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from playing import cycling, play

from mpisync.planning.observed import observe, read_times
from mpisync.planning.rollout import deadline_step_times
from mpisync.planning.runs import times_of_run
from mpisync.planning.scale import backup_step_times
from mpisync.policies import Async, BackupWorkers, Deadline
from mpisync.records import ArrivalRecord, RecordWriter, RunHeader, StepRecord


def table(tmp_path, text):
    path = tmp_path / "times.csv"
    path.write_text(text)
    return str(path)


def record(tmp_path, steps, *, workers=3, policy="backup:1", name="run.jsonl"):
    path = tmp_path / name
    with RecordWriter(path) as writer:
        writer.header(RunHeader(policy, workers, 0, 0.0, "1", [f"node{w}" for w in range(workers)]))
        for step in steps:
            writer.step(step)
    return str(path)


def timed(steps, delay, *, data=0.0, latency=0.0, publish=0.0, samples=0):
    """Add to played records what workers and root would have measured."""
    def arrival(one):
        spent = delay(one.worker, one.sequence)
        return replace(one, compute_s=spent - data, data_s=data, samples=samples, offset_s=one.offset_s + latency)

    return [
        replace(step, published_s=step.closed_s + publish, arrivals=[arrival(one) for one in step.arrivals])
        for step in steps
    ]


def run(delay, *, workers=3, steps=20, policy=None, **measured):
    played = play(BackupWorkers(1) if policy is None else policy, delay, workers=workers, steps=steps)
    return timed(played, delay, **measured)


# Tables.


@pytest.mark.parametrize(
    "text",
    [
        "1,2\n3,4\n",
        "1;2\n3;4",
        "1\t2\n3\t4\n",
        "  1  2\n 3 4 \n\n",
        "# seconds\n1,2 # first\n3,4\n",
        "rank0,rank1\n1,2\n3,4\n",
        "step,rank0,rank1\n0,1,2\n1,3,4\n",
        '"step","a","b"\r\n0,1.0,2e0\r\n1,3,4\r\n',
    ],
)
def test_tables_in_the_forms_that_people_have(tmp_path, text):
    observed = read_times(table(tmp_path, text))
    assert observed.times_s.tolist() == [[1, 2], [3, 4]]
    assert len(observed.notes) == 1 and observed.notes[0].startswith("read as a line a step, a column a worker: ")
    assert observed.measured.all() and observed.workers == [0, 1]


@pytest.mark.parametrize("end", ["3,", "3", "3,4.5.", "3,x"])
def test_a_torn_last_line_is_left_out_and_said(tmp_path, end):
    observed = read_times(table(tmp_path, "1,2\n3,4\n" + end))
    if end == "3,":  # as a gap is written: it cannot be told from one
        assert observed.times_s[:2].tolist() == [[1, 2], [3, 4]]
    else:
        assert observed.times_s.tolist() == [[1, 2], [3, 4]]
        assert observed.notes[1:] == ["line 3 is torn and was left out"]


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("# nothing\n", "holds no step"),
        ("a,b\n", "holds no step"),
        ("1,2\n3\n4,5\n", "line 2: every line must have 2 fields, as most do, but this has 1"),
        ("1,2\n3,fast\n4,5\n", "line 2: a time must be a number of seconds, or empty, not 'fast'"),
        ("step\n1\n", "no worker's times"),
        (",\n,\n", "no time can be used"),
        ("0,0\n0,nan\n", "no time can be used"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        read_times(table(tmp_path, text))


def test_zeros_negative_times_and_gaps_are_filled_and_said():
    nan = np.nan
    times = [*[[1, 2, 3]] * 6, [0, 2, 3], [-1, 2, 3], [1, nan, nan], [1, 2, np.inf]]
    observed = observe(np.array(times))
    assert observed.times_s.tolist() == [[1, 2, 3]] * 10  # each from its own worker's times
    assert (~observed.measured).sum() == 5
    assert observed.notes == [
        "1 time is zero, and a gradient takes longer than that: treated as missing",
        "1 time is negative, and a gradient takes longer than that: treated as missing",
        "3 of 30 times are missing (not a number): they were drawn from the same worker's other times",
    ]


def test_workers_and_steps_without_times_are_left_out_and_said(tmp_path):
    text = "1,,3\n" * 3 + ",,\n" + "1,,3\n" * 3
    observed = read_times(table(tmp_path, text))
    assert observed.times_s.shape == (6, 2) and observed.workers == [0, 2]
    assert "no time of worker 1 can be used: the plan is for the other 2" in observed.notes
    assert "1 step is left out, for lack of any time" in observed.notes


def test_a_worker_with_too_few_times_is_filled_from_all():
    times = np.ones((20, 3)) * [1.0, 1.0, 5.0]
    times[1:, 2] = np.nan
    filled = observe(times).times_s[:, 2]
    assert filled[0] == 5 and (filled[1:] <= 5).all() and (filled == 1).any()


def test_filling_keeps_a_workers_law():
    rng = np.random.default_rng(1)
    times = rng.lognormal(0, 0.5, (2000, 2)) * [1.0, 3.0]
    whole = times.copy()
    times[rng.random(times.shape) < 0.4] = np.nan
    filled, wanted = (np.quantile(x, [0.1, 0.5, 0.9], axis=0) for x in (observe(times).times_s, whole))
    assert filled == pytest.approx(wanted, rel=0.1)


def test_warm_up_is_left_out_and_said_but_not_mistaken():
    times = np.full((100, 4), 1.0)
    times[:2] = 7.0
    observed = observe(times)
    assert len(observed.times_s) == 98
    assert observed.notes == [
        "at the start 2 steps are left out as warm-up (everyone took 7 s or more, the median is 1 s)"
    ]
    times[0, 2] = 1.0  # one was as fast as ever
    assert len(observe(times).times_s) == 100
    times[0, 2] = 7.0
    times[1] = 1.0
    times[2] = 7.0  # slow, but not at the start
    assert len(observe(times).times_s) == 99
    assert len(observe(times[:5]).times_s) == 5  # too few to leave any out


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,)])
def test_arrays_that_are_no_table_are_refused(shape):
    with pytest.raises(ValueError, match="steps × workers"):
        observe(np.ones(shape))


# Records.


def test_late_gradients_count_at_the_version_they_were_computed_at(tmp_path):
    # Worker 2 needs 2.5 s where the others need 1 and 1.2 s: it computes at versions 0, 2 (or so), ...
    delay = cycling([[1.0], [1.2], [2.5]])
    steps = run(delay, steps=30)
    found = times_of_run(record(tmp_path, steps))
    for step in steps:
        for one in step.arrivals:
            assert found.times_s[one.version, one.worker] == delay(one.worker, one.sequence)
    assert np.isnan(found.times_s[:, 2]).sum() > 10 and not np.isnan(found.times_s[:29, :2]).any()
    observed = read_times(record(tmp_path, steps, name="again.jsonl"))
    assert observed.times_s.tolist() == [[1.0, 1.2, 2.5]] * len(observed.times_s)
    assert any("busy with an older gradient" in note for note in observed.notes)
    assert observed.hosts == ["node0", "node1", "node2"] and observed.policy == "backup:1"


def played_and_rolled(tmp_path, policy, roll, seed):
    """The seconds of steps as the policy itself is played, and as they are computed from its record."""
    table = np.random.default_rng(seed).lognormal(0, 0.8, (5, 400))
    steps = run(lambda worker, sequence: float(table[worker, sequence]), workers=5, steps=60, policy=policy)
    times = times_of_run(record(tmp_path, steps, workers=5, name=f"{seed}.jsonl")).times_s
    # A worker that computed nothing at a version was busy: how long it would have taken does not matter.
    # What it was computing at the end is not in the record, so the last steps are left out.
    known = int(np.isfinite(times).cumsum(axis=0).argmax(axis=0).min())
    whole = np.where(np.isfinite(times), times, 1e6)[:known]
    return [step.closed_s - step.opened_s for step in steps][:known], roll(whole)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("backup", [0, 1, 3])
def test_steps_computed_from_times_are_those_of_the_policy_itself(tmp_path, backup, seed):
    policy = BackupWorkers(backup)
    played, rolled = played_and_rolled(tmp_path, policy, lambda x: backup_step_times(x, backup), seed)
    assert len(played) > 20 and rolled == pytest.approx(played)


@pytest.mark.parametrize("seed", range(4))
def test_deadlines_computed_from_times_are_those_of_the_policy_itself(tmp_path, seed):
    played, rolled = played_and_rolled(
        tmp_path, Deadline(1.0, at_least=2), lambda x: deadline_step_times(x, 1.0, 2)[0], seed
    )
    assert len(played) > 20 and rolled == pytest.approx(played)


def test_a_record_has_no_columns_to_name(tmp_path):
    path = record(tmp_path, run(cycling([[1.0], [1.2], [1.4]])))
    with pytest.raises(ValueError, match="--step, --worker and --seconds name columns of a table, but .* is a run's"):
        read_times(path, worker="host")


def test_times_beyond_n_are_not_censored(tmp_path):
    rng = np.random.default_rng(2)
    drawn = rng.lognormal(0, 0.3, (4, 400))
    steps = run(lambda worker, sequence: float(drawn[worker, sequence]), workers=4, steps=300, policy=BackupWorkers(2))
    observed = read_times(record(tmp_path, steps, workers=4))
    mean = np.log(observed.times_s)[observed.measured].mean()
    assert abs(mean) < 4 * 0.3 / math.sqrt(observed.measured.sum())  # the law's, though half are discarded


def test_overhead_is_what_a_step_takes_beyond_its_computation(tmp_path):
    steps = run(cycling([[1.0], [1.2], [1.4]]), latency=0.01, publish=0.02)
    assert times_of_run(record(tmp_path, steps)).overhead_s == pytest.approx(0.03)


def test_what_began_late_in_a_step_is_no_overhead(tmp_path):
    # Workers 1 to 4 are late every other time, begin half a step late, and are still in time then.
    delay = cycling([[1.0], *[[1.5 + 0.01 * w, 0.2 + 0.01 * w] for w in range(4)]])
    steps = run(delay, workers=5, policy=BackupWorkers(4), steps=40, latency=0.01)
    assert times_of_run(record(tmp_path, steps, workers=5)).overhead_s == pytest.approx(0.01)


def test_waiting_for_data_is_a_part_of_the_time(tmp_path):
    steps = run(cycling([[1.0], [1.2], [1.4]]), data=0.3, samples=32)
    observed = read_times(record(tmp_path, steps))
    assert observed.times_s[3].tolist() == pytest.approx([1.0, 1.2, 1.4])
    assert observed.data_s[3] == pytest.approx([0.3] * 3) and observed.samples[3].tolist() == [32] * 3


def test_what_takes_very_long_at_the_end_counts_with_what_it_had_taken(tmp_path):
    delay = cycling([[1.0], [1.2], [1.1] * 10 + [1000.0]])
    steps = run(delay, steps=40)
    observed = read_times(record(tmp_path, steps))
    (note,) = [note for note in observed.notes if "worker 2's last gradient had not come" in note]
    last = max(step.step for step in steps if any(worker == 2 for worker, _, _ in step.accepted))
    lasted = steps[-1].closed_s - steps[last].published_s
    assert lasted > 20 and f"after {lasted:.3g} s when the record ends (usually 1.1 s)" in note
    assert observed.times_s[last + 1, 2] == observed.times_s[:, 2].max() == pytest.approx(lasted)
    assert observed.measured[:, 2].sum() == 11


def test_async_records_are_taken_by_sequence_and_say_so(tmp_path):
    delay = cycling([[0.3], [1.0], [1.1]])
    steps = run(delay, policy=Async(2), steps=40)
    observed = read_times(record(tmp_path, steps, policy="async:k=2"))
    assert any("several gradients at one version" in note for note in observed.notes)
    assert np.median(observed.times_s, axis=0).tolist() == [0.3, 1.0, 1.1]


def test_the_dead_are_told(tmp_path):
    delay = cycling([[1.0], [1.2], [1.4]])
    played = play(BackupWorkers(0), delay, workers=3, steps=30, deaths={2: 15.0})
    observed = read_times(record(tmp_path, timed(played, delay)))
    assert "1 of 3 workers were dead at the end" in observed.notes


def test_a_torn_record_is_used_as_far_as_it_goes(tmp_path):
    path = record(tmp_path, run(cycling([[1.0], [1.2], [1.4]]), steps=25))
    with open(path, "rb+") as file:
        file.truncate(file.seek(0, 2) - 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observed = read_times(path)
    assert len(observed.times_s) == 24
    assert any("line 26: the line is torn and was dropped" in note for note in observed.notes)


def test_records_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match="holds no step yet"):
        read_times(record(tmp_path, [], name="none.jsonl"))
    untimed = [
        replace(step, arrivals=[replace(one, compute_s=None) for one in step.arrivals])
        for step in run(cycling([[1.0], [1.2], [1.4]]), steps=5)
    ]
    with pytest.raises(ValueError, match="holds no compute times"):
        read_times(record(tmp_path, untimed, name="untimed.jsonl"))
    path = tmp_path / "other.json"
    path.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="other.json, line 1"):
        read_times(path)
    with pytest.raises(OSError, match="absent"):
        read_times(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("bad", [math.nan, 0.0, -1.0, math.inf, None])
def test_times_that_are_none_in_a_record_are_gaps(tmp_path, bad):
    steps = run(cycling([[1.0], [1.2], [1.4]]), steps=20)
    arrivals = [replace(one, compute_s=bad, data_s=0.0) for one in steps[5].arrivals]
    steps[5] = replace(steps[5], arrivals=arrivals)
    observed = read_times(record(tmp_path, steps))
    assert observed.times_s[:, :2].tolist() == [[1.0, 1.2]] * len(observed.times_s)
    assert (~observed.measured).any()


def test_a_record_that_begins_later_and_one_worker_alone(tmp_path):
    arrival = ArrivalRecord(0, 7, 70, "accepted", 0.5, compute_s=0.4, data_s=0.1)
    step = StepRecord(70, 1.0, 1.5, 1.6, 1, 1, [(0, 7, 70)], [arrival])
    observed = read_times(record(tmp_path, [step], workers=1, policy="backup:0"))
    assert observed.times_s.tolist() == [[0.5]]
