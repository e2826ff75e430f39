"""A session of one process: the same loop, without anyone to wait for."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from mpisync.aggregation.verdict import Verdict
from mpisync.session.data import Batches
from mpisync.session.drawn import Drawn
from mpisync.session.ended import Averages
from mpisync.session.flat import FlatModel
from mpisync.session.guards import forbid_steps
from mpisync.session.refusals import check_model_and_optimizer
from mpisync.session.update import Update

if TYPE_CHECKING:
    from mpisync.session.session import Settings


class Alone:
    """Trains in this process."""

    worker = 0
    workers = 1
    makes_updates = True

    def __init__(self, model: nn.Module, optimizer: Optimizer, settings: Settings) -> None:
        check_model_and_optimizer(model, optimizer)
        print(
            f"mpisync: one process trains alone, so the policy {settings.policy} is ignored; start "
            "it with `mpisync run -n 5 ...` or mpirun for workers and a root",
            file=sys.stderr,
            flush=True,
        )
        self.version = 0
        self._settings, self._optimizer = settings, optimizer
        self._flat = FlatModel(model)
        self._averages = [p.detach().clone() for p in self._flat.parameters]
        self._update = Update(
            self._flat.parameters,
            optimizer,
            settings.scheduler,
            settings.clip_norm,
            settings.ema,
            self._averages,
        )
        self._trap = forbid_steps(optimizer, settings.scheduler)
        self._drawn = Drawn(self._flat.parameters)
        self._stopped = False

    def batches(self, loader: Iterable[Any], steps: int | None) -> Iterator[Any]:
        """Yield batches until there were `steps` updates."""
        data = Batches(loader, worker=0, workers=1, seed=self._settings.seed)
        try:
            while not self._stopped and (steps is None or self.version < steps):
                batch, _ = next(data)
                self._drawn.add(data)
                yield batch
                self._drawn.goes_on()
            self._drawn.drop()
        finally:
            data.close()

    def step(self, loss: float, samples: int | None) -> Verdict:
        """Update from the gradient, unless it has NaN or Inf."""
        self._drawn.take(samples)
        gradients = [p.grad for p in self._flat.parameters if p.grad is not None]
        step = self.version
        finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        if finite:
            self._trap.undo()
            self._update.apply()
            self._trap = forbid_steps(self._optimizer, self._settings.scheduler)
            self.version += 1
        for parameter in self._flat.parameters:
            parameter.grad = None
        reason = "" if finite else "the gradient has NaN or Inf"
        return Verdict(step, finite, 0, self.version, reason, 0.0)

    def stale(self) -> bool:
        """Nobody makes newer parameters."""
        return False

    def stop(self) -> None:
        """End the loop."""
        self._stopped = True

    def fill(self, twin: FlatModel, *, average: bool) -> None:
        """Write the parameters, or their average, into a copy of the model."""
        if average:
            for own, value in zip(twin.parameters, self._averages, strict=True):
                own.data.copy_(value)

    @property
    def averages(self) -> Averages | None:
        """Each parameter with its average."""
        if self._settings.ema is None:
            return None
        return list(zip(self._flat.parameters, self._averages, strict=True))

    def leave(self, error: BaseException | None) -> None:
        """Give the optimizer its step back."""
        self._trap.undo()
