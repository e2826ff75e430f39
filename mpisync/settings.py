"""The environment variables that mpisync reads, in one table.

The command line goes before the environment, and the environment before code: `mpisync run` writes
its options into the environment of the ranks, and `read` prefers the environment to code's wish.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

PREFIX = "MPISYNC_"


@dataclass(frozen=True, slots=True)
class Setting:
    """One environment variable; `parse` reads its text and raises ValueError on nonsense."""

    name: str
    parse: Callable[[str], object]
    default: object
    help: str


def seconds(text: str) -> float:
    """Parse a number of seconds."""
    value = float(text)
    if not value > 0:
        raise ValueError("must be greater than 0")
    return value


def flag(text: str) -> bool:
    """Parse a boolean."""
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in words:
        raise ValueError("must be 1 or 0")
    return words[text.lower()]


def columns(text: str) -> int:
    """Parse the width of a terminal."""
    value = int(text)
    if value < 1:
        raise ValueError("must be greater than 0")
    return value


def device(text: str) -> str:
    """Parse the name of a device."""
    kind, _, index = text.partition(":")
    if text not in ("auto", "cpu", "cuda") and not (kind == "cuda" and index.isdecimal()):
        raise ValueError("must be auto, cpu, or a card as cuda:0")
    return text


SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting("MPISYNC_POLICY", str, None, "the policy, in place of the script's own"),
        Setting(
            "MPISYNC_TRANSPORT", str, "auto", "how gradients travel; auto: by the first transport that reaches a worker"
        ),
        Setting(
            "MPISYNC_DEVICE",
            device,
            "auto",
            "where the root reduces: cpu, cuda:0, or auto: where its model, or `like`, is",
        ),
        Setting(
            "MPISYNC_START_TIMEOUT_S", seconds, 300.0, "how long ranks wait for each other at the start"
        ),
        Setting(
            "MPISYNC_STALL_REPORT_S", seconds, 10.0, "after how long a wait is reported, and why it lasts"
        ),
        Setting(
            "MPISYNC_GRACE_S", seconds, 60.0, "how long the root waits for late workers at the end"
        ),
        Setting(
            "MPISYNC_COLUMNS",
            columns,
            None,
            "the width of the terminal that shows the ranks' stderr; `mpisync run` sets it, since ranks see a pipe",
        ),
        Setting(
            "MPISYNC_READ_ONLY", flag, False, "for debugging: a worker's write to shared parameters ends at its line"
        ),
    )
}


def read(
    name: str, code: object = None, *, environ: Mapping[str, str] = os.environ
) -> object:
    """Return a setting's value: the environment's, else the one given by code, else the default.

    Args:
        name: a name in `SETTINGS`.
        code: what the caller's code asks for; None where it asks for nothing.
        environ: the environment to look in.

    Raises:
        ValueError: the variable's text is not one that the setting takes.
    """
    setting = SETTINGS[name]
    text = environ.get(name, "")
    if not text:
        return setting.default if code is None else code
    try:
        return setting.parse(text)
    except ValueError as error:
        raise ValueError(f"{name}={text!r}: {error}") from None


def seconds_of(name: str) -> float:
    """Return the value of a setting that is a number of seconds."""
    value = read(name)
    assert isinstance(value, float)
    return value


def unknown(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the variables that carry the prefix but are no settings, as misspelt ones do."""
    return sorted(name for name in environ if name.startswith(PREFIX) and name not in SETTINGS)
