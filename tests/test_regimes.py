"""Changes of speed: found at their step and with their size, and none where there is none; who is slow against whom."""

import json
import re

import numpy as np
import pytest
from test_observed import record, run

from mpisync.commands.main import main
from mpisync.planning.advice import FEWEST_STEPS, advise
from mpisync.planning.composite import Composite, chen2016
from mpisync.planning.diagnosis import LEVEL, diagnose
from mpisync.planning.laws import Exponential, Lognormal, Pareto
from mpisync.planning.observed import observe, read_times
from mpisync.planning.regimes import find_regimes
from mpisync.policies import BackupWorkers


def rng(seed=0):
    return np.random.default_rng(seed)


def drawn(seed=0, steps=300, workers=10, sigma=0.1):
    return rng(seed).lognormal(np.log(0.25), sigma, (steps, workers))


def found_in(times):
    return find_regimes(times, fewest=FEWEST_STEPS)


def changes_of(found):
    return [(one.start, one.stop, one.columns) for one in found.changes]


def autoregressive(seed, phi, steps=300, workers=8):
    noise = rng(seed).standard_normal((steps, workers))
    for t in range(1, steps):
        noise[t] += phi * noise[t - 1]
    return np.exp(0.1 * noise)


def bimodal(seed, share):
    return np.where(rng(seed).random((300, 8)) < share, 3.0, 1.0) * rng(seed + 1000).lognormal(0, 0.05, (300, 8))


# No change.


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(drawn, id="lognormal"),
        pytest.param(lambda seed: drawn(seed, 30, 32), id="few steps, many workers"),
        pytest.param(lambda seed: Pareto(1.0, 1.2).sample(rng(seed), 300, 8), id="Pareto"),
        pytest.param(lambda seed: Exponential(1.0).sample(rng(seed), 1000, 4), id="exponential"),
        pytest.param(lambda seed: chen2016().sample(rng(seed), 300, 50), id="straggler study"),
        pytest.param(lambda seed: Composite(1.0, 0.1, step_sigma=0.2).sample(rng(seed), 300, 8), id="common"),
        pytest.param(lambda seed: Composite(1.0, 0.1, rank_sigma=0.2).sample(rng(seed), 300, 8), id="machines"),
        pytest.param(lambda seed: bimodal(seed, 0.5), id="bimodal"),
        pytest.param(lambda seed: bimodal(seed, 0.1), id="rarely slow"),
        pytest.param(lambda seed: autoregressive(seed, 0.3), id="autoregressive"),
        pytest.param(lambda seed: drawn(seed, 300, 2), id="two workers"),
    ],
)
def test_where_nothing_changes_nothing_is_found(draw):
    found = [found_in(draw(seed)) for seed in range(60)]
    # At a level of 1 %, 4 or more of 60 have probability 0.003.
    assert sum(bool(one.changes or one.drift or one.switching) for one in found) <= 3
    assert sum((one.start, one.stop) != (0, len(draw(0))) for one in found) <= 3


@pytest.mark.parametrize("phi, steps", [(0.7, 300), (0.8, 300), (0.6, 60)])
def test_times_that_wander_are_seldom_said_to_change(phi, steps):
    found = [found_in(autoregressive(seed, phi, steps)) for seed in range(60)]
    assert sum(bool(one.changes or one.drift or one.switching) for one in found) <= 6


def test_workers_that_stay_at_each_of_two_speeds_for_ten_steps_seldom_seem_to_change():
    def draw(seed):
        is_slow = (rng(seed).random((300, 8)) < 0.1).cumsum(axis=0) % 2
        return np.where(is_slow, 3.0, 1.0) * rng(seed + 1000).lognormal(0, 0.05, (300, 8))

    assert sum(bool(found_in(draw(seed)).changes) for seed in range(60)) <= 15


def test_the_stated_level_holds_for_the_scan_itself():
    """Of one worker's independent times, 1 % of 1000 runs: 10, and 20 or more with probability 0.003."""
    assert LEVEL == 0.01
    assert sum(bool(found_in(drawn(seed, 60, 1)).changes) for seed in range(1000)) <= 19


# Changes.


@pytest.mark.parametrize("steps, sigma", [(300, 0.1), (300, 0.4), (100, 0.1), (60, 0.1)])
def test_two_workers_that_become_slow_are_named_with_step_and_size(steps, sigma):
    for seed in range(5):
        times, at = drawn(seed, steps, sigma=sigma), steps * 8 // 10
        times[at:, 3] *= 3
        times[at:, 7] *= 4
        found = found_in(times)
        (one,) = found.changes
        assert abs(one.start - at) <= 1 and one.stop is None and one.columns == [3, 7]
        assert one.ratios == pytest.approx([3, 4], rel=0.3 if sigma > 0.1 else 0.12)
        enough = steps - one.start >= FEWEST_STEPS
        assert (found.start, found.stop) == ((one.start, steps) if enough else (0, one.start))


def test_all_kinds_of_changes():
    for seed in range(5):
        times = drawn(seed)
        times[150:, 2] *= 0.5
        assert changes_of(found_in(times)) == [(150, None, [2])]  # faster
        times = drawn(seed)
        times[200:] *= 1.4
        (one,) = found_in(times).changes
        assert one.start == pytest.approx(200, abs=2) and one.columns == list(range(10))  # all
        times = drawn(seed)
        times[100:, 1] *= 2
        times[220:, 4] *= 2
        assert changes_of(found_in(times)) == [(100, None, [1]), (220, None, [4])]
        times[220:, 4] /= 2
        times[220:, 1] *= 2
        assert changes_of(found_in(times)) == [(100, None, [1]), (220, None, [1])]
        assert found_in(times).start == 220
        times = drawn(seed)
        times[100:200, 1] *= 2  # long: there are two changes, and none of the speeds is the usual one
        assert changes_of(found_in(times)) == [(100, None, [1]), (200, None, [1])]
        times = drawn(seed, workers=2)
        times[200:, 0] *= 2
        assert changes_of(found_in(times)) == [(200, None, [0])]


def test_a_slow_stretch_is_an_episode_and_the_advice_is_for_all():
    for seed in range(5):
        times = drawn(seed)
        times[120:134, 5] *= 4
        found = found_in(times)
        assert changes_of(found) == [(120, 134, [5])] and (found.start, found.stop) == (0, 300)
        assert found.changes[0].ratios == pytest.approx([4], rel=0.1)
        times = drawn(seed)
        times[100:120] *= 2
        assert changes_of(found_in(times)) == [(100, 120, list(range(10)))]


def test_at_the_end_an_episode_cannot_be_told_from_a_change_and_is_said_so():
    times = drawn()
    times[286:, 5] *= 4
    found = advise(observe(times))
    assert changes_of(found.regimes) == [(286, None, [5])] and len(found.observed.times_s) == 286
    reasons = " ".join(found.reasons)
    assert re.search(r"From step 286 on worker 5 takes (3\.|4\.)\d+ times as long as before\.", reasons)
    assert "there are 14 steps, and 20 are needed: the advice is for steps 0 to 285" in reasons
    assert found.headline.endswith("That is for steps 0 to 285, before the last change.")


def test_little_by_little_is_a_drift_and_no_change():
    for seed, steps in [(0, 300), (1, 300), (2, 60), (3, 1000)]:
        times = drawn(seed, steps)
        times[:, 6] *= np.linspace(1, 2, steps)
        found = found_in(times)
        assert list(found.drift) == [6] and found.drift[6] == pytest.approx(2, rel=0.12) and not found.changes
    reasons = " ".join(advise(observe(times)).reasons)
    assert "Worker 6 changes speed little by little: at the end a gradient takes" in reasons


def test_a_worker_that_switches_again_and_again_has_no_changes():
    times = drawn(steps=600)
    times[(np.arange(600) // 50) % 2 == 1, 4] *= 3
    found = advise(observe(times))
    assert found.regimes.switching == [4] and not found.regimes.changes and len(found.observed.times_s) == 600
    assert any("Worker 4 switches between speeds again and again" in reason for reason in found.reasons)


def test_many_changes_leave_no_regime():
    times = drawn(steps=600)
    for c in range(6):
        times[90 * (c + 1) :, c] *= 3
    found = advise(observe(times))
    assert len(found.regimes.changes) == 6 and len(found.observed.times_s) == 600
    assert any("The advice is for all steps, since speeds change too often" in reason for reason in found.reasons)


# The advice.


def test_the_advice_is_for_what_holds_now():
    times = drawn()
    times[240:, [3, 7]] = rng(1).uniform(0.75, 1.0, (60, 2))
    found = advise(observe(times))
    assert found.verdict == "rebalance" and "exclude workers 3, 7: they take 3." in found.headline
    assert found.headline.endswith("That is since step 240, when speeds changed.")
    assert re.match(r"From step 240 on workers 3, 7 take 3\.\d+ times as long as before\.", found.reasons[0])
    assert "the 60 steps from 240 on" in found.reasons[1]
    # The other way round nobody is slow now.
    found = advise(observe(times[::-1]))
    assert found.verdict != "rebalance" and not found.straggling.slow and len(found.observed.times_s) == 240


def test_a_record_has_its_versions_named_and_gaps_filled_from_the_same_regime(tmp_path, capsys):
    table = rng(0).lognormal(np.log(0.2), 0.05, (6, 400))

    def delay(worker, sequence):
        return float(table[worker, sequence]) * (4 if worker == 2 and sequence >= 200 else 1)

    steps = run(delay, workers=6, steps=290, policy=BackupWorkers(1))
    changed = next(one.version for step in steps for one in step.arrivals if one.worker == 2 and one.sequence == 200)
    path = record(tmp_path, steps, workers=6)
    advice = advise(read_times(path))
    (one,) = advice.regimes.changes
    assert advice.whole.step_numbers[one.start] == changed and one.columns == [2]
    assert one.ratios == pytest.approx([4], rel=0.1)
    # Worker 2 is missing in most steps since then: none is filled with what it took before.
    now = advice.observed
    assert 0 < now.measured[:, 2].mean() < 0.7 and now.times_s[:, 2].min() > 0.6
    assert [one.column for one in advice.straggling.slow] == [2]
    assert main(["plan", path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["changes"] == [{"from": changed, "to": None, "workers": [2], "ratios": one.ratios}]
    assert (found["first_step"], found["steps"]) == (changed, len(now.times_s))
    assert main(["plan", path, "--workers", "5", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert any(f"From step {changed} on worker 2 on node2 takes" in note for note in notes)


def test_changes_are_named_by_the_tables_steps_and_workers(tmp_path, capsys):
    times = drawn(workers=4)
    times[240:, 1] *= 3
    path, plot = tmp_path / "times.csv", tmp_path / "plan.svg"
    rows = [f"{10 * t},{host},{x:.4f}" for t, row in enumerate(times) for host, x in zip("dbca", row, strict=True)]
    path.write_text("step,host,seconds\n" + "\n".join(rows) + "\n")
    assert main(["plan", str(path), "--plot", str(plot)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Read as a line a gradient: step in column 1 ('step'), 4 workers in column 2 ('host')" in text
    assert "From step 2400 on worker 1 on b takes" in text and "the 60 steps from 2400 on" in text
    assert "From 300 steps of 4 workers" in text and b">change<" in plot.read_bytes()


# Groups.


@pytest.mark.parametrize("slow", [1, 3, 5, 6, 7, 8])
def test_slow_groups_are_held_against_the_fast(slow):
    times = rng().lognormal(np.log(0.058), 0.05, (100, 10))
    times[:, :slow] *= 4.3
    found = diagnose(times)
    assert sorted(one.column for one in found.slow) == list(range(slow))
    assert all(one.ratio == pytest.approx(4.3, rel=0.04) for one in found.slow)
    headline = advise(observe(times)).headline
    assert "times as long" in headline and ("exclude worker" in headline) == (slow <= 5)
    if slow > 5:
        assert f"are fast, and the other {slow} take 4." in headline


def test_groups_of_three_workers_and_of_several_speeds():
    times = rng().lognormal(0, 0.05, (100, 3)) * [1, 3, 3]
    assert sorted(one.column for one in diagnose(times).slow) == [1, 2]
    times = rng().lognormal(0, 0.05, (100, 9)) * np.repeat([1, 2, 5], 3)
    found = {one.column: one.ratio for one in diagnose(times).slow}
    assert list(found.values()) == pytest.approx([5] * 3 + [2] * 3, rel=0.05)
    # One that is fast is an exception, not the measure of the others.
    times = rng().lognormal(0, 0.05, (100, 10)) * ([0.25] + [1] * 9)
    assert diagnose(times).slow == []


def test_workers_that_switch_at_random_are_no_group():
    for seed in range(20):
        assert diagnose(bimodal(seed, 0.5)).slow == []
        assert diagnose(Lognormal(1.0, 0.5).sample(rng(seed), 30, 6)).slow == []
