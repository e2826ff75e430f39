"""Records: what is written is read again, and whatever was torn or edited is seen and named."""

import json
import math
import re
from dataclasses import replace

import pytest
from playing import opened, play, steady

from mpisync.policies import Arrival, Async, BackupWorkers, Decision, Replay, parse_policy
from mpisync.records import ArrivalRecord, RecordReader, RecordWriter, RunEnd, RunHeader, StepRecord, read_record
from mpisync.records.lines import seal, unseal
from mpisync.records.schema import StepChecker

HEADER = RunHeader("backup:1", 3, 7, 1.5e9, "0.1.0", ["a", "a", "b"], {"transport": "shared"})
STEPS = play(BackupWorkers(1), steady(1, 2, 4.5), workers=3, steps=4)
FULL = StepRecord(
    step=4,
    opened_s=8.125,
    closed_s=10.5,
    published_s=10.625,
    target=2,
    alive=3,
    accepted=[(0, 4, 4), (1, 4, 4)],
    arrivals=[
        ArrivalRecord(0, 4, 4, "accepted", 0.1, 0, True, None, 0.75, 0.25, 32, 0.5, 1024),
        ArrivalRecord(2, 2, 3, "late", -0.5, late_by=1, compute_s=3.0),
        ArrivalRecord(2, 3, 4, "rejected", 0.3, reason="gradient is not finite", loss=math.inf),
        ArrivalRecord(1, 4, 4, "accepted", 2.375),
    ],
    samples_used=64,
    reduce_s=1e-3,
    update_s=1e-17,
    publish_s=0.1,
    updated=False,
    counts={"accepted": 10, "late": 2, "rejected": 1},
    norms=(2.5, 1.25),
    why="N=2 instead of 3",
)


def write(path, header=HEADER, steps=STEPS):
    with RecordWriter(path) as writer:
        writer.header(header)
        for step in steps:
            writer.step(step)
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "record.jsonl")


def edit(path, number, **changes):
    """Edit a line as somebody would who knows how to seal it again."""
    lines = path.read_bytes().splitlines(keepends=True)
    document = {**unseal(lines[number - 1].rstrip(b"\n")), **changes}
    lines[number - 1] = seal({key: value for key, value in document.items() if value != "gone"})
    path.write_bytes(b"".join(lines))


def rearrange(path, *numbers):
    """Keep these lines, in this order."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[number - 1] for number in numbers))


# What is written is read again.


def test_a_record_is_read_as_it_was_written(tmp_path):
    written = [*STEPS, FULL]
    assert read_record(write(tmp_path / "record.jsonl", steps=written)) == (HEADER, written)


def test_a_header_tells_what_it_takes_to_repeat_the_run_and_one_of_before_does_not(tmp_path):
    told = replace(
        HEADER, command=["train.py", "\ud800"], steps=9, root_host="c", root_cores=8, root_threads=4, cores=24,
        transports=["messages"] * 3, parameters={"float32": 5}, parameters_bytes=20, optimizer="SGD(lr=0.1)",
        scheduler="StepLR", versions={"python": "3.11"},
    )  # fmt: skip
    path = write(tmp_path / "told.jsonl", told)
    assert read_record(path) == (told, STEPS)
    before = ("policy", "workers", "seed", "started_unix_s", "version", "hosts", "settings", "format", "kind", "crc32")
    edit(path, 1, **{name: "gone" for name in vars(told) if name not in before})
    assert read_record(path) == (HEADER, STEPS)


def test_every_line_is_json_by_the_letter(tmp_path):
    path = write(tmp_path / "record.jsonl", steps=[*STEPS, FULL])

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    documents = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert [document["kind"] for document in documents] == ["run"] + ["step"] * 5
    assert documents[5]["arrivals"][2]["loss"] == "inf"


@pytest.mark.parametrize("loss", [math.inf, -math.inf, 1e-320, 0.1 + 0.2, -0.0, None])
def test_numbers_survive_exactly(tmp_path, loss):
    step = replace(FULL, arrivals=[replace(FULL.arrivals[0], loss=loss)])
    _, steps = read_record(write(tmp_path / "record.jsonl", steps=[step]))
    assert repr(steps[0].arrivals[0].loss) == repr(loss)


def test_nan_survives(tmp_path):
    step = replace(FULL, norms=(math.nan, 1.0))
    _, steps = read_record(write(tmp_path / "record.jsonl", steps=[step]))
    assert math.isnan(steps[0].norms[0]) and steps[0].norms[1] == 1.0


def test_numbers_of_other_libraries_are_numbers(tmp_path):
    class Whole:
        def __index__(self):
            return 5

    class Real:
        def __float__(self):
            return math.nan

    step = replace(FULL, samples_used=Whole(), reduce_s=Real())
    _, steps = read_record(write(tmp_path / "record.jsonl", steps=[step]))
    assert steps[0].samples_used == 5 and math.isnan(steps[0].reduce_s)


def test_what_json_cannot_hold_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match="holds numbers, text, lists and objects, not {1}"):
        write(tmp_path / "record.jsonl", header=replace(HEADER, settings={"set": {1}}))


# Writing.


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "record.jsonl"
    with RecordWriter(path) as writer:
        writer.header(HEADER)
        writer.step(STEPS[0])
        assert read_record(path, strict=True) == (HEADER, [STEPS[0]])


def test_a_file_that_holds_a_run_is_left_alone(path):
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"record\.jsonl holds a run already"):
        RecordWriter(path)
    assert path.read_bytes() == before


def test_an_empty_file_may_be_used(tmp_path):
    (tmp_path / "record.jsonl").touch()
    assert read_record(write(tmp_path / "record.jsonl"))[0] == HEADER


def test_the_header_comes_first_and_once(tmp_path):
    with RecordWriter(tmp_path / "record.jsonl") as writer:
        with pytest.raises(RuntimeError, match="no header yet"):
            writer.step(STEPS[0])
        writer.header(HEADER)
        with pytest.raises(RuntimeError, match="has its header already"):
            writer.header(HEADER)


def test_a_path_that_cannot_be_written_is_named_with_the_reason(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="cannot be written .No such file.* directory"
    ) as no:
        RecordWriter(tmp_path / "missing" / "record.jsonl")
    assert no.value.filename == str(tmp_path / "missing" / "record.jsonl")
    with pytest.raises(IsADirectoryError, match="cannot be written"):
        RecordWriter(tmp_path)


class FullDisk:
    """A file on a file system with room for so many bytes."""

    def __init__(self, room):
        self.room, self.written, self.closed = room, b"", False

    def write(self, data):
        part = bytes(data[: self.room - len(self.written)])
        if not part:
            raise OSError(28, "No space left on device")
        self.written += part
        return len(part)

    def close(self):
        self.closed = True


def test_a_full_disk_is_named_and_nothing_follows_a_torn_line(tmp_path):
    with RecordWriter(tmp_path / "record.jsonl") as writer:
        writer.header(HEADER)
        writer.close()
        writer._file = FullDisk(room=100)
        with pytest.raises(OSError, match="No space left on device.: free space") as full:
            writer.step(STEPS[0])
        assert full.value.errno == 28 and writer._file.closed
        assert len(writer._file.written) == 100


def test_partial_writes_are_completed(tmp_path):
    class Dribble(FullDisk):
        def write(self, data):
            return super().write(data[:7])

    with RecordWriter(tmp_path / "record.jsonl") as writer:
        writer.header(HEADER)
        writer.close()
        writer._file = Dribble(room=10**6)
        writer.step(STEPS[0])
        assert writer._file.written == seal({"kind": "step", **vars(STEPS[0])})


# A torn last line: dropped with a warning, or refused.


def test_wherever_a_record_is_cut_what_is_read_was_written(path):
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(ends[-2] + 1, ends[-1] - 1):
        path.write_bytes(whole[:cut])
        with pytest.warns(RuntimeWarning, match="line 5: the line is torn and was dropped"):
            assert read_record(path) == (HEADER, STEPS[:3])
        with pytest.raises(ValueError, match="line 5: the line is torn.*: delete it"):
            read_record(path, strict=True)
    path.write_bytes(whole[: ends[-2]])
    assert read_record(path, strict=True) == (HEADER, STEPS[:3])
    path.write_bytes(whole[: ends[-1] - 1])  # as some editors leave it
    assert read_record(path, strict=True) == (HEADER, STEPS)


def test_a_record_without_a_whole_header_is_refused(path):
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="line 1: the first line"):
        read_record(path)
    path.write_bytes(b"")
    with pytest.raises(
        ValueError, match="line 1: the first line must be the run's, but is missing"
    ):
        read_record(path)


# Edits.


def test_any_changed_byte_is_seen_and_its_line_named(path):
    whole = bytearray(path.read_bytes())
    begin = whole.index(b"\n") + 1
    for place in range(begin, whole.index(b"\n", begin)):
        whole[place] ^= 1
        path.write_bytes(whole)
        with pytest.raises(ValueError, match="line 2: the line must match its checksum"):
            read_record(path)
        whole[place] ^= 1


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((1, 2, 4, 5), "line 3: steps must be consecutive, but step 2 comes where step 1 is due"),
        ((1, 3, 2), "line 3: steps must be consecutive, but step 0 comes where step 2 is due"),
        ((1, 2, 3, 3), "line 4: steps must be consecutive, but step 1 comes where step 2 is due"),
        ((2, 3), "line 1: the first line must be the run's, but it is not"),
        ((1, 2, 1, 3), "line 3: every line but the first must be a step's or the end's, but this is .* 'run'"),
    ],
)
def test_lines_lost_moved_or_doubled_are_seen(path, numbers, message):
    rearrange(path, *numbers)
    with pytest.raises(ValueError, match=message):
        read_record(path)


def test_a_record_may_lack_its_first_steps(path):
    rearrange(path, 1, 4, 5)
    assert read_record(path, strict=True) == (HEADER, STEPS[2:])


ARRIVAL = vars(STEPS[0].arrivals[0])


@pytest.mark.parametrize(
    ("number", "changes", "message"),
    [
        (1, {"format": 2}, "line 1: the record has format 2, but this mpisync reads format 1"),
        (1, {"workers": 0}, "line 1: a run has at least 1 worker and a host for each"),
        (1, {"hosts": ["a"]}, "line 1: a run has .* 3 workers and 1 hosts"),
        (1, {"hosts": ["a", 1, "b"]}, "line 1: hosts must be str, not 1"),
        (1, {"seed": 1.5}, "line 1: seed must be int, not 1.5"),
        (1, {"command": "train.py"}, "line 1: command must be list, not 'train.py'"),
        (1, {"steps": "all"}, "line 1: steps must be int, not 'all'"),
        (1, {"cores": 1.5}, "line 1: cores must be int, not 1.5"),
        (1, {"parameters": {"float32": "many"}}, "line 1: parameters.float32 must be int, not 'many'"),
        (1, {"versions": ["3.11"]}, r"line 1: versions must be object, not \['3.11'\]"),
        (2, {"kind": "note"}, "line 2: every line but the first must be a step's.*'note'"),
        (2, {"step": "0"}, "line 2: step must be int, not '0'"),
        (2, {"step": True}, "line 2: step must be int, not True"),
        (2, {"step": -1}, "line 2: a step's number must not be negative, but it is -1"),
        (2, {"closed_s": None}, "line 2: closed_s must be float, not None"),
        (2, {"closed_s": "late"}, "line 2: closed_s must be float, not 'late'"),
        (2, {"closed_s": "gone"}, "line 2: StepRecord must have the field closed_s"),
        (2, {"closed": 1.0}, "line 2: StepRecord has no field closed"),
        (2, {"updated": 1}, "line 2: updated must be bool, not 1"),
        (2, {"accepted": {}}, "line 2: accepted must be list, not {}"),
        (2, {"accepted": [[0, 0]]}, r"line 2: accepted must be list of 3, not \[0, 0\]"),
        (2, {"accepted": [[0, 0, 0], 5]}, "line 2: accepted must be list, not 5"),
        (2, {"accepted": ["abc"]}, "line 2: accepted must be list, not 'abc'"),
        (2, {"accepted": [[0, 0, 1.0]]}, "line 2: accepted must be int, not 1.0"),
        (2, {"accepted": [[3, 0, 0]]}, "line 2: workers are numbered 0 to 2, but here is 3"),
        (2, {"accepted": [[0, 0, 1]]}, "line 2: a gradient's version must be from 0 to its step"),
        (3, {"accepted": [[0, 0, 0]]}, "line 3: a gradient gets one verdict, but worker 0's"),
        (
            2,
            {"accepted": []},
            "line 2: an accepted arrival must be in its step's list, .* worker 0",
        ),
        (2, {"arrivals": [1]}, "line 2: arrivals must be object, not 1"),
        (2, {"arrivals": [{**ARRIVAL, "verdict": "lost"}]}, "verdict must be accepted or late or"),
        (2, {"arrivals": [{**ARRIVAL, "worker": None}]}, "arrivals.worker must be int, not None"),
        (2, {"arrivals": [{**ARRIVAL, "verdict": "late"}]}, "a gradient gets one verdict"),
        (2, {"counts": {"late": "many"}}, "line 2: counts.late must be int, not 'many'"),
        (2, {"norms": [1.0]}, r"line 2: norms must be list of 2, not \[1.0\]"),
    ],
)
def test_a_line_that_breaks_a_rule_is_named_with_the_rule(path, number, changes, message):
    edit(path, number, **changes)
    with pytest.raises(ValueError, match=f"record {path}, .*{message}"):
        read_record(path)


def test_a_line_of_something_else_is_refused(path):
    path.write_bytes(path.read_bytes() + b"Traceback (most recent call last):\n")
    with pytest.raises(ValueError, match="line 6: the line must match its checksum"):
        read_record(path)


# Replay takes its record from a file.


def test_a_replay_reads_its_record(path):
    replay = parse_policy(f"replay:{path}")
    assert replay == Replay(path) and str(replay) == f"replay:{path}"
    assert replay.header == HEADER and replay.steps == 4
    again = play(replay, steady(3, 1, 2), workers=3, steps=4)
    assert [step.accepted for step in again] == [step.accepted for step in STEPS]


def test_a_path_to_replay_may_hold_anything(tmp_path):
    path = write(tmp_path / "a,b=1:c.jsonl")
    assert parse_policy(f"replay:{path}").steps == 4


def test_a_replay_refuses_another_number_of_workers(path):
    replay = Replay(path)
    replay.check(3)
    for workers in (2, 4):
        with pytest.raises(ValueError, match=f"of 3 and here are {workers}: start it with 3"):
            replay.check(workers)


def test_a_replay_refuses_a_torn_record(path):
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"record {path}, line 5: the line is torn.*: delete it"):
        Replay(path)


def test_a_replay_refuses_an_edited_record(path):
    path.write_bytes(path.read_bytes().replace(b'"accepted":[[0,0,0],', b'"accepted":[[2,0,0],'))
    with pytest.raises(ValueError, match="line 2: the line must match its checksum.* edited"):
        Replay(path)


def test_a_replay_refuses_a_record_without_steps(tmp_path):
    path = write(tmp_path / "record.jsonl", steps=[])
    with pytest.raises(ValueError, match=f"must hold a step .* replay:{path} holds none"):
        Replay(path)


def test_a_record_that_is_missing_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="record.jsonl"):
        Replay(tmp_path / "record.jsonl")


def test_an_asynchronous_run_survives_its_file(tmp_path):
    steps = play(Async(2, max_staleness=3), steady(1, 2.5, 4), workers=3, steps=9)
    header = replace(HEADER, policy="async:k=2,max_staleness=3")
    replay = Replay(write(tmp_path / "record.jsonl", header, steps))
    assert replay.staleness > 0
    again = play(replay, steady(2, 9, 1), workers=3, steps=9)
    assert [step.accepted for step in again] == [step.accepted for step in steps]


def test_held_gradients_are_judged_by_the_file_too(path):
    worker, sequence, version = STEPS[0].accepted[1]
    arrival = Arrival(worker, sequence, version, 0.0)
    assert Replay(path).judge(arrival, opened(step=0)) is Decision.HOLD


# Reading step by step, and quickly.


def test_a_record_can_be_read_while_it_is_written(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    reader = RecordReader(path)
    assert reader.header == HEADER and reader.torn is None
    assert list(reader) == STEPS[:3] and reader.torn == 5
    path.write_bytes(whole)
    reader = RecordReader(path)
    assert list(reader) == STEPS and reader.torn is None


def test_a_verdict_is_remembered_in_whatever_order_gradients_get_theirs():
    checker = StepChecker(workers=1)
    for step, sequence in enumerate([2, 0, 1, 4, 3]):
        checker.check(StepRecord(step, 0.0, 0.0, 0.0, 1, 1, [(0, sequence, 0)], []))
    for sequence in range(5):
        with pytest.raises(ValueError, match=f"worker 0's gradient {sequence} gets another"):
            checker.check(StepRecord(checker._due, 0.0, 0.0, 0.0, 1, 1, [(0, sequence, 0)], []))
    assert not checker._ahead, "it remembers no more than it must"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("samples", 1.0, "arrivals.samples must be int, not 1.0"),
        ("offset_s", "soon", "arrivals.offset_s must be float, not 'soon'"),
        ("tie", 0, "arrivals.tie must be bool, not 0"),
        ("verdict", "lost", "arrivals.verdict must be accepted or late or rejected"),
        ("verdict", None, "arrivals.verdict must be accepted or late or rejected"),
        ("reason", 5, "arrivals.reason must be str, not 5"),
        ("colour", "red", "ArrivalRecord has no field colour"),
    ],
)
def test_many_sound_gradients_make_nobody_careless(tmp_path, name, value, message):
    path = write(tmp_path / "record.jsonl", steps=[FULL])
    arrivals = [vars(arrival) for arrival in FULL.arrivals]
    edit(path, 2, arrivals=[*arrivals, *arrivals, {**arrivals[1], name: value}])
    with pytest.raises(ValueError, match=message):
        read_record(path)


def test_a_whole_number_of_seconds_is_a_float(tmp_path):
    path = write(tmp_path / "record.jsonl", steps=[FULL])
    arrivals = [vars(arrival) for arrival in FULL.arrivals]
    edit(path, 2, arrivals=[arrivals[0], {**arrivals[1], "offset_s": 3}, *arrivals[2:]])
    offset_s = read_record(path)[1][0].arrivals[1].offset_s
    assert type(offset_s) is float and offset_s == 3.0


def ended(**other):
    samples = {"handed": [8, 8], "used": [8, 0], "discarded": [0, 0], "lost": [0, 8]}
    return RunEnd(**{"version": 1, "failure": "", "arrivals": [], **samples, **other})


def written_end(tmp_path, end, *, more=False):
    path = tmp_path / "record.jsonl"
    step = StepRecord(0, 0.0, 0.5, 0.6, 1, 2, [(0, 0, 0)], [])
    with RecordWriter(path) as writer:
        writer.header(RunHeader("backup:1", 2, 0, 0.0, "1", ["a", "a"]))
        writer.step(step)
        writer.end(end)
        if more:
            writer.step(StepRecord(1, 0.6, 0.7, 0.8, 1, 2, [(0, 1, 1)], []))
    return RecordReader(path)


def test_a_record_ends_with_what_became_of_every_sample(tmp_path):
    late = ArrivalRecord(1, 0, 0, "late", 0.1, late_by=1, samples=8)
    reader = written_end(tmp_path, ended(arrivals=[late], discarded=[0, 8], lost=[0, 0], failure="rank 1: \u00fc"))
    assert reader.end is None
    assert [step.step for step in reader] == [0]
    assert reader.end.arrivals == [late] and reader.end.failure == "rank 1: \u00fc"
    assert read_record(reader.path)[1][0].accepted == [(0, 0, 0)]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"version": 3}, "ends at the version of its last step, 1, but here is 3"),
        ({"arrivals": [ArrivalRecord(1, 0, 0, "accepted", 0.1)]}, "worker 1's gradient 0 is accepted in no step"),
        ({"arrivals": [ArrivalRecord(0, 0, 0, "late", 0.1)]}, "a gradient gets one verdict"),
        ({"handed": [8]}, "an account for each of the 2 workers"),
        ({"used": [8, 8]}, "worker 1 was handed 8 samples, but 16 are accounted for"),
    ],
)
def test_an_end_that_cannot_be_is_refused(tmp_path, other, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        list(written_end(tmp_path, ended(**other)))


def test_nothing_follows_an_end(tmp_path):
    with pytest.raises(ValueError, match="line 4: nothing may follow the end"):
        list(written_end(tmp_path, ended(), more=True))
