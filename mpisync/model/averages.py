"""The initial values of a moving average: the parameters' own, or those with which an earlier run ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mpisync.model.flat import FlatModel
from mpisync.model.signature import describe, plain_name


def initial_average(flat: FlatModel, kept: Mapping[str, Any] | None) -> list[Tensor]:
    """Return a tensor for each parameter that travels, from which its average goes on.

    Args:
        flat: The model.
        kept: The averages of an earlier run, by name, beside which there may be other values; None for a new run.

    Raises:
        TypeError: It is no state.
        ValueError: A parameter has no average there, or one of another shape or dtype.
    """
    parameters = [parameter.detach() for parameter in flat.parameters]
    if kept is None:
        return parameters
    if not isinstance(kept, Mapping):
        raise TypeError(
            "average must be what session.state_dict()['average'] was on the root, or session.average, not a "
            f"{type(kept).__name__}"
        )
    tensors = {plain_name(name): value for name, value in kept.items()}
    values = []
    for name, parameter in zip(flat.names, parameters, strict=True):
        value = tensors.get(name)
        if not isinstance(value, Tensor):
            raise ValueError(
                f"average has no tensor for parameter {name!r}: pass what session.state_dict()['average'] was on the "
                "root of a session of the same model"
            )
        here, there = describe(parameter.shape, parameter.dtype), describe(value.shape, value.dtype)
        if here != there:
            raise ValueError(f"average has {there} for parameter {name!r}, which is {here}")
        values.append(value.detach())
    return values
