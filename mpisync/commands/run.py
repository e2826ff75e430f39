"""Start a script on N ranks, under the MPI that mpi4py loads and with that MPI's own launcher.

  mpisync run -n 5 train.py --epochs 3     five ranks: four workers and the root
  mpisync run -n 5 -m package.train        a module, as python -m does

It is replaced by the launcher (exec), so input, output, signals and the exit code are the job's.
More ranks than cores, and running as root, are allowed. `--dry-run` shows the command.
"""

import argparse
import os
import shlex
import sys

from mpisync import launchers, settings, watcher
from mpisync.policies import parse_policy

NAME = "run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `mpisync run`."""
    parser.add_argument(
        "-n", "--nprocs", type=int, metavar="N",
        help="ranks to start, the root included; in a Slurm allocation its tasks by default",
    )
    parser.add_argument(
        "--policy",
        help="the policy, in place of the script's: backup:1, deadline:0.5, async:k=2, adaptive, replay:PATH "
        "(sets MPISYNC_POLICY)",
    )
    parser.add_argument(
        "--transport", metavar="NAME",
        help="auto, shared or messages, in place of the script's (sets MPISYNC_TRANSPORT)",
    )
    parser.add_argument(
        "--launcher", choices=("auto", "srun"), default="auto",
        help="auto: the launcher of mpi4py's MPI; srun: Slurm's",
    )
    parser.add_argument(
        "--hosts", default="", metavar="LIST", help="hosts to run on, as the launcher writes them"
    )
    parser.add_argument("--hostfile", default="", metavar="FILE", help="a file of hosts, likewise")
    parser.add_argument(
        "--ulfm", action="store_true",
        help="start with ULFM (Open MPI 5: --with-ft ulfm); mpisync ends the job when a rank dies, as without",
    )
    parser.add_argument(
        "--launcher-args", default="", metavar="TEXT",
        help="more options for the launcher, for example '--mca btl_tcp_if_exclude docker0,lo'",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command and stop")
    parser.add_argument(
        "-m", dest="is_module", action="store_true", help="the script is the name of a module"
    )
    parser.add_argument("script", help="the Python script to start, or the module with -m")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own arguments"
    )


def main(options: argparse.Namespace) -> int:
    """Become the launcher; return only for --dry-run."""
    _refuse_nesting()
    if not options.is_module and not os.path.isfile(options.script):
        raise ValueError(f"there is no script {options.script!r} in {os.getcwd()}")
    environ = _environment(options)
    library = launchers.find_library(environ=environ)
    launcher = launchers.find_launcher(
        library, slurm=options.launcher == "srun", environ=environ
    )
    job = launchers.Job(
        nprocs=_ranks(options.nprocs),
        hosts=options.hosts,
        hostfile=options.hostfile,
        ulfm=options.ulfm,
        extra=tuple(shlex.split(options.launcher_args)),
    )
    command = launchers.compose(launcher, library, job, environ=environ)
    # -u: launchers read the ranks through pipes, in which Python would keep lines back.
    command += [sys.executable, "-u", *(["-m"] if options.is_module else []), options.script]
    command += options.arguments
    if options.dry_run:
        print(shlex.join(command))
        return 0
    sys.stdout.flush()
    if options.ulfm:  # before there are ranks: those that do not come to `import mpisync` are watched too
        watcher.start(os.getpid(), environ)
    os.execve(command[0], command, environ)


def _refuse_nesting() -> None:
    started = launchers.placement()
    if started is not None:
        raise RuntimeError(
            f"this is already rank {started.rank} of {started.size} of {started.launcher}; start "
            "`mpisync run` once, outside, or start the script itself with that launcher"
        )


def _environment(options: argparse.Namespace) -> dict[str, str]:
    """Return the ranks' environment: this one with what the command line sets."""
    environ = dict(os.environ)
    for name, text in (
        ("MPISYNC_POLICY", options.policy),
        ("MPISYNC_TRANSPORT", options.transport),
    ):
        if text is not None:
            environ[name] = text
    if environ.get("MPISYNC_POLICY"):
        parse_policy(environ["MPISYNC_POLICY"])  # refuses nonsense here, once, not on every rank
    if sys.stderr.isatty():
        environ["MPISYNC_COLUMNS"] = str(os.get_terminal_size(sys.stderr.fileno()).columns or 80)
    for name in settings.unknown(environ):
        print(
            f"mpisync run: {name} is set, and mpisync has no such setting; it has "
            f"{', '.join(settings.SETTINGS)}",
            file=sys.stderr,
        )
    return environ


def _ranks(asked: int | None) -> int:
    if asked is not None:
        return asked
    tasks = os.environ.get("SLURM_NTASKS", "")
    if not tasks.isdecimal():
        raise ValueError("say how many ranks to start: -n 5 for four workers and the root")
    return int(tasks)
