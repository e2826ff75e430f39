"""What a report says of samples: how the run ended, every worker's account, and who is dropped at which cost."""

import html
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from stories import END, HEADER, STORY, TOLD, write

from mpisync.records import ArrivalRecord, StepRecord
from mpisync.records.lines import seal
from mpisync.reports import page, read_run
from mpisync.reports.accounts import accounts_card, selection_card
from mpisync.reports.cards import key_figures, workers_table
from mpisync.reports.facts import facts_card
from mpisync.reports.figures import figures
from mpisync.reports.selection import NO_COST, chi_square_tail, select
from mpisync.reports.sentences import bias, ending, summary


def told(path, steps=STORY, header=HEADER, end=END):
    return figures(read_run(write(path, steps, header, end)))


def plain(text):
    """Return what a reader sees."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", re.sub("</?b>", "", text))).replace("\xa0", " ").split())


def rows(text):
    return [plain(row) for row in re.findall(r"<tr>.*?</tr>", text)]


# How it ended.


def ended_with(path, **changes):
    end = replace(END, **changes)
    return told(path, header=TOLD, end=end)


def test_how_a_run_ended_is_told(tmp_path):
    text = plain(" ".join(summary(ended_with(tmp_path / "early"))))
    assert "It ended at version 3, before the 5 steps that were planned." in text
    text = plain(" ".join(summary(ended_with(tmp_path / "failed", failure="rank 1: <boom>"))))
    assert "It failed at version 3: rank 1: <boom>" in text
    planned = replace(TOLD, steps=3)
    assert "It ended at version 3. " in plain(" ".join(summary(told(tmp_path / "whole", header=planned))))
    several_loops = told(tmp_path / "loops", header=replace(TOLD, steps=2))  # of which the header knows the first
    assert "It ended at version 3. " in plain(" ".join(summary(several_loops)))
    assert not any(row.startswith("planned") for row in rows(facts_card(several_loops, "")))


def test_a_record_without_an_end_goes_on_or_was_killed(tmp_path):
    run = told(tmp_path / "record", header=TOLD, end=None)
    assert ending(run.run) == "goes on, or was killed"
    text = plain(" ".join(summary(run)))
    assert "How the run ended is not recorded: it goes on, or was killed. 5 steps were planned." in text
    assert "which this one does not have" in plain(accounts_card(run, ""))
    old = told(tmp_path / "old", end=None)
    assert "it goes on, or was killed. 50 %" in plain(" ".join(summary(old)))


def test_an_end_behind_damage_is_not_known(tmp_path):
    path = write(tmp_path / "record", STORY, TOLD, END)
    path.write_bytes(path.read_bytes().replace(b'"step":2,', b'"step":7,'))
    run = read_run(path)
    assert run.end is None and ending(run) == "not known"
    assert "How the run ended is not known." in plain(" ".join(summary(figures(run))))


def test_a_torn_end_is_none(tmp_path):
    path = write(tmp_path / "record", STORY, TOLD, END)
    path.write_bytes(path.read_bytes()[:-5])
    run = read_run(path)
    assert len(run) == 3 and run.end is None and ending(run) == "goes on, or was killed"
    assert "line 5: the line is torn" in run.notices[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 9},
        {"used": [99, 0]},
        {"handed": [2**60, 2**60]},
        {"requeued": [9, 0]},
        {"peak_rss_bytes": [2**70, 0, 0]},
        {"peak_rss_bytes": [-1, 0, 0]},
        {"lost": "many"},
    ],
)
def test_an_end_that_cannot_be_is_named_and_the_steps_are_shown(tmp_path, changes):
    path = write(tmp_path / "record", STORY, TOLD)
    with open(path, "ab") as file:
        file.write(seal({"kind": "end", **vars(END), **changes}))
    run = read_run(path)
    assert len(run) == 3 and run.end is None and len(run.notices) == 1
    assert run.notices[0].endswith("Shown are the 3 steps before it.")
    assert page([run])


def test_a_run_that_failed_before_its_first_step_is_shown(tmp_path):
    nothing = {"version": 0, "arrivals": [], "handed": [0, 0], "used": [0, 0], "discarded": [0, 0], "lost": [0, 0]}
    run = told(tmp_path / "record", [], TOLD, replace(END, failure="rank 1: OSError", **nothing))
    assert "no step has closed. It failed at version 0: rank 1: OSError" in plain(" ".join(summary(run)))
    assert "train.py" in page([run.run])


# What ran.


def test_what_a_reader_needs_to_repeat_the_run_is_shown(tmp_path):
    facts = dict(row.split(" ", 1) for row in rows(facts_card(told(tmp_path / "record", header=TOLD), "")))
    assert facts["command"] == "train.py --lr 0.1 --name 'two words'"
    assert facts["planned"] == "5 steps"
    assert facts["optimizer"] == "SGD(lr=0.1, momentum=0.9), StepLR"
    assert facts["parameters"] == "25,000,000 float32 and 7 bfloat16 (100 MB)"
    assert facts["root"] == "gamma, 8 cores, 4 threads" and facts["cores"] == "of all ranks 12"
    assert facts["transport"] == "shared memory: 0; messages: 1"
    assert facts["versions"] == "mpisync 0.1.0, python 3.11.7, torch 2.13.0, mpi4py 4.1.2, Open MPI v5.0.11"


def test_a_record_of_before_shows_what_it_has(tmp_path):
    facts = [row.split(" ")[0] for row in rows(facts_card(told(tmp_path / "record", end=None), ""))]
    assert facts == ["record", "policy", "started", "seed", "workers", "hosts", "versions", "weight", "ema"]


@pytest.mark.parametrize(
    ("transports", "shown"),
    [
        (["messages"] * 9, "messages"),
        (["shared memory"] * 4 + ["messages"] * 5, "shared memory: 0–3; messages: 4–8"),
        (["a", "b", "a", "a"], "a: 0, 2–3; b: 1"),
        (["a", "b"] * 50, f"a: {', '.join(str(n) for n in range(0, 24, 2))} …; b: "),
    ],
)
def test_transports_are_told_in_few_words(tmp_path, transports, shown):
    header = replace(TOLD, transports=transports)
    facts = dict(row.split(" ", 1) for row in rows(facts_card(told(tmp_path / "record", header=header), "")))
    assert facts["transport"].startswith(shown)


def test_samples_per_core_second_need_the_cores(tmp_path):
    run = told(tmp_path / "record", header=TOLD)
    assert run.rate_per_core == pytest.approx(24 / 4.5 / 12)
    assert "Samples per core-second 0.444" in plain(key_figures([run], [""]))
    for cores in (None, 0, -5):
        unknown = told(tmp_path / str(cores), header=replace(TOLD, cores=cores))
        shown = plain(key_figures([unknown], [""]))
        assert "core-second" not in shown and "Samples per rank-second 1.78" in shown
    assert "Samples per core-second 0.444 – Step" in plain(key_figures([run, unknown], ["A", "B"]))


def test_a_process_that_trains_alone_is_one_rank(tmp_path):
    alone = replace(TOLD, workers=1, hosts=["a"], transports=[])
    step = StepRecord(0, 0.0, 0.75, 1.0, 1, 1, [(0, 0, 0)], [], samples_used=8)
    end = replace(END, version=1, arrivals=[], handed=[8], used=[8], discarded=[0], lost=[0], requeued=[0])
    end = replace(end, peak_rss_bytes=[0, 5_000_000])
    run = told(tmp_path / "alone", [step], alone, end)
    assert run.rate_per_rank == run.rate == 8
    assert "Memory of the root 5 MB Ended" in plain(key_figures([run], [""]))
    with_root = told(tmp_path / "root", [step], replace(alone, transports=["messages"]), end)
    before = told(tmp_path / "before", [step], replace(HEADER, workers=1, hosts=["a"]), None)
    assert with_root.rate_per_rank == before.rate_per_rank == 4


# Accounts and memory.


def test_every_workers_account_is_shown_with_its_shares(tmp_path):
    card = accounts_card(told(tmp_path / "record"), "")
    assert rows(card) == [
        "worker host handed used discarded lost in flight",
        "all 72 24 33 % 32 44 % 8 11 % 8 11 %",
        "0 alpha 32 24 75 % 0 0 8 25 %",
        "1 beta 40 0 32 80 % 8 20 % 0",
    ]
    assert (
        "Of 72 samples handed to the loops 33 % were used, 44 % discarded, 11 % lost with workers that left or died, "
        "11 % in flight at the end. Gradients that got their verdict after the last step (1 late) are in these"
    ) in plain(card)


def test_requeued_samples_are_in_the_accounts(tmp_path):
    end = replace(END, handed=[32, 48], requeued=[0, 8])
    assert rows(accounts_card(told(tmp_path / "record", end=end), ""))[-1] == "1 beta 48 0 32 67 % 8 17 % 8 17 % 0"


def test_ends_of_before_have_no_requeued_samples_and_no_memory(tmp_path):
    run = told(tmp_path / "record", end=replace(END, requeued=[], peak_rss_bytes=[]))
    assert rows(accounts_card(run, ""))[-1] == "1 beta 40 0 32 80 % 8 20 % 0"
    assert "Memory" not in plain(key_figures([run], [""])) and rows(workers_table(run, ""))[1].endswith("–")


def test_accounts_of_very_many_workers_are_those_that_lost_most(tmp_path):
    workers = 1000
    used = [8 - worker % 8 for worker in range(workers)]
    nothing = [0] * workers
    left = [8 - n for n in used]
    end = replace(END, arrivals=[], handed=[8] * workers, used=used, discarded=left, lost=nothing, requeued=[])
    header = replace(HEADER, workers=workers, hosts=["a"] * workers)
    shown = rows(accounts_card(told(tmp_path / "record", header=header, end=end), ""))
    assert len(shown) == 202 and shown[1] == "all 8,000 4,500 56 % 3,500 44 %"
    assert {row.split()[0] for row in shown[2:127]} <= {str(n) for n in range(workers) if n % 8 >= 6}


def test_memory_is_shown_for_every_rank(tmp_path):
    run = told(tmp_path / "record")
    assert "Memory of the root 2.5 GB Memory of a worker, most 1.2 GB" in plain(key_figures([run], [""]))
    assert [row.rsplit(" ", 2)[1:] for row in rows(workers_table(run, ""))[1:]] == [["1.2", "GB"], ["900", "MB"]]


# By cost.


def judged(path, cost, verdict, header=HEADER, **columns):
    """A run of one worker whose gradients, a step each, cost this and were judged so."""
    steps = []
    for number, (one, outcome) in enumerate(zip(cost, verdict, strict=True)):
        more = {name: values[number] for name, values in columns.items()}
        came = ArrivalRecord(0, number, number, outcome, 0.5, samples=more.pop("samples", 4), cost=one, **more)
        accepted = [(0, number, number)] if outcome == "accepted" else []
        steps.append(StepRecord(number, number, number + 0.75, number + 1, 1, 1, accepted, [came]))
    header = replace(header, workers=1, hosts=["a"])
    return figures(read_run(write(path, steps, header)))


def test_classes_of_cost_reach_from_a_power_of_two_to_the_next(tmp_path):
    cost = [64.0, 127.5, 128.0, 0.75, 0.0, -3.0, None, math.nan, 1e-40]
    verdict = ["accepted", "late", "rejected", *["accepted"] * 6]
    found = judged(tmp_path / "record", cost, verdict).selection
    assert found.classes.tolist() == [NO_COST, -133, -1, 6, 7]
    assert found.used.tolist() == [8, 4, 4, 4, 0] and found.dropped.tolist() == [0, 0, 0, 4, 4]
    assert found.is_small.all() and found.groups == [] and found.p == 1.0 and not found.is_biased
    card = selection_card(judged(tmp_path / "again", cost, verdict), "")
    assert rows(card)[1] == "0 or less 8 0 0 %" and rows(card)[-1] == "128 to 256 0 4 100 %"
    assert "Too little was dropped, or kept, to tell whether cost makes a difference." in plain(card)


def test_records_without_costs_say_nothing_of_them(tmp_path):
    run = told(tmp_path / "record")
    assert run.selection is None and "by cost" not in page([run.run])
    with_costs = judged(tmp_path / "costs", [1.0], ["accepted"])
    shown = plain(page([run.run, with_costs.run]))
    assert "Samples by cost A Not known: no gradient says what its batch costs. B Nothing was dropped." in shown


def test_a_biased_selection_is_told_and_where(tmp_path):
    cost = [40.0, 100.0, 700.0] * 100
    verdict = ["accepted", "accepted", "late"] * 40 + ["accepted"] * 180
    run = judged(tmp_path / "record", cost, verdict)
    assert [(group.counted, group.dropped) for group in run.selection.groups] == [(100, 0), (100, 0), (60, 40)]
    # By hand: 100 of each expected to have 40/3 dropped and 260/3 counted.
    by_hand = 2 * (40 / 3) ** 2 / (40 / 3) + (80 / 3) ** 2 / (40 / 3) + (2 * (40 / 3) ** 2 + (80 / 3) ** 2) / (260 / 3)
    assert run.selection.chi_square == pytest.approx(by_hand)
    sentence = (
        "What counts is biased by cost: of gradients that cost 512 to 1,024, 40 % were dropped, of those that cost "
        "32 to 64, 0 % (χ² test that all costs are dropped alike: χ² = 92.3, 2 degrees of freedom, p < 10⁻¹²)."
    )
    assert plain(bias(run.selection)) == sentence
    assert sentence in plain(" ".join(summary(run)))


def test_a_fair_selection_is_not_called_biased(tmp_path):
    cost = [40.0, 100.0, 700.0, 700.0] * 50
    run = judged(tmp_path / "record", cost, (["late"] * 4 + ["accepted"] * 16) * 10)
    assert run.selection.chi_square == 0 and run.selection.p == 1
    assert "Cost makes no difference beyond chance to what is dropped (χ² test" in plain(bias(run.selection))
    assert "cost" not in plain(" ".join(summary(run)))


def test_small_classes_are_tested_with_their_neighbours(tmp_path):
    cost = [1.0] * 3 + [2.0] * 60 + [4.0] * 60 + [8.0] * 2
    verdict = ["late", "accepted"] * 62 + ["late"]
    groups = judged(tmp_path / "record", cost, verdict).selection.groups
    assert [(group.first, group.last) for group in groups] == [(0, 1), (2, 3)]
    assert sum(group.counted for group in groups) == 62 and sum(group.dropped for group in groups) == 63


def test_chance_alone_is_called_bias_as_rarely_as_the_test_says(tmp_path):
    # 2,000 draws: a share of 5 % has a standard error of 0.5 %, and 2 % are 4 of those.
    rng = np.random.default_rng(5)
    run = judged(tmp_path / "record", [1.0] * 300, ["accepted"] * 300).run
    p = []
    for _ in range(2000):
        run.gradients["cost"] = rng.lognormal(5, 0.7, 300)
        run.gradients["counted"] = rng.random(300) > 0.2
        p.append(select(run).p)
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.02)
    assert np.mean(np.array(p) < 0.5) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(2000) + 0.02)


@pytest.mark.parametrize(
    ("value", "freedom", "tail"),
    # From tables, and for two degrees exp(-x/2).
    [(2.706, 1, 0.1), (6.635, 1, 0.01), (9.21, 2, 0.01), (16.266, 3, 1e-3), (4.351, 5, 0.5), (29.588, 10, 1e-3),
     (124.342, 100, 0.05), (80.0, 2, math.exp(-40)), (0.0, 7, 1.0), (1e6, 3, 0.0)],
)  # fmt: skip
def test_the_tail_of_chi_square(value, freedom, tail):
    assert chi_square_tail(value, freedom) == pytest.approx(tail, rel=2e-3, abs=1e-300)


@pytest.mark.parametrize("on_late", ["retry", "requeue"])
def test_batches_that_are_computed_again_are_not_dropped(tmp_path, on_late):
    header = replace(HEADER, settings={"on_late": on_late, "late_limit": 2})
    verdict = ["late", "late", "accepted", "rejected", "late", "accepted"]
    run = judged(tmp_path / "record", [1.0] * 6, verdict, header)
    found = run.selection
    assert (found.used.tolist(), found.dropped.tolist(), found.again.tolist()) == ([8], [4], [12])
    assert "computed again" in rows(selection_card(run, ""))[0]
    assert "3 came too late and were computed again" in plain(" ".join(summary(run)))


def test_a_batch_that_was_tried_too_often_is_dropped(tmp_path):
    header = replace(HEADER, settings={"on_late": "retry", "late_limit": 2})
    # The third in a row is given up; the fourth is another batch's first.
    verdict = ["late"] * 4 + ["accepted"] + ["late"] * 3 + ["rejected"] + ["late"] * 2
    found = judged(tmp_path / "record", [1.0] * 11, verdict, header).selection
    assert (found.used.tolist(), found.dropped.tolist(), found.again.tolist()) == ([4], [12], [28])


def test_late_gradients_that_were_added_to_accepted_ones_counted(tmp_path):
    header = replace(HEADER, settings={"on_late": "carry", "late_limit": 3})
    run = judged(
        tmp_path / "record", [1.0, 2.0, 4.0, 8.0], ["late", "late", "accepted", "late"], header,
        carried=[None, [0], [0, 1], None], samples=[3, 3 + 5, 3 + 5 + 7, 9],
    )  # fmt: skip
    assert run.run.gradients["own_samples"].tolist() == [3, 5, 7, 9]
    assert run.run.gradients["counted"].tolist() == [True, True, True, False]
    assert run.selection.used.tolist() == [3, 5, 7, 0] and run.selection.dropped.tolist() == [0, 0, 0, 9]
    text = plain(" ".join(summary(run)))
    assert "75 % of 4 gradients counted; 3 came too late and were discarded but for 2 that were added to later" in text
    assert run.travelled_bytes == (0, 0) and run.verdicts.tolist() == [[1], [3], [0]]


def test_what_is_carried_from_steps_that_are_not_shown_is_no_crash(tmp_path):
    run = judged(tmp_path / "record", [1.0, 1.0], ["late", "accepted"], carried=[[7], [5, 0]], samples=[4, 8])
    assert run.run.gradients["counted"].all() and run.run.gradients["own_samples"].tolist() == [4, 4]
