"""A session behind its `with`: the model is the user's own again, and nobody is left to talk to."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

from torch import Tensor, nn

from mpisync.model.flat import FlatModel
from mpisync.session.loop import LoopOptions

Averages = Sequence[tuple[nn.Parameter, Tensor]]


class EndedRole:
    """What a rank was, and what it may still be asked.

    Args:
        worker: The number that it had; None at the root.
        workers: How many workers there were.
        version: The final one.
        makes_updates: Whether this rank's optimizer made them.
        averages: Each parameter with its average; None where none was kept.
        samples: What a run that goes on from here needs to know of the samples.
    """

    def __init__(
        self,
        worker: int | None,
        workers: int,
        version: int,
        makes_updates: bool,
        averages: Averages | None,
        samples: dict[str, Any],
    ) -> None:
        self.worker, self.workers, self.version = worker, workers, version
        self.makes_updates, self.averages = makes_updates, averages
        self._samples = samples

    def samples(self) -> dict[str, Any]:
        """Every worker's account and place in the data, as they were at the end."""
        return self._samples

    def batches(self, loader: Iterable[Any], extent: LoopOptions) -> Iterator[Any]:
        """No batch follows."""
        raise RuntimeError("the session has ended: its loop belongs inside the `with`; make another session")

    def step(self, loss: float, samples: int | None, cost: float) -> NoReturn:
        """No step follows."""
        raise RuntimeError("the session has ended: call session.step inside session.batches only")

    def stale(self) -> bool:
        """No step is open."""
        return True

    def stop(self) -> None:
        """It has ended."""

    def fill(self, twin: FlatModel, *, average: bool) -> int:
        """Write the averages into a copy of the model, which else is right as it is; their version."""
        if average:
            if self.averages is None:
                raise RuntimeError("there is no average: the session ended by an error")
            for own, (_, value) in zip(twin.parameters, self.averages, strict=True):
                own.data.copy_(value)
        return self.version

    def leave(self, error: BaseException | None) -> NoReturn:
        """It was left before."""
        raise RuntimeError("the session has ended: make another one, one for each `with`")


def averaged_state(model: nn.Module, averages: Averages) -> dict[str, Any]:
    """Return the model's state_dict with the averages in place of their parameters.

    Its tensors are the averages themselves and copies of the model's others.
    """
    own = [parameter.data for parameter, _ in averages]
    try:
        for parameter, average in averages:
            parameter.data = average
        state: dict[str, Any] = model.state_dict()
    finally:
        for (parameter, _), data in zip(averages, own, strict=True):
            parameter.data = data
    private = {average.untyped_storage().data_ptr() for _, average in averages}
    for name, value in list(state.items()):
        if not (isinstance(value, Tensor) and value.untyped_storage().data_ptr() in private):
            state[name] = copy.deepcopy(value)
    return state
