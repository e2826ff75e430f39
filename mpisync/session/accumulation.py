"""The batches that a worker has drawn since its last step, one or several: those of one gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from mpisync.data.batch_size import doubt
from mpisync.data.batches import Batches
from mpisync.data.retry import RetriedBatches

_MANY_BATCHES = 100  # without a step: it seems to be forgotten


class AccumulatedBatches(NamedTuple):
    """The batches that a gradient was computed from, in sum."""

    samples: int  # that it is the mean of, as the loop says where it says so
    drawn: int  # samples in its batches
    data_s: float  # waited for them
    batches: int
    fingerprint: int = 0  # of what is in them


class Accumulation:
    """The batches since the last step.

    As in torch, ``backward`` adds to the gradients that are there: a loop that goes on without `step` accumulates, and
    the gradient is then of all these batches. A batch that left no gradient was passed over and is none of them; nor
    are those before an ``optimizer.zero_grad()``, as in a loop that begins with it and skips steps.

    Args:
        parameters: Those that are trained.
        optimizers: Theirs; they are watched until `close`.
        weighted: Whether gradients count by their samples, which must then be certain.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], optimizers: Sequence[Optimizer], *, weighted: bool) -> None:
        self._parameters, self._weighted = parameters, weighted
        self._since_step = 0
        self._forget()
        self._watched = [(optimizer, vars(optimizer).get("zero_grad")) for optimizer in optimizers]
        for index, optimizer in enumerate(optimizers):
            vars(optimizer)["zero_grad"] = partial(self._begin_anew, index, optimizer.zero_grad)

    def _forget(self) -> None:
        self._batches, self._samples, self._data_s, self._fingerprint = 0, 0, 0.0, 0
        self._doubt = ""  # why the samples may be others
        self._newest = self._void = 0  # samples of the newest batch, and of those that are no part of the gradient
        self._zeroed: set[int] = set()  # optimizers, since the newest batch
        self._had_gradient = False  # when the first of them was

    def _begin_anew(self, index: int, zero_grad: Callable[..., None], *args: Any, **options: Any) -> None:  # noqa: ANN401
        if not self._zeroed:
            self._had_gradient = self.has_gradient()
        self._zeroed.add(index)
        if self._had_gradient and len(self._zeroed) == len(self._watched):  # what one has left still counts
            self._void = self._samples - self._newest
        zero_grad(*args, **options)

    def add(self, data: Batches | RetriedBatches, batch: Any) -> None:
        """Take note of the newest batch."""
        if self._weighted:
            self._doubt = self._doubt or doubt(batch)
        if self._zeroed:
            self._zeroed.clear()
        self._batches += 1
        self._newest = data.batch_samples
        self._samples += data.batch_samples
        self._data_s += data.data_s
        self._fingerprint = (31 * self._fingerprint + data.fingerprint) & 0xFFFFFFFF
        self._since_step += 1

    def has_gradient(self) -> bool:
        """Say whether any parameter has a gradient."""
        return any(parameter.grad is not None for parameter in self._parameters)

    def goes_on(self) -> bool:
        """Say whether the next batch adds to a gradient that has been begun; asked before it is drawn."""
        if self._since_step == _MANY_BATCHES:
            warnings.warn(
                f"{_MANY_BATCHES} batches were drawn since the last session.step(loss), and no gradient counts without "
                "it: call it after loss.backward(), for every batch or for every few (a loop that skips every batch, "
                "by `continue`, never ends)",
                stacklevel=3,
            )
        return self._batches > 0

    def passed(self) -> AccumulatedBatches | None:
        """Return the batches that the loop passed over, now that it asks for the next; None if there is a gradient."""
        if not self._batches or self.has_gradient():
            return None
        basis = AccumulatedBatches(self._samples, self._samples, self._data_s, self._batches)
        self._forget()
        return basis

    def take(self, samples: int | None, *, is_vain: Callable[[], bool] = bool) -> AccumulatedBatches:
        """End a gradient: the next batch begins another.

        Args:
            samples: How many it is the mean of, if the loop says so.
            is_vain: Whether it will be late for sure, so that it may be given up before `backward`.

        Raises:
            RuntimeError: No batch was drawn for it, or none of the parameters has a gradient.
            ValueError: It is the mean of no sample, or nobody knows of how many although it counts by them.
        """
        if not self._batches:
            raise RuntimeError(
                "session.step must follow a batch of session.batches, or several, each drawn after the step before it"
            )
        if not self.has_gradient() and not is_vain():
            raise RuntimeError(
                "no parameter has a gradient: call loss.backward() before session.step(loss), no zero_grad() between"
            )
        if samples is None and self._doubt:
            raise ValueError(
                f'weight="samples" needs the number of samples, and {self._doubt}: pass session.step(loss, samples=...)'
            )
        own = self._samples - self._void if samples is None else samples
        basis = AccumulatedBatches(own, self._samples, self._data_s, self._batches, self._fingerprint)
        if basis.samples < 1:
            raise ValueError(f"a gradient must be the mean of at least 1 sample, not {basis.samples}")
        self._forget()
        self._since_step = 0
        return basis

    def drop(self) -> None:
        """Give up a gradient that will not be ended."""
        if self._batches:
            for parameter in self._parameters:
                parameter.grad = None
            self._forget()

    def close(self) -> None:
        """Let the optimizers be as they were."""
        for optimizer, own in self._watched:
            del vars(optimizer)["zero_grad"]
            if own is not None:
                vars(optimizer)["zero_grad"] = own
