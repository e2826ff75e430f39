"""Timelines: what viewers demand of a trace, and that it tells what the record says."""

import io
import json
from dataclasses import replace

import pytest
from stories import HEADER, STORY, played, write
from test_reports import DELAYS

from mpisync.commands import main
from mpisync.reports import read_run, steps_that_fit, trace, write_trace

ROOT = 999  # its row; worker 0's is the next


def events_of(path, steps=None):
    run, file = read_run(path), io.StringIO()
    number = write_trace(run, steps or steps_that_fit(run), file)
    document = json.loads(file.getvalue())
    check(document)
    assert len(document["traceEvents"]) == number
    return document["traceEvents"]


def check(document):
    """Hold a trace against its format, and slices of a row against each other."""
    assert document["displayTimeUnit"] == "ms"
    rows = {}
    for event in document["traceEvents"]:
        assert event["ph"] in "XMi" and type(event["name"]) is str and event["name"]
        assert type(event["pid"]) is type(event["tid"]) is int and event["pid"] > 0 and event["tid"] > 0
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name", "thread_sort_index") and event["args"]
            continue
        assert event["ts"] >= 0 and event["cat"]
        if event["ph"] == "i":
            assert event["s"] == "t"
        else:
            assert event["dur"] >= 0
            begin, end = round(event["ts"] * 1e3), round((event["ts"] + event["dur"]) * 1e3)
            rows.setdefault(event["tid"], []).append((begin, end, event["name"]))
    named = {e["tid"] for e in document["traceEvents"] if e["name"] == "thread_name"}
    assert rows.keys() <= named
    for slices in rows.values():
        assert [begin for begin, *_ in slices] == sorted(begin for begin, *_ in slices)
        around = []  # the slices that are open
        for begin, end, name in slices:
            while around and around[-1] <= begin:
                around.pop()
            assert not around or end <= around[-1], f"{name} begins in one slice and ends in another"
            around.append(end)


def slices(events, row):
    """Return a row's slices as (name, begin, length) in seconds."""
    return [
        (e["name"], round(e["ts"] / 1e6, 6), round(e["dur"] / 1e6, 6))
        for e in events
        if e["ph"] == "X" and e["tid"] == row
    ]


def test_the_storys_rows(tmp_path):
    events = events_of(write(tmp_path / "record.jsonl"))
    assert slices(events, ROOT + 1) == [
        ("data", 0.25, 0.25), ("compute", 0.5, 0.5), ("wait", 1.0, 0.4),
        ("data", 1.4, 0.125), ("compute", 1.525, 0.75), ("send", 2.275, 0.225), ("wait", 2.5, 0.5),
        ("compute", 3.0, 0.5), ("send", 3.5, 0.5), ("wait", 4.0, 0.5),
    ]  # fmt: skip
    assert slices(events, ROOT + 2) == [
        ("compute (late)", 0.0, 2.0),
        ("compute (late)", 2.0, 0.5), ("send", 2.5, 0.25), ("wait", 2.75, 0.25),
        ("compute (rejected)", 3.0, 0.5),
    ]  # fmt: skip
    assert slices(events, ROOT)[:5] == [
        ("step 0", 0.0, 1.4), ("gather", 0.0, 1.0), ("reduce", 1.0, 0.1), ("update", 1.1, 0.2), ("publish", 1.3, 0.1),
    ]  # fmt: skip


def test_verdicts_are_marked_in_name_colour_category_and_arguments(tmp_path):
    events = events_of(write(tmp_path / "record.jsonl"))
    computed = [e for e in events if e["name"].startswith("compute")]
    assert [(e["name"], e["cname"], e["cat"].split(",")[0], e["args"]["verdict"]) for e in computed] == [
        ("compute", "good", "accepted", "accepted"),
        ("compute", "good", "accepted", "accepted"),
        ("compute", "good", "accepted", "accepted"),
        ("compute (late)", "bad", "late", "late"),
        ("compute (late)", "bad", "late", "late"),
        ("compute (rejected)", "terrible", "rejected", "rejected"),
    ]
    assert computed[3]["args"]["late_by"] == 1 and computed[0]["args"]["loss"] == 4.0
    assert not any("cost" in e["args"] for e in computed)
    marks = [(e["name"], e["ts"] / 1e6) for e in events if e["ph"] == "i"]
    assert [name for name, _ in marks] == ["accepted"] * 3 + ["late by 1"] * 2 + ["rejected"]
    assert [at_s for _, at_s in marks] == pytest.approx([1.0, 2.5, 4.0, 2.0, 2.75, 3.5])


def test_a_gradients_cost_is_told(tmp_path):
    arrivals = [replace(STORY[0].arrivals[0], cost=96.5)]
    events = events_of(write(tmp_path / "record.jsonl", [replace(STORY[0], arrivals=arrivals)]))
    assert [e["args"]["cost"] for e in events if e["name"] == "compute"] == [96.5]


def test_what_is_estimated_says_so_and_what_is_recorded_does_not(tmp_path):
    events = events_of(write(tmp_path / "record.jsonl"))
    for event in events:
        if event["ph"] == "X" and event["tid"] > ROOT:
            assert event["args"]["estimated"] is True and "estimated" in event["cat"]
        elif event["ph"] != "M":
            assert "estimated" not in event.get("args", ()) and "estimated" not in event["cat"]


def test_a_row_for_each_rank_with_the_root_first(tmp_path):
    events = events_of(write(tmp_path / "record.jsonl"))
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {ROOT: "root", ROOT + 1: "worker 0 on alpha", ROOT + 2: "worker 1 on beta"}
    root = next(e for e in events if e["name"] == "step 2")
    assert root["args"] == {
        "step": 2, "wanted": 1, "accepted": 1, "alive": 2, "last": "worker 0", "samples": 8, "updated": False,
    }  # fmt: skip


@pytest.mark.parametrize("policy", DELAYS)
def test_traces_of_any_policy_keep_the_format(tmp_path, policy):
    header, steps = played(policy, DELAYS[policy], 30)
    events = events_of(write(tmp_path / "record.jsonl", steps, header))
    marks = [e for e in events if e["ph"] == "i"]
    assert len(marks) == sum(len(step.arrivals) for step in steps)


def test_chosen_steps_only(tmp_path):
    events = events_of(write(tmp_path / "record.jsonl"), range(1, 2))
    assert [e["name"] for e in events if e.get("cat") == "step"] == ["step 1"]
    assert sum(e["ph"] == "i" for e in events) == 2


def test_the_last_steps_that_fit(tmp_path, monkeypatch):
    run = read_run(write(tmp_path / "record.jsonl"))
    fits = []
    for most in (1, 3, 4, 5, 6):
        monkeypatch.setattr(trace, "MOST_GRADIENTS", most)
        fits.append(steps_that_fit(run).start)
    assert fits == [2, 2, 2, 1, 0]  # the last steps have 3, 2 and 1 gradients


def test_nonsense_of_workers_keeps_the_format(tmp_path):
    arrivals = [replace(STORY[1].arrivals[0], compute_s=1e300, data_s=-1e300), STORY[1].arrivals[1]]
    steps = [STORY[0], replace(STORY[1], arrivals=arrivals), STORY[2]]
    header = replace(HEADER, policy="\ud800</script>", hosts=["\u202e", '"\\'])
    assert events_of(write(tmp_path / "record.jsonl", steps, header))


def test_the_command(tmp_path, capsys):
    path, out = write(tmp_path / "record.jsonl"), tmp_path / "trace.json"
    assert main.main(["timeline", str(path), "--out", str(out)]) == 0
    check(json.loads(out.read_text()))
    assert "steps 0 to 2 of 3, " in capsys.readouterr().out
    assert main.main(["timeline", str(path), "--out", str(out), "--steps", "1:"]) == 0
    assert "steps 1 to 2 of 3" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["5", "2:9", "1:1", "-1:2", "a:b", "2:1"])
def test_steps_that_are_none_are_refused(tmp_path, capsys, text):
    path = write(tmp_path / "record.jsonl")
    assert main.main(["timeline", str(path), "--out", str(tmp_path / "t.json"), f"--steps={text}"]) == 1
    assert f"--steps must be FIRST:END within 0:3, the steps of this run, not {text!r}" in capsys.readouterr().err


def test_a_record_is_never_written_over(tmp_path, capsys):
    path = write(tmp_path / "record.jsonl")
    before = path.read_bytes()
    assert main.main(["timeline", str(path), "--out", str(path)]) == 1
    assert "would be lost" in capsys.readouterr().err and path.read_bytes() == before


def test_a_run_without_steps_makes_no_trace(tmp_path, capsys):
    path = write(tmp_path / "record.jsonl", [])
    assert main.main(["timeline", str(path), "--out", str(tmp_path / "t.json")]) == 1
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "t.json").exists()
