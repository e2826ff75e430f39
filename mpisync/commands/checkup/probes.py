"""What is known of each rank before anything is judged; JSON, so that it travels between ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mpisync.launchers import Launcher, Library, Placement


@dataclass(frozen=True, slots=True)
class Start:
    """What came of starting MPI."""

    rank: int = 0
    size: int = 0  # 0 where it did not start
    took_s: float = 0.0
    thread_level: str = ""  # as MPI calls it: single, funneled, serialized, multiple
    ulfm: bool = False
    sharing: str = ""  # how this rank mapped the root's memory: memfd, file, or not at all
    children: Mapping[str, str] = field(default_factory=dict)  # what went wrong with a process, by start method
    cuda_aware: bool | None = None  # the library's own word, where it has one
    noise: str = ""  # what MPI printed meanwhile
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Tools:
    """The packages that compute, and what they found."""

    numba: str = ""  # versions
    torch: str = ""
    cache: str = ""  # where compiled kernels are kept
    threads: int = 0  # torch's
    gpus: tuple[str, ...] = ()  # that torch can use
    device: str = ""  # why gradients cannot be reduced on the first of them
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a process can use of the machine that it is on."""

    host: str
    node: str  # identifies the running kernel
    cores: tuple[int, ...]  # that this process may use
    quota_cores: float | None  # a container's limit
    node_cores: int
    core_threads: int  # of the hardware: so many of what is counted above are one core
    memory_bytes: int  # that may still be used
    shm_bytes: int  # free in /dev/shm
    infiniband: bool
    gpu_files: int  # GPUs that the kernel's driver shows
    interfaces: tuple[str, ...]  # with an IPv4 address
    unplugged: tuple[str, ...] = ()  # of these, up and without a carrier


@dataclass(frozen=True, slots=True)
class Probe:
    """What one rank, or a process started alone, sees."""

    machine: Machine
    python: str
    mpisync: str
    environ: Mapping[str, str]  # only what somebody judges
    placed: Placement | None
    start_method: str  # of multiprocessing
    settings: tuple[str, ...]  # what is wrong with the MPISYNC_ variables
    mpi: Library | None = None
    mpi_problem: str = ""
    launcher: Launcher | None = None  # the one that `mpisync run` would take
    launcher_problem: str = ""
    on_path: Launcher | None = None  # what a plain `mpirun` is
    tools: Tools = Tools()
    start: Start = Start()

    def to_json(self) -> dict[str, Any]:
        """Return plain dictionaries, lists, texts and numbers."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Probe:
        """Read what `to_json` wrote."""
        kinds: dict[str, Any] = {
            "machine": Machine, "placed": Placement, "mpi": Library, "launcher": Launcher, "on_path": Launcher,
            "tools": Tools, "start": Start,
        }  # fmt: skip
        read = {name: _tuples(value) for name, value in fields.items()}
        for name, kind in kinds.items():
            if read.get(name) is not None:
                read[name] = kind(**{key: _tuples(value) for key, value in read[name].items()})
        return cls(**read)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True, slots=True)
class Case:
    """Everything that a check may look at."""

    ranks: tuple[Probe, ...]  # in order; one where doctor was started alone
    model_mb: float | None = None

    @property
    def alone(self) -> bool:
        """Whether no launcher started this."""
        return self.ranks[0].placed is None

    @property
    def apart(self) -> bool:
        """Whether a launcher started ranks that did not find each other: only rank 0's probe is here."""
        return not self.alone and len(self.ranks) < (self.ranks[0].placed or self.ranks[0].start).size

    @property
    def first(self) -> Probe:
        """Rank 0, which stands for all in what does not differ."""
        return self.ranks[0]

    @property
    def root(self) -> Probe:
        """The last rank, which is the root of a job."""
        return self.ranks[-1]

    @property
    def nodes(self) -> dict[str, list[int]]:
        """The ranks of each node."""
        found: dict[str, list[int]] = {}
        for rank, probe in enumerate(self.ranks):
            found.setdefault(probe.machine.node, []).append(rank)
        return found


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's: what is so, and what to do about it."""

    subject: str
    says: str
    do: str = ""
    must: bool = False  # whether it has to be done

    @property
    def level(self) -> str:
        """In one word: "ok"; "note": worth knowing, or worth doing; "fix": must be done."""
        return "fix" if self.must else "note" if self.do else "ok"
