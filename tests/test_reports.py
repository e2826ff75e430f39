"""What reports are made of: records as columns, gradients in time, totals, words."""

import doctest
import importlib
import math
import pkgutil
from dataclasses import replace

import numpy as np
import pytest
from stories import HEADER, STORY, played, write

import mpisync.reports
from mpisync.records import StepRecord
from mpisync.records.lines import seal, unseal
from mpisync.reports import read_run
from mpisync.reports.columns import ACCEPTED, check_target
from mpisync.reports.figures import SPLIT, figures
from mpisync.reports.sentences import comparison, summary
from mpisync.reports.spans import lay_out
from mpisync.reports.words import safe

DELAYS = {
    "backup:0": [[1.0], [3.0], [2.0]],
    "backup:1": [[1.0, 1.5], [9.0, 0.5], [2.0]],
    "deadline:2.0,at_least=2,grace=0.5": [[1.0], [4.0], [1.5, 3.0]],
    "async:k=2,max_staleness=3": [[1.0], [2.5], [7.0, 0.25]],
}


@pytest.fixture
def story(tmp_path):
    return read_run(write(tmp_path / "record.jsonl"))


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(mpisync.reports.__path__)])
def test_examples(name):
    module = importlib.import_module(f"mpisync.reports.{name}")
    assert doctest.testmod(module).failed == 0


# Reading.


def test_columns_hold_what_the_record_says(story):
    assert (len(story), story.first, story.took_s, story.notices) == (3, 0, 4.5, [])
    assert story.steps["updated"].tolist() == [1, 1, 0]
    assert story.gradients["arrived_s"].tolist() == [11.0, 12.0, 12.5, 12.75, 13.5, 14.0]
    assert story.gradients["step"].tolist() == [0, 1, 1, 2, 2, 2]
    assert np.isnan(story.gradients["loss"]).tolist() == [False] * 3 + [True] * 2 + [False]
    assert dict(story.reasons) == {"the gradient has NaN or Inf": 1}


def test_a_directory_stands_for_its_record(tmp_path):
    write(tmp_path / "record.jsonl")
    assert len(read_run(tmp_path)) == 3


def test_a_run_that_goes_on_is_shown_so_far(tmp_path):
    path = write(tmp_path / "record.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    run = read_run(path)
    assert len(run) == 2 and len(run.gradients["worker"]) == 3
    assert run.notices == [
        f"record {path}, line 4: the line is torn, so the run goes on or was killed. "
        "Shown are the 2 steps before it."
    ]


def test_what_stands_before_damage_is_shown(tmp_path):
    path = write(tmp_path / "record.jsonl")
    path.write_bytes(path.read_bytes().replace(b'"step":1,"opened', b'"step":9,"opened'))
    run = read_run(path)
    assert len(run) == 1
    assert "line 3: the line must match its checksum" in run.notices[0]
    assert run.notices[0].endswith("Shown are the 1 steps before it.")


@pytest.mark.parametrize("content", [b"", b"\n", b"{}\n", b"\x00\xff" * 50, b'{"kind":"run"}'])
def test_what_is_no_record_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "record.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="record.jsonl, line 1: ") as refused:
        read_run(path)
    assert "\n" not in str(refused.value)


def test_a_record_of_another_format_is_refused(tmp_path):
    path = write(tmp_path / "record.jsonl", header=replace(HEADER, format=2))
    with pytest.raises(ValueError, match="has format 2, but this mpisync reads format 1: read it with"):
        read_run(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"opened_s": math.nan},
        {"closed_s": math.inf},
        {"closed_s": 11.0},
        {"published_s": 12.25},
        {"opened_s": 9.0},
        {"reduce_s": -math.inf},
        {"opened_s": 1e300, "closed_s": 1e300, "published_s": 1e300},
        {"samples_used": -1},
        {"samples_used": 2**60},
        {"target": 10**30},
    ],
)
def test_a_step_that_cannot_have_been_ends_what_is_shown(tmp_path, changes):
    steps = [STORY[0], replace(STORY[1], **changes), STORY[2]]
    run = read_run(write(tmp_path / "record.jsonl", steps))
    assert len(run) == 1 and len(run.gradients["worker"]) == 1 and len(run.notices) == 1
    assert figures(run).samples == 8


@pytest.mark.parametrize(
    "changes", [{"offset_s": math.nan}, {"offset_s": 1e12}, {"samples": -1}, {"bytes": 10**30}]
)
def test_a_gradient_that_cannot_have_been_ends_what_is_shown(tmp_path, changes):
    arrivals = [replace(STORY[1].arrivals[0], **changes), STORY[1].arrivals[1]]
    run = read_run(write(tmp_path / "record.jsonl", [STORY[0], replace(STORY[1], arrivals=arrivals)]))
    assert len(run) == 1 and len(run.gradients["worker"]) == 1 and len(run.notices) == 1


def test_a_deep_object_is_damage_and_no_crash(tmp_path):
    path = write(tmp_path / "record.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    sealed = seal({**unseal(lines[1][:-1]), "counts": {}})
    bad = sealed.replace(b'"counts":{}', b'"counts":' + b"[" * 100_000 + b"]" * 100_000)
    path.write_bytes(lines[0] + seal_again(bad) + lines[2])
    assert len(read_run(path)) == 0


def seal_again(line):
    import zlib

    body = line.rpartition(b',"crc32":"')[0]
    return body + b',"crc32":"%08x"}\n' % zlib.crc32(body + b"}")


def test_a_record_is_not_written_over(story, tmp_path):
    check_target(str(tmp_path / "new.html"), [story])
    with pytest.raises(ValueError, match="is the record of a run and would be lost"):
        check_target(str(tmp_path / "record.jsonl"), [story])


# Gradients in time.


def test_every_second_of_the_story_is_where_it_was(story):
    spans = lay_out(story)
    assert story.gradients["worker"][spans.order].tolist() == [0, 0, 0, 1, 1, 1]
    assert spans.began_s == pytest.approx([10.25, 11.4, 13.0, 10.0, 12.0, 13.0])
    assert spans.data_s == pytest.approx([0.25, 0.125, 0, 0, 0, 0])
    assert spans.compute_s == pytest.approx([0.5, 0.75, 0.5, 2.0, 0.5, 0.5])
    assert spans.send_s == pytest.approx([0, 0.225, 0.5, 0, 0.25, 0], abs=1e-9)
    assert spans.wait_s == pytest.approx([0.4, 0.5, 0.5, 0, 0.25, 0], abs=1e-9)
    # versions were out at 10.0, 11.3 and 12.875
    assert spans.response_s == pytest.approx([1.0, 1.2, 1.125, 2.0, 1.45, 0.625])


def test_where_the_storys_time_went(story):
    told = figures(story)
    split_s = dict(zip(SPLIT, told.split_s.tolist(), strict=True))
    expected = {
        "data": [0.375, 0], "compute": [1.75, 0], "discarded": [0, 3.0], "send": [0.725, 0.25],
        "wait": [0, 0], "reduce": [0.6, 0], "update": [0.45, 0.125], "publish": [0.35, 0.125],
        "none": [0.25, 1.0],
    }  # fmt: skip
    assert split_s.keys() == expected.keys()
    for part, seconds in expected.items():
        assert split_s[part] == pytest.approx(seconds, abs=1e-9), part


@pytest.mark.parametrize("policy", DELAYS)
def test_spans_of_any_policy_tile_each_workers_time(tmp_path, policy):
    header, steps = played(policy, DELAYS[policy], 40)
    run = read_run(write(tmp_path / "record.jsonl", steps, header))
    spans, told = lay_out(run), figures(run)
    worker = run.gradients["worker"][spans.order]
    busy_s = spans.data_s + spans.compute_s + spans.send_s
    assert spans.began_s + busy_s == pytest.approx(spans.arrived_s)
    assert (np.diff(worker) >= 0).all() and (spans.wait_s >= 0).all() and (spans.send_s >= 0).all()
    same = worker[1:] == worker[:-1]
    assert spans.until_s[:-1][same] == pytest.approx(spans.began_s[1:][same])
    # In virtual time nothing is under way, so what was computed is all there is.
    delays = [DELAYS[policy][w] for w in worker]
    sequence = run.gradients["sequence"][spans.order]
    assert spans.compute_s == pytest.approx([own[s % len(own)] for own, s in zip(delays, sequence, strict=True)])
    assert told.split_s.sum(axis=0) == pytest.approx([run.took_s] * len(DELAYS[policy]))


def test_unknown_times_and_nonsense_never_overlap(tmp_path):
    arrivals = [
        replace(STORY[0].arrivals[0], compute_s=None, data_s=None),
        replace(STORY[1].arrivals[0], compute_s=math.inf, data_s=-5.0),
        replace(STORY[1].arrivals[1], compute_s=1e30, data_s=1e30),
    ]
    steps = [replace(STORY[0], arrivals=arrivals[:1]), replace(STORY[1], arrivals=arrivals[1:]), STORY[2]]
    spans = lay_out(read_run(write(tmp_path / "record.jsonl", steps)))
    assert (spans.began_s >= 10.0).all() and (spans.send_s >= 0).all()
    assert spans.began_s + spans.data_s + spans.compute_s + spans.send_s == pytest.approx(spans.arrived_s)
    assert spans.guessed.sum() == 2


def test_gradients_out_of_order_never_overlap(tmp_path):
    early = replace(STORY[2].arrivals[0], offset_s=-1.75)  # before the one that it follows
    steps = [*STORY[:2], replace(STORY[2], arrivals=[early, *STORY[2].arrivals[1:]])]
    spans = lay_out(read_run(write(tmp_path / "record.jsonl", steps)))
    assert (np.diff(spans.arrived_s[3:]) >= 0).all() and (spans.wait_s >= 0).all()
    assert (spans.arrived_s >= spans.began_s).all() and (spans.data_s >= 0).all() and (spans.compute_s >= 0).all()


def test_a_worker_begins_no_sooner_than_its_version_was_out(tmp_path):
    # Worker 1 had its verdict at 12.0, and waited for version 2, which was out at 12.875.
    waited = replace(STORY[2].arrivals[1], sequence=1)
    steps = [*STORY[:2], replace(STORY[2], arrivals=[waited, STORY[2].arrivals[2]])]
    spans = lay_out(read_run(write(tmp_path / "record.jsonl", steps)))
    assert spans.began_s[4] == pytest.approx(12.875)
    assert (spans.wait_s[3], spans.send_s[4]) == pytest.approx((0.875, 0.125))


def test_a_record_that_lacks_its_first_steps_is_laid_out(tmp_path):
    run = read_run(write(tmp_path / "record.jsonl", STORY[1:]))
    spans = lay_out(run)
    assert run.first == 1 and len(spans.order) == 5
    assert np.isnan(spans.response_s).tolist() == [False, False, True, False, False]


# Totals and words.


def test_totals_of_the_story(story):
    told = figures(story)
    assert told.verdicts.tolist() == [[3, 0], [0, 2], [0, 1]]
    assert (told.samples, told.rate, told.rate_per_rank) == (24, 24 / 4.5, 8 / 4.5)
    assert told.travelled_bytes == (3000, 3000) and told.lasts.tolist() == [3, 0]
    assert told.typical_s == pytest.approx([0.75, 0.5])
    assert told.curve.values.tolist() == [4, 2, 1]
    assert told.curve.time_s == pytest.approx([1.4, 3.0, 4.5])
    assert told.curve.samples.tolist() == [8, 16, 24]


def test_a_long_curve_is_binned_and_keeps_its_extremes(tmp_path):
    header, steps = played("backup:0", [[1.0]], 1000)
    arrival = steps[500].arrivals[0]
    steps[500] = replace(steps[500], arrivals=[replace(arrival, loss=50.0)])
    curve = figures(read_run(write(tmp_path / "record.jsonl", steps, header))).curve
    assert len(curve) == 120 and curve.high.max() == 50.0 and curve.time_s[-1] == 1000
    assert (curve.low <= curve.values).all() and (curve.values <= curve.high).all()


def plain(lines):
    return " ".join(lines).replace("\xa0", " ")


def test_the_story_in_words(story):
    text = plain(summary(figures(story)))
    assert "<b>backup:1</b> with 2 workers on 2 hosts: 3 steps in 4.5 s, <b>5.33 samples/s</b>" in text
    assert "<b>50 %</b> of 6 gradients counted; 2 came too late and were discarded, 2 of them worker 1's" in text
    assert "1 rejected (the gradient has NaN or Inf ×1)" in text
    assert "The training loss went from 4 to 1." in text


def test_a_slow_worker_is_named_and_so_is_the_one_that_steps_wait_for(tmp_path):
    header, steps = played("backup:0", [[1.0], [1.0], [1.1], [5.0]], 20)
    text = plain(summary(figures(read_run(write(tmp_path / "record.jsonl", steps, header)))))
    assert "<b>Worker 3</b> on node1 is the slowest: 5 s a gradient, 4.8 times the median of 1.05 s" in text
    assert "100 % of the steps had worker 3's gradient as their last." in text
    assert "All 80 gradients counted." in text


def test_a_worker_that_many_wait_for_by_chance_is_not_named(tmp_path):
    header, steps = played("backup:0", [[1.0, 1.1], [1.1, 1.0]], 20)
    assert "as their last" not in plain(summary(figures(read_run(write(tmp_path / "r", steps, header)))))


def test_runs_are_compared_by_rate_and_by_the_loss_all_reached(tmp_path):
    told = []
    for policy in ("backup:0", "backup:1"):
        header, steps = played(policy, [[1.0], [1.0], [10.0]], 20)
        told.append(figures(read_run(write(tmp_path / policy, steps, header))))
    text = plain(comparison(told, ["A", "B"]))
    assert "B used <b>6.7 times</b> as many samples per second as A." in text  # 8 in 1 s, 12 in 10 s
    assert "the lowest that all reached, came: A after 3 min 20 s, B after 20 s." in text


def test_deaths_are_told(tmp_path):
    steps = [replace(step, alive=1) for step in STORY]
    text = plain(summary(figures(read_run(write(tmp_path / "record.jsonl", steps)))))
    assert "<b>1 worker</b> had left or died by the last step." in text


@pytest.mark.parametrize("steps", [[], [StepRecord(0, 1.0, 1.0, 1.0, 1, 2, [(0, 0, 0)], [])]])
def test_a_run_without_anything_has_totals(tmp_path, steps):
    told = figures(read_run(write(tmp_path / "record.jsonl", steps)))
    assert told.rate == 0 and told.shares.sum() == 0 and len(told.curve) == 0
    assert summary(told)


def test_accepted_gradients_of_a_step_are_all_in_its_loss(tmp_path):
    header, steps = played("backup:0", [[1.0], [2.0]], 2)
    arrivals = [replace(steps[0].arrivals[0], loss=1.0), replace(steps[0].arrivals[1], loss=3.0)]
    run = read_run(write(tmp_path / "r", [replace(steps[0], arrivals=arrivals), steps[1]], header))
    assert figures(run).curve.values[0] == 2.0
    assert (run.gradients["verdict"] == ACCEPTED).all()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("a\x00\x1b[31mb", "a\ufffd\ufffd[31mb"),
        ("\ud800\u202eevil", "\ufffd\ufffdevil"),
        ("'\"&", "&#x27;&quot;&amp;"),
        ("x" * 10_000, "x" * 160 + "…"),
        (None, "None"),
    ],
)
def test_hostile_text_is_shown_and_harmless(text, shown):
    assert safe(text) == shown
