"""The command `mpisync`: finds the subcommand and runs it."""

import argparse
import codecs
import io
import os
import sys
from collections.abc import Sequence

from mpisync.commands import bench, demo, doctor, plan, report, run, timeline
from mpisync.version import __version__

# Each has NAME, add_arguments(parser) and main(options) -> exit code, and imports what is
# heavy (MPI, torch, numba) in main only, so that every --help works where those cannot start.
COMMANDS = (run, demo, doctor, bench, plan, report, timeline)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, all subcommands in it."""
    parser = argparse.ArgumentParser(
        prog="mpisync", description="Synchronous SGD with backup workers over MPI."
    )
    parser.add_argument("--version", action="version", version=f"mpisync {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        summary = (command.__doc__ or "").partition("\n")[0]
        own = commands.add_parser(command.NAME, help=summary, description=command.__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
        command.add_arguments(own)
        own.set_defaults(main=command.main)
    return parser


_PLAIN = {"\N{MULTIPLICATION SIGN}": "x", "\N{EN DASH}": "-", "\N{HORIZONTAL ELLIPSIS}": "..."}


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Write what the terminal's encoding lacks by characters that all have."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(one, "?") for one in lacking), error.end


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (this process's own by default); return the exit code."""
    codecs.register_error("mpisync.plain", _plain)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="mpisync.plain")  # under LC_ALL=C
    options = build_parser().parse_args(arguments)
    try:
        code: int = options.main(options)
    except BrokenPipeError:  # whoever read the output has seen enough of it, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 1
    except (RuntimeError, ValueError, OSError) as error:
        # Ours are sentences for users; a traceback above them would hide them.
        print(f"mpisync {options.command}: {error}", file=sys.stderr)
        return 1
    return code
