"""`mpisync plan`: the answer to "how many backups", in every regime and from bad input."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from test_observed import record, run

from mpisync.commands.main import main
from mpisync.planning.advice import FEWEST_STEPS, advise
from mpisync.planning.composite import Composite, chen2016
from mpisync.planning.efficiency import Efficiency, fit_iterations
from mpisync.planning.laws import Lognormal
from mpisync.planning.observed import observe, read_times
from mpisync.planning.simulation import simulate
from mpisync.planning.trials import decisions, try_policies
from mpisync.policies import Adaptive, BackupWorkers

TRACE = "tests/data/bytedance_SE_dp_compute_seconds_42x32.csv"
PAPER = ["--iterations", "50:137500", "--iterations", "100:76200"]


@pytest.fixture(scope="module")
def trace(request):
    return str(request.config.rootpath / TRACE)


def drawn(law, steps=100, workers=8, seed=0):
    return observe(law.sample(np.random.default_rng(seed), steps, workers))


def plan(capsys, *arguments, code=0):
    assert main(["plan", *map(str, arguments)]) == code
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def planned(capsys, *arguments, code=0):
    (line,) = plan(capsys, *arguments, "--json", code=code).splitlines()

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(line, parse_constant=refuse)


def words(text):
    return " ".join(text.split())


# The regimes.


def test_the_papers_study_chooses_what_the_paper_chose(capsys):
    found = planned(capsys, "--workers", 100, "--delay", "chen2016", *PAPER)
    assert found["verdict"] == "use" and 90 <= found["accepted"] <= 96 and found["backup"] == 100 - found["accepted"]
    assert found["efficiency"]["noise"] == pytest.approx(411, abs=1)
    # Were late workers stopped at once, as the paper's measure supposes.
    stopped = planned(capsys, "--workers", 100, "--delay", "chen2016", *PAPER, "--stale")
    assert 90 <= stopped["accepted"] <= 96
    cost = {one["accepted"]: one["stopped_s"] * (1 + 411 / one["accepted"]) for one in stopped["choices"]}
    assert max(cost[n] for n in range(90, 97)) < 1.025 * min(cost.values())  # flat from 90 to 96


def test_the_trace_gains_little_and_is_told_so(capsys, trace):
    found = planned(capsys, trace, "--stale")
    assert found["verdict"] == "little" and found["accepted"] in (30, 31)
    gains = {one["accepted"]: one["gain"] for one in found["choices"]}
    assert max(gains, key=gains.get) in (30, 31)
    assert gains[30] == pytest.approx(1.0354, abs=2e-4) and gains[31] == pytest.approx(1.0347, abs=2e-4)
    assert found["straggling"]["slowest_over_mean"] == pytest.approx(1.26, abs=0.005)
    discarded = next(one["discarded"] for one in found["choices"] if one["backup"] == 2)
    assert discarded == pytest.approx(0.076, abs=0.001)  # with 2/32 = 6.25 % of the gradients
    # Late workers that finish their gradients leave a little less, and the answer is the same.
    finished = planned(capsys, trace)
    assert finished["verdict"] == "little" and finished["accepted"] in (30, 31)
    assert 1.02 < finished["chosen"]["gain"] < 1.035 < finished["chosen"]["high"]
    assert "Backups gain little here" in finished["headline"]
    assert any("batches of unequal cost" in reason for reason in finished["reasons"])


@pytest.mark.parametrize("workers, slow", [(4, 0), (8, 5), (32, 31)])
def test_one_persistently_slow_worker_is_to_be_rebalanced_or_excluded(workers, slow):
    times = Lognormal(0.4, 0.03).sample(np.random.default_rng(1), 60, workers)
    times[:, slow] *= 2.36
    found = advise(observe(times))
    assert found.verdict == "rebalance" and found.backup == 0
    assert f"Rebalance or exclude worker {slow}" in found.headline and "discard its work for ever" in found.headline
    ratio = found.straggling.slow[0].ratio
    assert ratio == pytest.approx(2.36, rel=0.05) and f"{ratio:.2f} times as long as the others" in found.headline
    # Rebalanced, all samples count and nobody waits long: at least as good as leaving it out.
    assert found.remedies.rebalanced > found.remedies.excluded > 1.4
    assert found.choices.best.backup == 1


def test_of_two_workers_one_may_be_slow():
    times = Lognormal(0.4, 0.03).sample(np.random.default_rng(1), 60, 2) * [1.0, 2.36]
    found = advise(observe(times))
    assert found.verdict == "rebalance" and "exclude worker 1" in found.headline


def test_several_slow_workers_are_named_and_the_others_judged_alone():
    times = Lognormal(0.4, 0.03).sample(np.random.default_rng(1), 60, 12)
    times[:, [3, 7]] *= 1.8
    found = advise(observe(times))
    assert found.verdict == "rebalance" and found.choices.best.backup == 2
    assert "workers " in found.headline and "3" in found.headline and "7" in found.headline
    assert "on 2 machines fewer" in found.headline and "The other 10 workers alone need no backups." in found.reasons


def test_machines_of_different_speed_want_batches_in_proportion():
    found = advise(drawn(Composite(0.4, sigma=0.02, rank_sigma=0.08), steps=80, workers=12))
    assert found.verdict == "rebalance" and found.headline.startswith("Rebalance: the workers differ in speed")
    assert found.remedies.rebalanced > 1.05 and not found.straggling.slow


def test_no_stragglers_no_backups():
    found = advise(drawn(Lognormal(0.4, 0.003)))
    assert (found.verdict, found.backup) == ("nothing", 0)
    assert found.headline.startswith("b = 0: the workers are alike")
    assert advise(observe(np.full((50, 4), 0.25))).backup == 0


def test_heavy_clustered_tails_want_backups():
    found = advise(drawn(chen2016(), steps=600, workers=100), Efficiency(411.0))
    assert found.verdict == "use" and 3 <= found.backup <= 10
    assert f"--policy backup:{found.backup}" in found.headline
    assert any("Slowness clusters" in reason for reason in found.reasons)


def test_three_steps_are_declined_with_what_it_needs(capsys, tmp_path):
    path = tmp_path / "times.csv"
    path.write_text("6,6,9\n6,7,6\n8,6,6\n")
    found = planned(capsys, path, code=1)
    assert found["verdict"] == "declined" and found["backup"] is None and found["choices"] == []
    assert "3 steps are too few to tell: at least 20 are needed, and 200 are good" in found["headline"]
    assert "27 minutes" in found["headline"]  # 200 steps of 8 s
    text = plan(capsys, path, code=1)
    assert text.startswith("3 steps are too few to tell") and "the slowest of a step 1.20 times as long" in words(text)
    path.write_text("6,6,9\n")
    assert "1 step is too few" in planned(capsys, path, code=1)["headline"]


def test_one_worker_waits_for_nobody(capsys, tmp_path):
    path = tmp_path / "times.csv"
    np.savetxt(path, np.random.default_rng(0).lognormal(0, 0.1, 50))
    assert "one worker, which waits for nobody" in plan(capsys, path, code=1)
    assert "one worker" in planned(capsys, "--workers", 1, "--delay", "exponential:mean=1", code=1)["headline"]


def test_few_steps_of_a_heavy_tail_leave_it_open_and_say_how_many_would_tell():
    times = np.random.default_rng(5).exponential(1.0, (FEWEST_STEPS, 4))
    found = advise(observe(times))
    assert found.verdict == "unsure" and found.backup == 0 and found.choices.best.low < 1 < found.choices.best.gain
    assert "steps would tell" in found.headline


def test_what_pays_only_with_little_noise_is_said_with_the_limit():
    observed = drawn(Lognormal(0.4, 0.1), workers=4)
    found = advise(observed)
    limit = found.choices.options[1].pays_below
    assert found.backup == 0 and f"only where the noise scale is below {limit:.3g} gradients" in found.headline
    below = advise(observed, Efficiency(0.5 * limit))
    assert below.backup > 0 and below.choices.best.gain > 1.01


def test_a_noise_that_is_known_decides_between_gaining_steps_and_losing_samples():
    observed = drawn(Lognormal(1.0, 0.5), steps=300, workers=16)
    chosen = [advise(observed, Efficiency(noise)).choices.best.backup for noise in (1.0, 30.0, np.inf)]
    assert chosen[0] > chosen[1] >= chosen[2] > 0


def test_a_regime_that_changes_is_noticed():
    first = Lognormal(1.0, 0.02).sample(np.random.default_rng(0), 100, 16)
    heavy = Composite(1.0, 0.02, event_a=3, event_b=30, event_scale_s=4.0, event_alpha=3.0)
    second = heavy.sample(np.random.default_rng(1), 100, 16)
    changing = advise(observe(np.concatenate([first, second])))
    assert any("`Adaptive` follows such changes" in reason for reason in changing.reasons)
    for seed in range(10):
        steady = advise(observe(heavy.sample(np.random.default_rng(seed), 60, 16)))
        assert not any("Adaptive" in reason for reason in steady.reasons)


# A run's record.


def delays(seed=0, events=0.05):
    rng = np.random.default_rng(seed)
    table = rng.lognormal(np.log(0.2), 0.05, (4, 500))
    table[rng.random(table.shape) < events] *= 8
    return lambda worker, sequence: float(table[worker, sequence % 500])


def test_a_record_is_planned_and_the_model_held_against_its_own_steps(capsys, tmp_path):
    path = record(tmp_path, run(delays(), workers=4, steps=250, latency=0.002, publish=0.01), workers=4)
    found = planned(capsys, path)
    assert found["overhead_s"] == pytest.approx(0.012, abs=1e-3)
    assert found["workers"] == 4 and found["numbers"] == [0, 1, 2, 3]
    assert found["verdict"] == "use" and found["backup"] == 1 and found["chosen"]["gain"] > 1.1
    (check,) = [reason for reason in found["reasons"] if "The run's own steps (backup:1)" in reason]
    assert "They differ" not in check
    text = words(plan(capsys, path))
    assert text.startswith("Use b = 1 (N = 3 of 4)") and "node3" in text and "A step includes" in text


def test_a_record_with_norms_tells_the_noise(capsys, tmp_path):
    steps = run(delays(), workers=4, steps=60)
    k, noise = 3, 5.0  # ‖ḡ‖² = 1 + 5/3, Σ‖g‖² = 3·(1 + 5)
    steps = [replace(step, norms=(k * (1 + noise), 1 + noise / k)) for step in steps]
    found = planned(capsys, record(tmp_path, steps, workers=4))
    assert found["efficiency"]["noise"] == pytest.approx(5.0)
    assert found["efficiency"]["source"] == "gradient norms of 60 steps"
    assert planned(capsys, record(tmp_path, steps, workers=4, name="b"), "--noise-scale", 2)["efficiency"]["noise"] == 2


def test_torn_gapped_and_wrong_records_are_used_as_far_as_they_go(capsys, tmp_path):
    steps = run(delays(), workers=4, steps=100)
    wrong = [replace(one, compute_s=float("nan")) for one in steps[7].arrivals]
    steps[7] = replace(steps[7], arrivals=wrong)
    path = record(tmp_path, steps, workers=4)
    with open(path, "rb+") as file:
        file.truncate(file.seek(0, 2) - 10)
    found = planned(capsys, path)
    assert found["steps"] in (98, 99) and found["missing"] > 3 and found["backup"] is not None
    notes = " ".join(found["notes"])
    assert "is torn and was dropped" in notes and "times are missing" in notes


def test_other_numbers_of_workers_than_the_runs(capsys, tmp_path):
    path = record(tmp_path, run(delays(), workers=4, steps=250), workers=4)
    more = planned(capsys, path, "--workers", 200)
    assert more["workers"] == 200 and more["law"].startswith("composite:median=0.2")
    assert more["backup"] > 4 and any("by the law fitted to the 4 that were measured" in note for note in more["notes"])
    fewer = planned(capsys, path, "--workers", 3)
    assert fewer["workers"] == 3 and fewer["law"].startswith("empirical:")
    assert any("3 of the 4 workers" in note for note in fewer["notes"])
    same = planned(capsys, path, "--workers", 4)
    assert same["law"] is None


def falling(steps, losses):
    """Give the steps' gradients these losses."""
    return [
        replace(step, arrivals=[replace(one, loss=loss) for one in step.arrivals])
        for step, loss in zip(steps, losses, strict=True)
    ]


def test_runs_at_several_n_tell_how_many_updates_a_target_takes(capsys, tmp_path):
    paths = []
    for backup, reached in [(0, 60), (2, 110)]:  # J(4) = 60, J(2) = 110: J = 10·(1 + 20/N)
        steps = run(delays(), workers=4, steps=160, policy=BackupWorkers(backup))
        steps = falling(steps, [1.0] * (reached - 20) + [0.1] * (180 - reached))
        paths.append(record(tmp_path, steps, workers=4, policy=f"backup:{backup}", name=f"{backup}.jsonl"))
    found = planned(capsys, paths[0], "--target-loss", 0.1001, "--runs", paths[1])
    assert found["efficiency"]["noise"] == pytest.approx(20) and found["efficiency"]["floor"] == pytest.approx(10)
    assert main(["plan", paths[0], "--target-loss", "0.01", "--runs", paths[1]]) == 1
    assert "did not reach a training loss of 0.01" in capsys.readouterr().err


# Laws.


def test_a_tail_without_a_mean_is_said(capsys):
    for stale in ([], ["--stale"]):
        arguments = ["--delay", "pareto:scale=1,alpha=0.4", "--workers", 8, "--steps", 200, *stale]
        found = planned(capsys, *arguments)
        assert found["backup"] > 2  # P-K+1 must exceed 2.5
        assert any("the mean time to the last 2 gradients is infinite" in reason for reason in found["reasons"])
        assert "nan" not in plan(capsys, *arguments)


def test_a_thousand_workers_of_a_law(capsys):
    found = planned(capsys, "--workers", 1000, "--delay", "lognormal:median=1.45,sigma=0.09", "--steps", 300)
    exact = Lognormal(1.45, 0.09).order_statistics_s(1000)
    for one in found["choices"]:
        assert one["stopped_s"] == pytest.approx(exact[one["accepted"] - 1])
        assert one["step_s"] >= exact[one["accepted"] - 1] * 0.99
    assert 5 < found["backup"] < 50 and found["fits"] == []


def test_the_same_seed_gives_the_same_plan_and_another_a_like_one(capsys):
    arguments = ["--workers", 20, "--delay", "exponential:mean=0.1", "--steps", 300]
    one, same, other = (planned(capsys, *arguments, "--seed", seed) for seed in (1, 1, 2))
    assert one == same != other
    assert one["chosen"]["gain"] == pytest.approx(other["chosen"]["gain"], rel=0.1)


# The command.


def test_the_text_has_the_answer_first_then_reasons_and_tables(capsys, trace):
    text = plan(capsys, trace)
    assert text.startswith("Backups gain little here: with b = 1 (N = 31 of 32)")
    for part in (
        "From 42 steps of 32 workers.",
        "How sure: b = 1 is between",
        "the dearest quarter 12% are discarded, of the cheapest 0%",
        "What each number of backups costs and gains",
        "The 8 slowest of 32 workers",
        "Laws of independent times, best first law",
    ):
        assert part in words(text)
    assert max(map(len, text.splitlines())) <= 100
    (advised,) = [line for line in text.splitlines() if line.endswith("advised")]
    assert advised.split()[:2] == ["1", "31"]


def test_a_terminal_gets_tables_by_rich(capsys, monkeypatch, trace):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "140")
    text = plan(capsys, trace)
    assert "advised" in text and "E[slowest] / measured" in text and "lognormal:median=6.06101" in text


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "either a run's record or table of times, or a law"),
        (["x.csv", "--delay", "chen2016"], "either a run's record"),
        (["--delay", "chen2016"], "--workers 100"),
        (["--delay", "chen", "--workers", "3"], "must be one of exponential"),
        (["--delay", "chen2016", "--workers", "0"], "--workers must be at least 1, not 0"),
        (["--delay", "chen2016", "--workers", "9", "--iterations", "3"], "must be N:J, as in 50:137500, not '3'"),
        (["--delay", "chen2016", "--workers", "9", "--iterations", "3:9"], "two different N"),
        (["--delay", "chen2016", "--workers", "9", "--iterations", "3:9", "--noise-scale", "1"], "give one of"),
        (["--delay", "chen2016", "--workers", "9", "--runs", "a.jsonl"], "--runs are for --target-loss"),
        (["--delay", "chen2016", "--workers", "9", "--noise-scale", "-1"], "must not be negative"),
        (["--delay", "chen2016", "--workers", "9", "--overhead", "-1"], "--overhead must be seconds from 0"),
        (["--delay", "chen2016", "--workers", "9", "--steps", "-1"], "--steps must be at least 1"),
        (["--delay", "chen2016", "--workers", "9", "--step", "it"], "name columns of a table, which --delay"),
        (["absent.csv"], "absent.csv"),
        (["--delay", "chen2016", "--workers", "9", "--plot", "x.gif"], "must end in .svg, .png or .pdf"),
    ],
)
def test_wrong_use_is_said_plainly(capsys, monkeypatch, tmp_path, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *arguments]) == 1
    printed = capsys.readouterr()
    assert said in printed.err and printed.out == "" and len(printed.err.splitlines()) == 1


def test_too_little_to_ask_of_other_numbers(capsys, tmp_path):
    path = tmp_path / "times.csv"
    path.write_text("1,2\n3,4\n")
    assert main(["plan", str(path), "--workers", "100"]) == 1
    assert "20 steps of 2 workers at least are needed to say what 100 workers would do" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["svg", pytest.param("png", marks=pytest.mark.long)])
def test_plots_are_drawn_and_are_the_same_again(capsys, tmp_path, trace, ending):
    paths = [tmp_path / f"{name}.{ending}" for name in "ab"]
    for path in paths:
        assert f"plotted in {path}" in plan(capsys, trace, "--plot", path)
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    if ending == "svg":
        for text in (b"Waiting for the k-th gradient", b"backup workers b", b"gain (%)", b"time in the step (s)",
                     b"Error against time (a model", b"What Adaptive decided with these delays"):
            assert text in first


def test_policies_are_tried_on_the_plans_own_delays():
    """One of 8 takes 3 s for 1 s: who does without it is three times as soon, but for the noise of 7 for 8."""
    times = np.random.default_rng(0).lognormal(0.0, 0.01, (60, 8)) * [1, 1, 1, 1, 1, 1, 1, 3]
    trials = try_policies(advise(observe(times), Efficiency(4.0)))
    sooner = {one.policy: one.sooner for one in trials.each}
    assert sooner["backup:0"] == 1.0 and (trials.noise, trials.is_assumed) == (4.0, False)
    assert 2.4 < sooner["backup:1"] < 3.1 and 2.4 < sooner["adaptive"] < 3.1
    for one in trials.each:
        assert len(one.times_s) == len(one.errors) and one.errors[0] == pytest.approx(1.0) and one.errors[-1] < 0.5
    assert try_policies(advise(observe(times))).is_assumed
    assert try_policies(advise(observe(times[:3]))) is None


def test_adaptives_own_decisions_are_shown_where_the_run_had_some(tmp_path):
    times = np.random.default_rng(0).lognormal(0.0, 0.02, (80, 5))
    times[40:, 4] *= 3
    steps = list(simulate(Adaptive(noise_scale=9.0), times, steps=80))
    own = decisions(advise(read_times(record(tmp_path, steps, workers=5, policy="adaptive:noise_scale=9"))))
    assert own.is_own and [step.why for step in own.steps] == [step.why for step in steps]
    played = decisions(advise(observe(times), Efficiency(9.0)))
    assert not played.is_own and [step.target for step in played.steps] == [step.target for step in steps]


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (25, 2), pytest.param((30, 500), marks=pytest.mark.long)])
def test_plots_of_any_size(capsys, tmp_path, shape):
    path, plot = tmp_path / "times.csv", tmp_path / "plan.png"
    np.savetxt(path, np.random.default_rng(0).lognormal(0, 0.3, shape), delimiter=",")
    plan(capsys, path, "--plot", plot, code=int(shape[0] < 20))
    assert plot.read_bytes().startswith(b"\x89PNG")


BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
from mpisync.commands.main import main
sys.exit(main({arguments!r}))
"""


def blocked(names, arguments):
    code = BLOCK.format(blocked=set(names), arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_help_needs_none_of_what_planning_needs():
    found = blocked({"numpy", "scipy", "matplotlib", "rich", "mpi4py", "torch"}, ["plan", "--help"])
    assert found.returncode == 0 and "--delay LAW" in found.stdout, found.stderr


def test_without_scipy_or_matplotlib_it_says_what_to_install(trace, tmp_path):
    for name in ("scipy", "matplotlib"):
        found = blocked({name}, ["plan", trace, "--plot", str(tmp_path / "plan.png")])
        assert found.returncode == 1 and "pip install 'mpisync[report]'" in found.stderr
        assert "Traceback" not in found.stderr
    assert blocked({"mpi4py", "torch", "numba", "rich", "matplotlib"}, ["plan", trace]).returncode == 0


def test_numbers_that_json_lacks_are_text(capsys, trace):
    found = planned(capsys, trace)
    assert found["efficiency"]["noise"] == "inf" and found["remedies"]["data_share"] == "nan"
    assert found["format"] == 1 and len(found["discarded_by_worker"]) == 32


def test_the_fitted_efficiency_of_the_paper_is_what_the_command_uses(capsys):
    found = planned(capsys, "--workers", 50, "--delay", "chen2016", "--steps", 100, *PAPER)
    assert found["efficiency"]["floor"] == pytest.approx(fit_iterations([(50, 137500), (100, 76200)]).floor)


def test_advice_reads_what_a_table_says(trace):
    assert advise(read_times(trace)).observed.times_s.shape == (42, 32)
