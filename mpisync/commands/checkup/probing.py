"""Asks the machine. Nothing here judges, and nothing raises: what cannot be known is left empty."""

from __future__ import annotations

import difflib
import fcntl
import multiprocessing
import os
import platform
import re
import shutil
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpisync import launchers, settings
from mpisync.commands.checkup.children import find_tools, start_rank, start_trial
from mpisync.commands.checkup.probes import Machine, Probe
from mpisync.device.shared_memory import SharedMemory
from mpisync.policies import parse_policy
from mpisync.transport.peers import Peer
from mpisync.version import __version__

_SIOCGIFADDR = 0x8915
_SMALL_BYTES = 4096
# What a check may look at in the environment; nothing else leaves this process.
_JUDGED = re.compile(
    r"MPISYNC_\w+|MPI4PY_\w+|OMPI_MCA_(osc|btl_tcp_if_\w+|oob_tcp_if_\w+|mpi_ft_enable)|OMP_NUM_THREADS|"
    r"NUMBA_(NUM_THREADS|DISABLE_JIT|CACHE_DIR)|CUDA_VISIBLE_DEVICES|SLURM_(JOB_ID|NTASKS)|PRTE_MCA_\w+"
)


def probe(environ: Mapping[str, str] = os.environ) -> list[Probe]:
    """Look at this machine and start MPI.

    Returns:
        The probes of all ranks, at rank 0 and where nobody else can speak; nothing on the other ranks.
    """
    here = look(environ)
    addresses, memories = _memories()
    try:
        if here.placed is None:
            return [replace(here, start=start_trial(here, addresses)) if here.mpi else here]
        told = start_rank(here, addresses)
    finally:
        for memory in memories:
            memory.close()
    speaks = told or here.placed.rank == 0
    if told and told[0][1].size < 2 and here.placed.rank:
        speaks = False  # each rank is alone, or cannot start; one speaks for all
    return [replace(one, start=start) for one, start in told] if speaks else []


def look(environ: Mapping[str, str] = os.environ) -> Probe:
    """Look at this machine, without MPI."""
    peer, cores, interfaces = Peer.here(0), tuple(sorted(os.sched_getaffinity(0))), _interfaces()
    machine = Machine(
        host=peer.host,
        node=peer.boot,
        cores=cores,
        quota_cores=_quota_cores(),
        node_cores=os.cpu_count() or len(cores),
        core_threads=_core_threads(cores[0]),
        memory_bytes=_memory_bytes(),
        shm_bytes=_shm_bytes(),
        infiniband=any(Path("/sys/class/infiniband").glob("*")),
        gpu_files=len(list(Path("/proc/driver/nvidia/gpus").glob("*"))),
        interfaces=interfaces,
        unplugged=unplugged(interfaces),
    )
    found = Probe(
        machine=machine,
        python=platform.python_version(),
        mpisync=__version__,
        environ={name: environ[name] for name in sorted(environ) if _JUDGED.fullmatch(name)},
        placed=launchers.placement(environ),
        start_method=multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0],
        settings=settings_problems(environ),
        tools=find_tools(),
    )
    return replace(found, **_mpi(environ, found.placed is not None))


def _mpi(environ: Mapping[str, str], has_launcher: bool) -> dict[str, Any]:
    """Return the library, the launchers, and what is wrong with them."""
    name = shutil.which("mpirun", path=environ.get("PATH")) or shutil.which("mpiexec", path=environ.get("PATH"))
    found: dict[str, Any] = {"on_path": launchers.identify(name) if name else None}
    try:
        found["mpi"] = launchers.find_library(environ=environ)
        if not has_launcher:
            found["launcher"] = launchers.find_launcher(found["mpi"], environ=environ)
    except (RuntimeError, OSError) as error:
        found["launcher_problem" if "mpi" in found else "mpi_problem"] = str(error)
    return found


def _memories() -> tuple[dict[str, str], list[SharedMemory]]:
    """Make shared memory in each way that there is; return the addresses by kind."""
    addresses, memories = {}, []
    for kind in ("memfd", "file"):
        try:
            memory = SharedMemory.create(_SMALL_BYTES, as_file=kind == "file")
        except OSError:
            continue
        addresses[kind] = memory.address
        memories.append(memory)
    return addresses, memories


def settings_problems(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return a sentence for each MPISYNC_ variable that would be misunderstood."""
    found = []
    for name in settings.unknown(environ):
        near = difflib.get_close_matches(name, settings.SETTINGS, 1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(settings.SETTINGS)}"
        found.append(f"{name} is no setting of mpisync's; {meant}")
    for name in settings.SETTINGS:
        try:
            value = settings.read(name, environ=environ)
            if name == "MPISYNC_POLICY" and value:
                parse_policy(str(value))
        except (ValueError, OSError) as error:
            text = str(error)
            found.append(text if text.startswith(name) else f"{name}: {text}")
    return tuple(found)


def _quota_cores() -> float | None:
    quotas = [text.split() for text in _cgroup("cpu.max")]
    return min((int(q) / int(period) for q, period in quotas if q != "max"), default=None)


def _memory_bytes() -> int:
    """Return what may still be used: of the machine, and of the container."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", _read(Path("/proc/meminfo")))
    free = [int(found[1]) * 1024] if found else []
    for limit, used, stat in zip(*map(_cgroup, ("memory.max", "memory.current", "memory.stat")), strict=False):
        if limit.strip() != "max":
            cached = re.search(r"^inactive_file (\d+)$", stat, re.MULTILINE)  # given back when it is needed
            free.append(int(limit) - int(used) + int(cached[1] if cached else 0))
    return max(0, min(free, default=0))


def _core_threads(cpu: int) -> int:
    siblings = _read(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))
    ends = [part.split("-") for part in siblings.strip().split(",") if part]
    return sum(int(end[-1]) - int(end[0]) + 1 for end in ends) or 1


def _cgroup(name: str) -> list[str]:
    """Read a file of this process's control group (version 2), and of those that hold it."""
    found = re.search(r"^0::(/.*)$", _read(Path("/proc/self/cgroup")), re.MULTILINE)
    own = Path("/sys/fs/cgroup", found[1].lstrip("/") if found else "")
    folders = [own, *own.parents]
    return [text for folder in folders if folder.is_relative_to("/sys/fs/cgroup") and (text := _read(folder / name))]


def _shm_bytes() -> int:
    try:
        free = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return free.f_bavail * free.f_frsize


def _interfaces() -> tuple[str, ...]:
    """Return the network interfaces that have an IPv4 address."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                fcntl.ioctl(sock.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            found.append(name)
    return tuple(found)


def unplugged(interfaces: Iterable[str], folder: Path = Path("/sys/class/net")) -> tuple[str, ...]:
    """Return the interfaces that are up and have no carrier; of one that is down it cannot be read."""
    return tuple(name for name in interfaces if name != "lo" and _read(folder / name / "carrier").strip() == "0")


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
