"""Lets scripts that tests start be up sooner, and ranks be asked for their stacks from their start (see launch.py)."""

import faulthandler
import functools
import os
import signal
import sys
from importlib.machinery import PathFinder


class WithoutDynamo:
    """An import hook: the first optimizer does not import torch._dynamo, half of a script's start.

    torch decorates its methods with "not to be compiled" and imports the compiler to say so. Where
    nobody has imported the compiler nothing is compiled, and there is nothing to say.
    """

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torch._compile":
            return None
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module._disable_dynamo = functools.partial(_only_with_dynamo, module._disable_dynamo)

        spec.loader.exec_module = exec_module
        return spec


def _only_with_dynamo(disable, function=None, recursive=True):
    if function is None:
        return functools.partial(_only_with_dynamo, disable, recursive=recursive)
    disabled = disable(function, recursive)

    @functools.wraps(function)
    def called(*args, **kwargs):
        return (disabled if "torch._dynamo" in sys.modules else function)(*args, **kwargs)

    return called


if "MPITEST_CHILD" not in os.environ:  # ranks of pytest run many tests: they have torch as it is
    sys.meta_path.insert(0, WithoutDynamo)

_rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK")
if _rank and "MPITEST_RUN" in os.environ:
    _file = os.path.join(os.environ["MPITEST_RUN"], f"stacks.{_rank}.{os.getpid()}")
    # Launchers mix the ranks' output as it comes; whole lines, and at once, can be looked for.
    sys.stdout.reconfigure(line_buffering=True)
    # The handler is C: it writes even while the interpreter is stuck inside MPI or a kernel.
    faulthandler.register(
        signal.SIGRTMIN + 7, file=os.open(_file, os.O_WRONLY | os.O_CREAT, 0o600), all_threads=True
    )
