"""The surroundings of a run, for its record: for whoever reads it or wants to repeat the run."""

from __future__ import annotations

import inspect
import os
import platform
import reprlib
import socket
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import mpi4py
import torch
from mpi4py import MPI
from torch import nn
from torch.optim import Optimizer

from mpisync.transport.peers import Peer


def run_info(
    parameters: Sequence[nn.Parameter], optimizers: Sequence[Optimizer], schedulers: Sequence[object]
) -> dict[str, Any]:
    """Return what the rank that makes the updates knows of itself, as fields of a `RunHeader`."""
    counts: dict[str, int] = {}
    for parameter in parameters:
        name = str(parameter.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + parameter.numel()
    return {
        "command": list(sys.argv),
        "root_host": socket.gethostname(),
        "root_cores": len(os.sched_getaffinity(0)),
        "root_threads": torch.get_num_threads(),
        "parameters": counts,
        "parameters_bytes": sum(p.numel() * p.element_size() for p in parameters),
        "optimizer": "; ".join(map(optimizer_text, optimizers)),
        "scheduler": "; ".join(type(scheduler).__name__ for scheduler in schedulers),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "mpi4py": mpi4py.__version__,
            "MPI": _library(),
        },
    }


def cores_of(peers: Iterable[Peer], here: Peer) -> int | None:
    """Return how many cores the peers' processes may use together; None where one is out of sight."""
    cores: set[int] = set()
    for peer in peers:
        if not here.sees(peer):
            return None
        try:
            cores |= os.sched_getaffinity(peer.pid)
        except OSError:  # it has just ended
            return None
    return len(cores)


def optimizer_text(optimizer: Optimizer) -> str:
    """Return an optimizer's name and its settings, but for those that are its defaults.

    Example:
        >>> weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
        >>> groups = [{"params": weights[:1]}, {"params": weights[1:], "lr": 0.01}]
        >>> optimizer_text(torch.optim.SGD(groups, lr=0.1, momentum=0.9))
        'SGD(lr=0.1 / 0.01, momentum=0.9), 2 groups'
        >>> optimizer_text(torch.optim.AdamW(weights))
        'AdamW(lr=0.001)'
    """
    usual = inspect.signature(type(optimizer).__init__).parameters
    takes_others = any(parameter.kind is parameter.VAR_KEYWORD for parameter in usual.values())
    shown = []
    for name in getattr(optimizer, "defaults", ()):  # some wrap another, and have none
        values = dict.fromkeys(_shown(group.get(name)) for group in optimizer.param_groups)
        # What cannot be given is no setting, as AdamW's decoupled_weight_decay.
        is_default = list(values) == [_shown(usual[name].default)] if name in usual else not takes_others
        if name == "lr" or not is_default:
            shown.append(f"{name}={' / '.join(values)}")
    groups = len(optimizer.param_groups)
    return f"{type(optimizer).__name__}({', '.join(shown)})" + (f", {groups} groups" if groups > 1 else "")


def _shown(value: object) -> str:
    if isinstance(value, torch.Tensor) and value.numel() == 1:  # a learning rate may be one
        value = value.item()
    return reprlib.repr(value)


def _library() -> str:
    """Return the MPI library's name and version, as "Open MPI v5.0.11"."""
    line = MPI.Get_library_version().partition("\0")[0].strip().splitlines()[0]
    return " ".join(line.partition(",")[0].split())
