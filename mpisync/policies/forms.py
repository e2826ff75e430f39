"""Policies by their command-line form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpisync.policies.adaptive import Adaptive
from mpisync.policies.asynchronous import Async
from mpisync.policies.backup import BackupWorkers
from mpisync.policies.base import Policy
from mpisync.policies.deadline import Deadline
from mpisync.policies.replay import Replay

__all__ = ["parse_policy"]

_FORMS: dict[str, tuple[Callable[..., Policy], dict[str, Callable[[str], Any]]]] = {
    "backup": (BackupWorkers, {"backup": int}),
    "deadline": (Deadline, {"seconds": float, "at_least": int, "grace": float, "mads": float}),
    "async": (Async, {"k": int, "max_staleness": int}),
    "adaptive": (Adaptive, {"at_least": int, "at_most": int, "noise_scale": float}),
}
_USAGE = (
    "backup:B, deadline:SECONDS,at_least=N,grace=SECONDS,mads=M, async:k=K,max_staleness=S, "
    "adaptive:at_least=N,at_most=N,noise_scale=NC, replay:PATH"
)


def parse_policy(text: str) -> Policy:
    """Make the policy that a command line names; `str` of a policy gives the text again.

    The first value may go without its name; values left out have their defaults.

    Args:
        text: For example `backup:1`, `deadline:0.5,at_least=3,grace=0.1`,
            `async:k=2,max_staleness=4` or `replay:PATH`.

    Raises:
        ValueError: The text names no policy, or one with values that it refuses.
        OSError: The record to replay cannot be read.

    Example:
        >>> parse_policy("deadline:0.5,at_least=3")
        Deadline(seconds=0.5, at_least=3, grace=0.0, mads=None)
        >>> str(parse_policy("async"))
        'async:k=1'
    """
    name, _, values = text.strip().partition(":")
    if name == "replay" and values:
        return Replay(values)
    if name not in _FORMS:
        raise ValueError(f"a policy must be one of {_USAGE}, not {text!r}")
    make, types = _FORMS[name]
    try:
        return make(**_arguments(values, types))
    except TypeError:  # no policy has a default for the number that is its point
        raise ValueError(f"{name} needs its {next(iter(types))}: write it as in {_USAGE}") from None


def _arguments(values: str, types: dict[str, Callable[[str], Any]]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for place, part in enumerate(values.split(",") if values else ()):
        name, named, value = part.strip().rpartition("=")
        if not named and place == 0:
            name = next(iter(types))
        if name not in types or name in arguments:
            raise ValueError(
                f"a policy's values are {', '.join(types)}, each once and after the first as "
                f"NAME=VALUE; not {part!r}"
            )
        try:
            arguments[name] = types[name](value)
        except ValueError:
            raise ValueError(
                f"{name} must be {'a whole' if types[name] is int else 'a'} number, not {value!r}"
            ) from None
    return arguments
