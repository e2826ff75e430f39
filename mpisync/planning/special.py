"""Special functions: scipy's, imported when they are first needed."""

from __future__ import annotations

from typing import Any

__all__ = ["special_functions"]


def special_functions() -> Any:
    """Return the module `scipy.special`.

    Raises:
        RuntimeError: There is no scipy.

    Example:
        >>> special_functions().ndtri(0.5).item()
        0.0
    """
    try:
        import scipy.special  # type: ignore[import-untyped]
    except ImportError:
        raise RuntimeError("this needs scipy: pip install 'mpisync[report]'") from None
    return scipy.special
