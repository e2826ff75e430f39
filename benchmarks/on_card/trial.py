"""Steps that fail in all ways that a step can: the tests try benchmarks/gpu.py by them."""

from __future__ import annotations

import os
import signal
import time

from on_card.card import SkipStep, check, found


def right(_: bool) -> None:
    """Find something."""
    found(one=1)
    found(two=[2.5])


def wrong(_: bool) -> None:
    """Find something, and that something else is not right."""
    found(one=1)
    check(False, "two is not one")


def hanging(_: bool) -> None:
    """Find something, and never end, whatever is said to it."""
    found(one=1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1000)


def killed(_: bool) -> None:
    """End as a process does that is out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def skipped(_: bool) -> None:
    """Be impossible here."""
    raise SkipStep("there is no second card")
