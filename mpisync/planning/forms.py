"""Delay laws by their command-line form."""

from __future__ import annotations

import dataclasses
from typing import Any

from mpisync.planning.composite import Composite, chen2016
from mpisync.planning.empirical import Empirical
from mpisync.planning.laws import DelayLaw, Exponential, Lognormal, Pareto, ShiftedExponential, Weibull

__all__ = ["LAW_FORMS", "parse_law"]

_LAWS: dict[str, type[Any]] = {
    "exponential": Exponential,
    "shifted": ShiftedExponential,
    "pareto": Pareto,
    "lognormal": Lognormal,
    "weibull": Weibull,
    "composite": Composite,
}
LAW_FORMS = (
    "exponential:mean=S, shifted:shift=S,excess=S, pareto:scale=S,alpha=A, lognormal:median=S,sigma=X, "
    "weibull:scale=S,shape=K, composite:median=S,sigma=X,..., chen2016, empirical:FILE.csv"
)
"""The forms that `parse_law` takes."""


def parse_law(text: str) -> DelayLaw:
    """Make the delay law that a command line names; `str` of a law gives the text again.

    Args:
        text: For example `lognormal:median=1.45,sigma=0.09`; times are in seconds, and every value is
            given by name. `chen2016` is the calibrated law of that paper's study.

    Raises:
        ValueError: The text names no law, or one with values that it refuses.
        OSError: The file of an empirical law cannot be read.

    Example:
        >>> parse_law("pareto:scale=1,alpha=2.5")
        Pareto(scale_s=1.0, alpha=2.5)
    """
    name, _, values = text.strip().partition(":")
    if name == "chen2016" and not values:
        return chen2016()
    if name == "empirical" and values:
        from mpisync.planning.observed import read_times

        return Empirical(read_times(values).times_s, values)
    if name not in _LAWS:
        raise ValueError(f"a delay law must be one of {LAW_FORMS}; not {text!r}")
    law: DelayLaw = _LAWS[name](**_arguments(name, values))
    return law


def _arguments(name: str, values: str) -> dict[str, float]:
    fields = {field.name.removesuffix("_s"): field for field in dataclasses.fields(_LAWS[name])}
    arguments: dict[str, float] = {}
    for part in values.split(",") if values else ():
        key, _, value = part.strip().partition("=")
        if key not in fields or fields[key].name in arguments:
            known = ", ".join(fields)
            raise ValueError(f"the law {name} has the values {known}, each once as NAME=VALUE; not {part!r}")
        try:
            arguments[fields[key].name] = float(value)
        except ValueError:
            raise ValueError(f"{key} of the law {name} must be a number, not {value!r}") from None
    missing = [k for k, f in fields.items() if f.default is dataclasses.MISSING and f.name not in arguments]
    if missing:
        raise ValueError(f"the law {name} needs {' and '.join(missing)}: write it as in {LAW_FORMS}")
    return arguments
