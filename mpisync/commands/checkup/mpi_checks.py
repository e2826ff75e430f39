"""What doctor says about MPI: the library, its launcher, and what came of starting it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from mpisync.commands.checkup.children import TRIAL_RANKS, gist
from mpisync.commands.checkup.probes import Case, Finding
from mpisync.commands.checkup.wording import by_value, ranks_named, several, who
from mpisync.launchers import Launcher, Library, Placement, fits

_FAMILIES = {"openmpi": "Open MPI", "mpich": "MPICH or its kin", "slurm": "Slurm"}
_STRANGERS = {"openmpi": "MPICH", "mpich": "Open MPI"}  # whose launchers a family's ranks do not understand
_SRUN = "name the interface that this MPI speaks (srun --mpi=pmi2 for MPICH, --mpi=pmix for Open MPI), or "


def loaded(case: Case) -> Iterator[Finding]:
    """Say which libmpi mpi4py loads, and why where it was told."""
    for problem, ranks in by_value(case, lambda probe: probe.mpi_problem).items():
        if problem:
            says, _, do = problem.partition("; ")
            yield Finding("MPI", says + who(case, ranks), do, must=True)
    asked = {name: text for name, text in case.first.environ.items() if name in ("MPI4PY_LIBMPI", "MPI4PY_MPIABI")}
    chosen = f", chosen by {' and '.join(f'{name}={text}' for name, text in asked.items())}" if asked else ""
    found = [(lib, ranks) for lib, ranks in by_value(case, lambda probe: probe.mpi).items() if lib is not None]
    kinds = {(lib.family, lib.version) for lib, _ in found}
    for lib, ranks in found:
        do = "the same MPI must be loaded on every node" if len(kinds) > 1 else ""
        yield Finding("MPI", f"mpi4py loads {_library(lib)}{chosen}{who(case, ranks)}", do, must=bool(do))


def _library(lib: Library) -> str:
    return f"{_short(lib)} from {lib.path}" if lib.path else _short(lib)


def _short(lib: Library) -> str:
    return re.sub(r"\s+", " ", lib.name)


def launcher(case: Case) -> Iterator[Finding]:
    """Say which launcher starts ranks, and whether a plain mpirun is one that fits."""
    first = case.first
    if first.mpi is None:
        return
    if first.placed is not None:
        yield from _started_by(case, first.placed, first.mpi)
        return
    if first.launcher is None:
        says, _, do = first.launcher_problem.partition("; load")
        yield Finding("launcher", says, f"load{do}" if do else "", must=True)
        return
    own, other = first.launcher, first.on_path
    if other is None:
        yield Finding(
            "launcher", f"`mpisync run` takes {own.path}; there is no mpirun on PATH",
            "start jobs with `mpisync run`, or activate the environment that has it",
        )  # fmt: skip
    elif not fits(other, first.mpi):
        yield Finding(
            "launcher",
            f"mpirun on PATH is {_launcher(other)}, of another MPI than mpi4py's: its ranks would each be alone",
            f"start jobs with `mpisync run`, which takes {own.path}; better, have one MPI only",
            must=True,
        )
    elif os.path.dirname(other.path) != os.path.dirname(own.path):
        yield Finding(
            "launcher",
            f"there are two that fit: {_launcher(own)} beside mpi4py's library, {_launcher(other)} on PATH",
            "where one belongs to the site, use that alone: a wheel knows nothing of the cluster's network",
        )
    else:
        yield Finding("launcher", f"{_launcher(own)}, of the same MPI")


def _launcher(found: Launcher) -> str:
    version = ".".join(map(str, found.version))
    return f"{found.path} ({_FAMILIES[found.family]}{' ' if version else ''}{version})"


def _started_by(case: Case, placed: Placement, lib: Library) -> Iterator[Finding]:
    own = f"start with the launcher of mpi4py's MPI: mpisync run -n {placed.size} ..."
    if _apart_by_launcher(case):
        says = f"{placed.launcher} started {placed.size} ranks, but mpi4py loads another MPI ({_short(lib)})"
        yield Finding("launcher", says, own, must=True)
    elif case.apart and case.first.start.size:
        says = f"{placed.launcher} started {placed.size} ranks, and each believes that it is alone with {_short(lib)}"
        do = f"{_SRUN if placed.launcher == 'srun' else ''}{own}"
        yield Finding("launcher", says, do, must=True)
    elif not case.apart:
        yield Finding("launcher", f"{placed.launcher}, of the same MPI")


def _apart_by_launcher(case: Case) -> bool:
    """Whether it is known, from its name, that the launcher belongs to another MPI."""
    placed, lib = case.first.placed, case.first.mpi
    return case.apart and placed is not None and lib is not None and _STRANGERS[lib.family] in placed.launcher


def start(case: Case) -> Iterator[Finding]:
    """Say whether MPI starts, in what time, and what it prints meanwhile."""
    first = case.first
    if first.mpi is None or _apart_by_launcher(case):
        return
    took_s = max(probe.start.took_s for probe in case.ranks)
    if first.start.problem:
        how = f"on a trial of {TRIAL_RANKS} ranks" if case.alone and first.launcher else "here"
        do = _start_remedy(case, first.mpi)
        yield Finding("start", f"MPI does not start {how}: {first.start.problem}", do, must=True)
    elif case.alone and first.launcher is not None and first.start.size < TRIAL_RANKS:
        yield Finding(
            "start", f"a trial of {TRIAL_RANKS} ranks started {TRIAL_RANKS} times one",
            "name mpi4py's MPI by MPI4PY_LIBMPI, or load the MPI that it was built with", must=True,
        )  # fmt: skip
    elif case.alone:
        yield Finding("start", f"a trial of {several(first.start.size, 'rank')} started MPI in {took_s:.1f} s")
    else:
        yield Finding("start", f"MPI started in {took_s:.1f} s")
    if first.start.noise:
        yield _noise(first.start.noise)


def _start_remedy(case: Case, lib: Library) -> str:
    first = case.first
    if first.start.problem.startswith("no end"):
        hello = "python -c 'from mpi4py import MPI'"
        return f"try `mpirun -n 2 {hello}`; on a cluster ask how MPI jobs are started there"
    by_srun = first.placed is not None and first.placed.launcher == "srun"
    if by_srun and lib.family == "openmpi":
        return "srun's PMIx must fit Open MPI's: start with mpirun inside the allocation (`mpisync run` does)"
    return "this must work before mpisync can: mpirun -n 2 python -c 'from mpi4py import MPI'"


def _noise(noise: str) -> Finding:
    if "ucx" in noise.lower() and "osc" in noise.lower():
        return Finding(
            "start", "Open MPI prints errors about osc/ucx, which is not used here",
            "export OMPI_MCA_osc=^ucx, or start with `mpisync run`",
        )  # fmt: skip
    return Finding("start", f"MPI prints: {gist(noise)}", "look whether that is meant to be")


def threads(case: Case) -> Iterator[Finding]:
    """Say what MPI allows threads to do; mpisync needs that there may be some."""
    for level, ranks in by_value(case, lambda probe: probe.start.thread_level).items():
        if case.apart:
            return
        if level == "single":
            yield Finding(
                "MPI threads", f"MPI was started for processes without threads{who(case, ranks)}",
                "unset MPI4PY_RC_THREAD_LEVEL, or set it to multiple", must=True,
            )  # fmt: skip
        elif level:
            yield Finding("MPI threads", f"thread level {level}{who(case, ranks)}")


def ulfm(case: Case) -> Iterator[Finding]:
    """Say whether MPI lets a job outlive a rank, and that mpisync does not yet."""
    first = case.first
    if first.mpi is None or case.apart or not first.start.size:
        return
    on = [rank for rank, probe in enumerate(case.ranks) if probe.start.ulfm]
    if on:
        yield Finding("dead ranks", f"ULFM is on{who(case, on)}; mpisync ends the job all the same when a rank dies")
    elif first.mpi.family == "openmpi" and first.mpi.version >= (5,):
        how = "`mpisync run --ulfm` or `mpirun --with-ft ulfm --mca pml ob1` has it on"
        yield Finding("dead ranks", f"ULFM is off, so a rank that dies ends the job; {how}")
    else:
        yield Finding("dead ranks", "no ULFM in this MPI, so a rank that dies ends the job; Open MPI 5 has it")


def _hosts(case: Case, ranks: list[int]) -> str:
    """Name a node; containers on it have names of their own."""
    names = list(dict.fromkeys(case.ranks[rank].machine.host for rank in ranks))
    return f"{', '.join(names)} {'has' if len(names) == 1 else 'on one machine have'}"


def nodes(case: Case) -> Iterator[Finding]:
    """Say how the ranks are spread."""
    if case.alone or case.apart or not case.first.start.size:
        return
    spread = case.nodes
    where = ", ".join(f"{_hosts(case, own)} {ranks_named(own)}" for own in spread.values())
    says = f"{several(len(case.ranks), 'rank')} on {several(len(spread), 'node')}: {where}"
    if len(case.ranks) < 2:
        yield Finding("ranks", says, "a job needs at least two: workers, and the root, which does not train")
    elif len(spread) > 1:
        near = len(spread[case.root.machine.node]) - 1
        far = len(case.ranks) - 1 - near
        yield Finding("ranks", f"{says}; {several(far, 'worker')} away from the root send whole gradients by messages")
    else:
        yield Finding("ranks", f"{says}; the last is the root")
