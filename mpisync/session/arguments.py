"""The numbers that users hand in, checked where they are handed in: no struct or array fails on them later."""

from __future__ import annotations

import math
import operator
from typing import Any

_MOST = 2**63  # what a message's or a record's 64 bits hold


def whole(name: str, value: Any, least: int) -> int:
    """Return a whole number of at least `least`.

    Raises:
        TypeError: It is none, though it may look like one (2.0, "2", True).
        ValueError: It is too small, or too large for 64 bits.

    Example:
        >>> whole("steps", 2.5, 0)
        Traceback (most recent call last):
        ...
        TypeError: steps must be a whole number, not 2.5
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # torch's, of several elements
        number = None
    if number is None:
        raise TypeError(f"{name} must be a whole number, not {shown(value)}")
    if not least <= number < _MOST:
        raise ValueError(f"{name} must be at least {least} and below 2**63, not {number}")
    return number


def number(name: str, value: Any) -> float:
    """Return one number, also one out of an array or a tensor of a single element.

    Raises:
        TypeError: It is no number, several, or complex.

    Example:
        >>> import numpy as np
        >>> number("loss", np.zeros((2, 3)))
        Traceback (most recent call last):
        ...
        TypeError: loss must be one number, not a ndarray of shape [2, 3]; reduce it first, as loss.mean() does
    """
    try:
        plain = value.item() if hasattr(value, "item") else value
        if not isinstance(plain, bool | str | bytes | bytearray):
            return float(plain)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise TypeError(f"{name} must be one number, not {shown(value)}")


def optional_number(name: str, value: Any) -> float:
    """Return one number; NaN for None."""
    return math.nan if value is None else number(name, value)


def shown(value: Any) -> str:
    """Describe a value that was refused: what it is, or for arrays of which shape."""
    try:
        shape = getattr(value, "shape", None)
    except RuntimeError:  # a nested tensor has none
        shape = ()
    if shape is None or not hasattr(value, "dtype"):
        text = repr(value)
        return text if len(text) <= 60 else f"a {type(value).__name__}"
    kind = f"a {type(value).__name__} of shape {list(shape)}"
    return kind if not shape else f"{kind}; reduce it first, as loss.mean() does"
