"""Say how many backup workers to use, from a run's record, a table of times, or a delay law.

  mpisync plan run.jsonl                        of the run that Session(record="run.jsonl") recorded
  mpisync plan times.csv                        of seconds of compute: a line a step, a column a worker
  mpisync plan trace.csv --step it --worker host --seconds took      or a line a gradient
  mpisync plan run.jsonl --workers 100          what 100 workers like the run's would do
  mpisync plan --workers 1000 --delay lognormal:median=1.45,sigma=0.09

Give what is known of the gradients' noise, by --iterations or --noise-scale, if the record does not
hold it: how many updates a target takes decides whether fewer gradients in each are worth it.
Where too little is known to answer, it says what is needed and the exit code is 1.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpisync.planning.advice import Advice
    from mpisync.planning.efficiency import Efficiency
    from mpisync.planning.fitting import Fit
    from mpisync.planning.laws import DelayLaw, Seconds
    from mpisync.planning.observed import Observed

NAME = "plan"

_MOST_DRAWN = 5_000_000  # times of a law
_FEWEST_STEPS, _MOST_STEPS = 100, 2000  # drawn of it
_LONG_WORK = 3_000_000  # times, from which a bar is shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mpisync plan`."""
    parser.add_argument(
        "source", nargs="?", metavar="RUN",
        help="a run's record, or a table of seconds: a line a step and a column a worker, or a line a gradient (it "
        "says what it takes for what)",
    )
    parser.add_argument(
        "--delay", metavar="LAW",
        help="a delay law in place of measured times: exponential:mean=S, shifted:shift=S,excess=S, "
        "pareto:scale=S,alpha=A, lognormal:median=S,sigma=X, weibull:scale=S,shape=K, composite:median=S,..., "
        "chen2016 (that paper's straggler study), empirical:FILE.csv; times in seconds",
    )
    parser.add_argument("--workers", type=int, metavar="W", help="how many workers; the run's by default")
    for name, what in [("step", "the step"), ("worker", "the worker"), ("seconds", "the time")]:
        parser.add_argument(
            f"--{name}", metavar="COLUMN", help=f"the table's column of {what}, its name or number; guessed by default"
        )
    parser.add_argument(
        "--noise-scale", type=float, metavar="N_C", help="the noise scale in gradients: J(N) is as 1 + N_C/N"
    )
    parser.add_argument(
        "--iterations", action="append", default=[], metavar="N:J",
        help="updates J that a run with N gradients in each took to the target; give it for two N or more",
    )
    parser.add_argument(
        "--target-loss", type=float, metavar="LOSS",
        help="take the updates to this training loss from the records: of RUN and of --runs, at other N",
    )
    parser.add_argument("--runs", nargs="+", default=[], metavar="RUN", help="more records, for --target-loss")
    parser.add_argument(
        "--overhead", type=float, metavar="SECONDS",
        help="what every step takes beyond its slowest gradient; the record's by default, else 0",
    )
    parser.add_argument(
        "--stale", action="store_true", help="late workers stop early, as loops that ask session.stale() do"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="steps to draw from a law")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw the plan into a file; its ending says how (.svg, .png, .pdf)"
    )


def main(options: argparse.Namespace) -> int:
    """Answer; return 1 where the answer is declined."""
    from mpisync.planning.advice import advise
    from mpisync.planning.fitting import fit_laws

    observed, law, stopped_s = _times(options)
    advice = advise(
        observed, _efficiency(options, observed), stopped_s=stopped_s, is_law=law is not None,
        late_stop=options.stale, seed=options.seed, watched=_bar("playing each b", observed.times_s.size),
    )  # fmt: skip
    fits = [] if law is not None or advice.choices is None else fit_laws(observed.times_s, seed=options.seed)
    if options.plot:
        from mpisync.planning.plots import draw
        from mpisync.planning.trials import decisions, try_policies

        trials = try_policies(advice, seed=options.seed, watched=_bar("trying each policy"))
        draw(advice, fits, options.plot, trials, decisions(advice))
    _show(options, advice, fits, law)
    return int(advice.verdict == "declined")


def _show(options: argparse.Namespace, advice: "Advice", fits: "list[Fit]", law: "DelayLaw | None") -> None:
    if options.json:
        from mpisync.planning.documents import document

        print(document(advice, fits, law))
        return
    from mpisync.commands.planned import show

    show(advice, fits, law)
    if options.plot:
        print(f"\nplotted in {options.plot}")


def _times(options: argparse.Namespace) -> "tuple[Observed, DelayLaw | None, Seconds | None]":
    """Return the times to plan by, the law they were drawn from, and its exact E[T_(N)] where known."""
    from dataclasses import replace

    from mpisync.planning.forms import parse_law
    from mpisync.planning.observed import read_times

    if (options.source is None) == (options.delay is None):
        raise ValueError("give either a run's record or table of times, or a law by --delay with --workers")
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers must be at least 1, not {options.workers}")
    if options.overhead is not None and not 0 <= options.overhead < float("inf"):
        raise ValueError(f"--overhead must be seconds from 0, not {options.overhead}")
    if options.delay is not None:
        if (options.step, options.worker, options.seconds) != (None, None, None):
            raise ValueError("--step, --worker and --seconds name columns of a table, which --delay does not read")
        if options.workers is None:
            raise ValueError("a law needs the number of workers: --workers 100")
        return _drawn(options, parse_law(options.delay), options.overhead or 0.0)
    columns = {"step": options.step, "worker": options.worker, "seconds": options.seconds}
    observed = read_times(options.source, **columns)
    if options.overhead is not None:
        observed = replace(observed, overhead_s=options.overhead)
    if options.workers in (None, len(observed.workers)):
        return observed, None, None
    return _scaled(options, observed)


def _scaled(options: argparse.Namespace, observed: "Observed") -> "tuple[Observed, DelayLaw | None, Seconds | None]":
    """Ask of another number of workers like those that were measured."""
    from dataclasses import replace

    from mpisync.planning import words
    from mpisync.planning.advice import FEWEST_STEPS, since_last_change
    from mpisync.planning.empirical import Empirical
    from mpisync.planning.fitting import fit_composite

    steps, workers = observed.times_s.shape
    if steps >= FEWEST_STEPS:
        whole = observed
        observed, regimes = since_last_change(whole)
        observed = replace(observed, notes=[*whole.notes, *words.regimes(regimes, whole, FEWEST_STEPS)])
    if steps < FEWEST_STEPS or workers < 2:
        raise ValueError(
            f"{FEWEST_STEPS} steps of 2 workers at least are needed to say what {options.workers} workers would do, "
            f"but here are {steps} of {workers}"
        )
    law: DelayLaw
    if options.workers < workers:
        law = Empirical(observed.times_s, options.source)
        what = f"{options.workers} of the {workers} workers that were measured, chosen at random"
    else:
        law = fit_composite(observed.times_s, seed=options.seed)
        what = f"{options.workers} workers by the law fitted to the {workers} that were measured: {law}"
    drawn, law_drawn, exact = _drawn(options, law, observed.overhead_s)
    return replace(drawn, notes=[*observed.notes, what], steps=observed.steps), law_drawn, exact


def _drawn(
    options: argparse.Namespace, law: "DelayLaw", overhead_s: float
) -> "tuple[Observed, DelayLaw | None, Seconds | None]":
    import numpy as np

    from mpisync.planning.laws import Independent
    from mpisync.planning.observed import Observed

    steps = options.steps or max(_FEWEST_STEPS, min(_MOST_STEPS, _MOST_DRAWN // options.workers))
    if steps < 1:
        raise ValueError(f"--steps must be at least 1, not {steps}")
    times_s = law.sample(np.random.default_rng(options.seed), steps, options.workers)
    exact = law.order_statistics_s(options.workers) if isinstance(law, Independent) else None
    everything = np.ones(times_s.shape, np.bool_)
    return Observed(times_s, everything, list(range(options.workers)), overhead_s=overhead_s), law, exact


def _efficiency(options: argparse.Namespace, observed: "Observed") -> "Efficiency":
    """Return J(N): as given, else from the record, else unknown."""
    from mpisync.planning.advice import UNKNOWN_NOISE
    from mpisync.planning.efficiency import Efficiency, fit_iterations, noise_from_steps

    given = [bool(options.iterations), options.noise_scale is not None, options.target_loss is not None]
    if sum(given) > 1:
        raise ValueError("give one of --iterations, --noise-scale and --target-loss: each tells J(N)")
    if options.runs and options.target_loss is None:
        raise ValueError("--runs are for --target-loss: say which loss they were to reach")
    if options.iterations:
        return fit_iterations([_pair(text) for text in options.iterations])
    if options.target_loss is not None:
        return fit_iterations(_reached(options.target_loss, [options.source, *options.runs]))
    if options.noise_scale is not None:
        return Efficiency(options.noise_scale)
    return noise_from_steps(observed.steps, seed=options.seed) or UNKNOWN_NOISE


def _pair(text: str) -> tuple[float, float]:
    n, _, iterations = text.partition(":")
    try:
        return float(n), float(iterations)
    except ValueError:
        raise ValueError(f"--iterations must be N:J, as in 50:137500, not {text!r}") from None


def _reached(loss: float, paths: list[str | None]) -> list[tuple[float, float]]:
    """Return N and the updates to a loss of each run."""
    from statistics import fmean

    from mpisync.planning.efficiency import iterations_to_loss
    from mpisync.records import read_record

    pairs = []
    for path in paths:
        if path is None:
            continue
        steps = read_record(path)[1]
        iterations = iterations_to_loss(steps, loss)
        if iterations is None:
            raise ValueError(f"the run {path} did not reach a training loss of {loss:g} (mean of 20 steps)")
        pairs.append((fmean(len(step.accepted) for step in steps), float(iterations)))
    return pairs


def _bar(text: str, times: int = _LONG_WORK):  # type: ignore[no-untyped-def]  # noqa: ANN202
    """Return what goes through things to do: with a bar if that takes long and somebody looks."""
    if times < _LONG_WORK or not sys.stderr.isatty():
        return iter
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return iter

    def watched(things: Sequence[Any]) -> Iterable[Any]:
        return track(things, text, console=Console(stderr=True), transient=True)

    return watched
