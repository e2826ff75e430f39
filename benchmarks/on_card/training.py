"""Sessions whose models are on the card: equal to one process, and how long a step takes; run by mpirun."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import mpisync
from on_card import starting
from on_card.card import Card, SkipStep, check, found

WAYS = {
    "ipc": {"MPISYNC_DEVICE": "auto", "MPISYNC_TRANSPORT": "auto"},
    "pinned": {"MPISYNC_DEVICE": "cpu", "MPISYNC_TRANSPORT": "auto"},
    "messages": {"MPISYNC_DEVICE": "auto", "MPISYNC_TRANSPORT": "messages"},
}
TRANSPORTS = {"ipc": "CUDA IPC", "pinned": "shared memory", "messages": "messages"}


def _model(card: Card, dtype: torch.dtype = torch.float64, *, norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(64)] if norm else []
    return nn.Sequential(nn.Linear(32, 64), *middle, nn.Tanh(), nn.Linear(64, 8)).to(card.device, dtype)


def _batches(card: Card, dtype: torch.dtype = torch.float64) -> list[tuple[Any, Any]]:
    torch.manual_seed(1)
    pairs = [(torch.randn(16, 32), torch.randint(0, 8, (16,))) for _ in range(12)]
    return [(x.to(card.device, dtype), y.to(card.device)) for x, y in pairs]


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Any], steps: int,
    backward: Callable[[Any], None] | None = None, **more: Any,
) -> tuple[Any, list[Any]]:  # fmt: skip
    """Train by Session; return it, and this rank's verdicts."""
    from mpi4py import MPI

    verdicts = []
    with mpisync.Session(MPI.COMM_WORLD, model, optimizer, progress=False, **more) as session:
        for x, y in session.batches(batches, steps=steps):
            loss = F.cross_entropy(model(x), y)
            (torch.Tensor.backward if backward is None else backward)(loss)
            verdicts.append(session.step(loss))
    return session, verdicts


def _alone(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Any], steps: int) -> None:
    """Train as one process does, on the union of what the workers of this job draw."""
    from mpi4py import MPI

    workers = MPI.COMM_WORLD.size - 1
    for step in range(steps):
        for worker in range(workers):
            own = batches[worker::workers]
            x, y = own[step % len(own)]
            (F.cross_entropy(model(x), y) / workers).backward()
        optimizer.step()
        optimizer.zero_grad()


def _flat(model: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().flatten().double() for p in model.parameters()]).cpu().numpy()


def _ways() -> Iterator[str]:
    """Have the sessions of each turn go another way."""
    before = dict(os.environ)
    for way, environ in WAYS.items():
        os.environ.update(environ)
        yield way
        os.environ.clear()
        os.environ.update(before)


def _is_root() -> bool:
    from mpi4py import MPI

    return bool(MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1)


def _say(**figures: Any) -> None:
    if _is_root():
        found(**figures)


def _compare(card: Card, name: str, model: nn.Module, twin: nn.Module, most: float) -> None:
    """Compare parameters on all ranks, and say how far apart they are, and how far they have come."""
    from mpi4py import MPI

    everyone, alone = MPI.COMM_WORLD.allgather(_flat(model)), _flat(twin)
    apart = float(np.ptp(np.stack(everyone), axis=0).max())
    off = float(np.abs(everyone[-1] - alone).max())
    moved = float(np.abs(alone - _flat(_model(card, next(twin.parameters()).dtype))).max())
    _say(**{f"{name}_differs": off, f"{name}_moved": moved})
    most = min(most, moved / 4)  # else a model that was not trained would do
    check(apart == 0, f"{name}: ranks end with parameters that differ by {apart}")
    check(off <= most, f"{name}: parameters are {off} away from those of one process, and may be {most}")


def equal(card: Card) -> None:
    """Train with plain SGD and with momentum, all three ways, in four dtypes, with buffers and an average."""
    card.patch_sessions()
    batches = _batches(card)
    with tempfile.TemporaryDirectory() as folder:
        for way in _ways():
            for momentum in (0.0, 0.9):
                model, twin = _model(card), _model(card)
                record = str(Path(folder, f"{way}-{momentum}.jsonl"))
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
                _, verdicts = _train(model, optimizer, batches, 8, record=record)
                check(all(verdict.accepted for verdict in verdicts), f"{way}: a gradient did not count")
                _alone(twin, torch.optim.SGD(twin.parameters(), lr=0.1, momentum=momentum), batches, 8)
                _compare(card, f"{way}_momentum_{momentum}", model, twin, 1e-9)
                if _is_root():
                    header, _ = mpisync.records.read_record(record)
                    wanted = TRANSPORTS[way] if card.is_real or way != "ipc" else "stand-in"
                    check(set(header.transports) == {wanted}, f"{way}: gradients go by {set(header.transports)}")
    for dtype, most in ((torch.float32, 1e-5), (torch.float16, 0.02), (torch.bfloat16, 0.1)):
        model, twin, data = _model(card, dtype), _model(card, dtype), _batches(card, dtype)
        _train(model, torch.optim.SGD(model.parameters(), lr=0.1), data, 8)
        _alone(twin, torch.optim.SGD(twin.parameters(), lr=0.1), data, 8)
        _compare(card, str(dtype).removeprefix("torch."), model, twin, most)
    model = _model(card, norm=True)
    more = {"ema": 0.9, "clip_norm": 0.5}
    session, _ = _train(model, torch.optim.SGD(model.parameters(), lr=0.1), batches, 8, **more)
    state = [*model.state_dict().values(), *session.average.values()]
    check(all(bool(torch.isfinite(value).all()) for value in state), "a buffer or an average is not finite")
    check(all(value.device == torch.device(card.device) for value in state), "a tensor has left the card")
    _say(buffers_and_averages="finite, on the card")


def optimizers(card: Card) -> None:
    """Train with torch's Adam, fused and not, with AdamW, and with a GradScaler, beside one process."""
    card.patch_sessions()
    batches = _batches(card, torch.float32)
    kinds: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        "adam_fused": lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True),
        "adamw_foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
        "sgd_momentum_fused": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
    }
    for name, kind in kinds.items():
        model, twin = _model(card, torch.float32), _model(card, torch.float32)
        _train(model, kind(model.parameters()), batches, 8)
        _alone(twin, kind(twin.parameters()), batches, 8)
        _compare(card, name, model, twin, 1e-4)
    model, twin = _model(card, torch.float32), _model(card, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(torch.device(card.device).type, init_scale=2.0**10)

    def scaled(loss: Any) -> None:
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.update()

    _train(model, optimizer, batches, 8, scaled)
    _alone(twin, torch.optim.SGD(twin.parameters(), lr=0.1), batches, 8)
    _compare(card, "grad_scaler", model, twin, 1e-5)


def step_times(card: Card) -> None:
    """Time steps of 25M float32 parameters, all three ways: from the last header to the new version, and in all."""
    card.patch_sessions()
    width = 2236 if card.is_real else 32
    x = torch.randn(4, width, device=card.device)
    for way in _ways():
        for name, momentum in (("sgd", 0.0), ("momentum", 0.9)):
            torch.manual_seed(0)
            model = nn.Sequential(*(nn.Linear(width, width) for _ in range(5))).to(card.device)
            optimizer, records = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=momentum), []
            from mpi4py import MPI

            steps = card.times(33 if way == "ipc" else 13)
            policy = mpisync.BackupWorkers(0)
            with mpisync.Session(
                MPI.COMM_WORLD, model, optimizer, policy=policy, progress=False, on_step=records.append
            ) as session:
                for _ in session.batches([0] * 64, steps=steps):
                    loss = model(x).square().mean()
                    loss.backward()
                    session.step(loss)
            if records:
                late = records[min(3, len(records) - 2) :]
                published = [one.published_s for one in late]
                closing = [one.published_s - one.closed_s for one in late]
                _say(**{
                    f"{way}_{name}_ms": {
                        "last_header_to_version": round(1e3 * statistics.median(closing), 4),
                        "version_to_version": round(1e3 * statistics.median(np.diff(published).tolist()), 4),
                    }
                })  # fmt: skip


def dies(card: Card) -> None:
    """Train until a worker kills itself: what `death` starts."""
    from mpi4py import MPI

    card.patch_sessions()
    model, comm = _model(card), MPI.COMM_WORLD
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with mpisync.Session(comm, model, optimizer, policy=mpisync.BackupWorkers(1), progress=False) as session:
        for x, y in session.batches(_batches(card), steps=10**6):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            if comm.rank == 1 and session.version >= 20:
                os.kill(os.getpid(), signal.SIGKILL)
            session.step(loss)


def death(card: Card) -> None:
    """Kill a worker of a job of five: the job must end, say so, and leave nothing on the card."""
    before = card.memory.free_bytes()
    words = [sys.argv[0], "--step", "dies", *([] if card.is_real else ["--stand-in"])]
    if isinstance(command := starting.command(5, words), str):
        raise SkipStep(command)
    # in this step's group: who ends the step ends the launcher, which ends its ranks
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, said = process.communicate(timeout=60.0)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise AssertionError("a job whose worker was killed has not ended for 60 s") from None
    found(returncode=process.returncode, said=said.strip().splitlines()[-3:])
    check(process.returncode != 0, "a job whose worker was killed ended as if all was well")
    if card.is_real:
        found(free_before_bytes=before, free_after_bytes=card.memory.free_bytes())
    check(float(card.memory.to_host(card.array(np.ones(4)))[0]) == 1.0, "the card cannot be used any more")
