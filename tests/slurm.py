"""A real Slurm of several nodes on this machine's loopback, for tests that submit job scripts.

Its daemons are munged, slurmctld and one slurmd a node: in the foreground, as this user, with every file
in one directory, so that a Slurm or a munge of the machine's own is left alone. The nodes are processes
of one machine: they share its kernel, its hostname and its cores, however many each claims to have.
"""

import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from launch import TAG, Job, environment

PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"])
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
_ABSENT = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
MISSING = f"there is no {', '.join(_ABSENT)} (apt install slurm-wlm munge)" if _ABSENT else None

UP_S = 30.0
# --force: munged would rather have its socket where other users reach it.
DAEMONS = """
trap 'trap - TERM; kill 0' TERM
munged --foreground --force --socket="$1/munge" --key-file="$1/key" --seed-file="$1/seed" \
  --log-file="$1/munged.log" --pid-file="$1/munged.pid" &
slurmctld -D -c &
for node in $2; do slurmd -D -N "$node" & done
wait
"""
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} CoresPerSocket={cpus}
PartitionName=all Nodes=ALL Default=YES State=UP
"""
_LASTING = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED"}


class Unusable(Exception):
    """This machine does not let its Slurm run; the text says why."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job ended: Slurm's word for it, its exit code and signal, and what it printed."""

    state: str
    code: str
    output: str


class Cluster:
    """Nodes n1, n2, ... of a running Slurm. A context manager; its processes and files go with it."""

    def __init__(self, nodes: int, cpus: int):
        """Start it, with so many CPUs a node.

        Raises:
            Unusable: slurmd cannot run here.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="mpisync-test-"))
        self.nodes = nodes
        self._configure(cpus)
        names = " ".join(f"n{number}" for number in range(1, nodes + 1))
        command = ["sh", "-c", DAEMONS, "sh", str(self.folder), names]
        self.daemons = Job(command, self.folder, env=self._own())
        with ExitStack() as undo:
            undo.callback(self.daemons.close)
            self._wait_until_up()
            undo.pop_all()

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *exception) -> None:
        self.daemons.close()  # jobs carry its tag too

    def submit(
        self, script: str, *arguments: str, options: Sequence[str] = (), cwd: Path, env: Mapping[str, str]
    ) -> str:
        """Submit a script as `sbatch [options] script [arguments]` from `cwd`; return the job's number."""
        return self._ask("sbatch", "--parsable", *options, script, *arguments, cwd=cwd, env=env).strip()

    def wait(self, job: str, timeout_s: float) -> Ended:
        """Wait for the end of a job, or of an array's element (12_0); AssertionError where there is none."""
        end_s = time.monotonic() + timeout_s
        while True:
            text = self._ask("scontrol", "--oneliner", "show", "job", job)
            state, code, file = (_field(name, text) for name in ("JobState", "ExitCode", "StdOut"))
            if state not in _LASTING:
                return Ended(state, code, Path(file).read_text())
            if time.monotonic() > end_s:
                output = Path(file).read_text() if Path(file).exists() else "no output yet"
                raise AssertionError(
                    f"job {job} is {state} after {timeout_s:g} s:\n{text}\n{output}\n{self.daemons.stacks()}"
                )
            time.sleep(0.1)

    def log(self, node: str) -> str:
        """Return what a node's slurmd has logged."""
        return (self.folder / f"{node}.log").read_text(errors="replace")

    def _configure(self, cpus: int) -> None:
        """Write the files that the daemons want to find."""
        controller, *own = _free_ports(1 + self.nodes)
        configuration = CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0],
            ports=(controller, f"[{','.join(map(str, own))}]"),
            user=os.geteuid(),
            folder=self.folder,
            nodes=self.nodes,
            cpus=cpus,
        )
        (self.folder / "slurm.conf").write_text(configuration)
        if _version() >= (23, 2):  # older ones know no way to do without
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        (self.folder / "key").touch(0o600)
        (self.folder / "key").write_bytes(os.urandom(128))
        for name in ("state", "tmp"):
            (self.folder / name).mkdir()

    def _ask(self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
        """Run one of Slurm's commands and return what it prints."""
        run = subprocess.run(
            command, cwd=cwd, env=self._environment(env or {}),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20,
        )  # fmt: skip
        assert run.returncode == 0, f"{command} failed: {run.stderr}"
        return run.stdout

    def _environment(self, extra: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of who submits, which sbatch hands on to the job.

        Without the harness's leave for more ranks than slots: a job has what Slurm gives it.
        """
        plain = {
            name: value
            for name, value in environment().items()
            if not name.startswith(("SLURM_", "SBATCH_", "PRTE_MCA_", "OMPI_MCA_"))
        }
        return {**plain, **self._own(), TAG: str(self.folder), **extra}

    def _own(self) -> dict[str, str]:
        folder = self.folder
        return {"SLURM_CONF": f"{folder}/slurm.conf", "TMPDIR": f"{folder}/tmp", "PATH": PATH}

    def _wait_until_up(self) -> None:
        end_s = time.monotonic() + UP_S
        while True:
            try:
                if self._ask("sinfo", "--noheader", "--format=%T %D").split() == ["idle", str(self.nodes)]:
                    return
            except AssertionError as error:
                answer = str(error)
            else:
                answer = "its nodes are not idle"
            said = self.daemons.output("stderr")
            if "Unable to initialize cgroup plugin" in said:
                raise Unusable("slurmd wants control groups, and cannot have them here")
            assert time.monotonic() < end_s, f"Slurm is not up after {UP_S:g} s: {answer}\n{said}"
            time.sleep(0.1)


def _version() -> tuple[int, ...]:
    """Return Slurm's version, such as (22, 5, 8)."""
    answer = subprocess.run(
        ["slurmctld", "-V"], env={"PATH": PATH}, capture_output=True, text=True, check=True
    ).stdout
    return tuple(map(int, re.findall(r"\d+", answer)[:3]))


def _field(name: str, text: str) -> str:
    found = re.search(rf"\b{name}=(\S+)", text)
    assert found, f"scontrol shows no {name}: {text}"
    return found[1]


def _free_ports(count: int) -> list[int]:
    """Return ports of the loopback that nobody listens on just now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
