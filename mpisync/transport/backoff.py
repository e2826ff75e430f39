"""The sleeps between two looks, where nothing wakes a sleeper."""

from __future__ import annotations

import os
import time

_PATIENT_S, _SHORTEST_S, _LONG_S = 200e-6, 20e-6, 1e-3
LONGEST_S = 5e-3


class Backoff:
    """Sleeps that grow while nothing comes, and stay short while blocks are on their way.

    Blocks move only inside MPI calls, so the core is first offered to others without sleeping. The longest sleeps come
    only after about 50 ms, of which they are a small part.
    """

    def __init__(self) -> None:
        self._idle_s = _SHORTEST_S

    def reset(self) -> None:
        """Begin again with the shortest sleep, since something came."""
        self._idle_s = _SHORTEST_S

    def sleep(self, timeout_s: float, *, busy: bool) -> None:
        """Sleep a little, at most `timeout_s`.

        Args:
            timeout_s: The longest sleep.
            busy: Whether blocks are on their way.
        """
        if busy and self._idle_s < _PATIENT_S:
            os.sched_yield()
            self._idle_s *= 1.1
            return
        time.sleep(min(self._idle_s, timeout_s))
        longer_s = self._idle_s * (2 if self._idle_s < _LONG_S else 1.1)
        self._idle_s = min(longer_s, _PATIENT_S if busy else LONGEST_S)
