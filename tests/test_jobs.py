"""The job files that need no Slurm to be tried, started as users start them; test_slurm.py submits the others."""

import os
import shutil
import sys

import pytest
import tour
from launch import ROOT, Job, launcher

from mpisync import launchers

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(launchers.placement() is not None, reason="it starts MPI jobs itself"),
]
FILES = sorted(path.name for path in (ROOT / "jobs").glob("*.*") if path.suffix in {".sh", ".sbatch", ".pbs"})


@pytest.fixture
def folder(tmp_path):
    """A clone of the repository after `make venv`, as far as jobs need it: this environment is its .venv."""
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "bin").mkdir()
    return tmp_path


@pytest.fixture
def openmpi():
    if launcher()[0].family != "openmpi":
        pytest.skip("the file is written for Open MPI's mpirun")


def run(folder, *command, env):
    """Run a job file with this environment activated, and return what it printed."""
    path = [str(folder / "bin"), os.path.dirname(sys.executable), os.environ["PATH"]]
    own = folder / "job"
    own.mkdir()
    with Job(command, own, env={"PATH": os.pathsep.join(path), **env}, cwd=folder) as job:
        ended = job.finish(200.0)
    assert ended.returncode == 0 and not ended.timed_out and not ended.left, ended
    return ended.stdout


def test_the_tour_on_a_laptop(folder):
    output = run(folder, "jobs/laptop.sh", env={})
    (record,) = (folder / "runs").iterdir()
    tour.check(output, record, policy="backup:1", workers=4)
    assert output.splitlines()[-1] == f"records and the averaged model: runs/{record.name}"


@pytest.mark.long
def test_the_lines_of_the_pbs_file(folder, openmpi):
    (folder / "hosts").write_text("localhost\n" * 4)
    env = {"PBS_JOBID": "7.server", "PBS_O_WORKDIR": str(folder), "PBS_NODEFILE": str(folder / "hosts")}
    output = run(folder, "bash", "jobs/train.pbs", env=env)
    tour.check(output, folder / "runs/7", policy="backup:2", workers=3)


@pytest.mark.long
def test_the_lines_of_the_apptainer_file(folder, openmpi):
    stand_in = folder / "bin/apptainer"
    stand_in.write_text('#!/bin/sh\ntest "$1 $2" = "exec mpisync.sif" && shift 2 && exec "$@"\n')
    stand_in.chmod(0o755)
    env = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "3", "SLURM_CPUS_PER_TASK": "1"}
    output = run(folder, "bash", "jobs/apptainer.sbatch", env=env)
    tour.check(output, folder / "runs/7", policy="backup:1", workers=2)


def test_the_lines_of_the_file_for_cards(folder, openmpi):
    """On a CPU: of the script's own words the last --device counts."""
    env = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "3", "SLURM_CPUS_PER_TASK": "1"}
    output = run(folder, "bash", "jobs/gpu.sbatch", "--device", "cpu", env=env)
    tour.check(output, folder / "runs/7", policy="backup:1", workers=2)


@pytest.mark.parametrize("name", FILES)
def test_the_head_says_what_runs_on_what_and_for_how_long(name):
    head = (ROOT / "jobs" / name).read_text().partition("set -euo pipefail")[0]
    for word in ("# What: ", "# Where: ", "# How long: "):
        assert head.count(word) == 1, name
