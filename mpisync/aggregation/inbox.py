"""The root's inbox: headers in the order in which their gradients were complete, whatever order it heard them in."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence

from mpisync.aggregation.members import Member
from mpisync.transport.base import RootLink
from mpisync.transport.peers import Peer
from mpisync.transport.wire import Header

Heard = tuple[float, float, Header]  # time of completion, a number drawn to break ties, header


class Inbox:
    """The headers of all links, in one order.

    Args:
        links: One a transport.
        members: All workers, by number.
        me: The root's process.
        clock: Monotonic seconds; that of the workers on this node.
        ties: Breaks ties.

    Attributes:
        metrics: (version, value) of each evaluation that workers told of, until `take_metrics`.
    """

    def __init__(
        self,
        links: Sequence[RootLink],
        members: Sequence[Member],
        me: Peer,
        clock: Callable[[], float],
        ties: random.Random,
    ) -> None:
        self._links, self._members, self._me = links, members, me
        self._clock, self._ties = clock, ties
        self._kept: deque[Heard] = deque()
        self.metrics: list[tuple[int, float]] = []

    def take(self) -> deque[Heard]:
        """Return all headers that have come and were not handled yet, first completed first.

        Whoever handles an entry removes it; what is left is part of the next answer too.
        """
        headers = [header for link in self._links for header in link.headers()]
        if not headers:
            return self._kept
        now_s = self._clock()  # after the last look: no stamp on this node is later
        heard = list(self._kept)
        for header in headers:
            near = self._members[header.worker].peer.shares_kernel(self._me)
            at_s = min(header.stamp_s, now_s) if near else now_s
            heard.append((at_s, self._ties.random(), header))
            if header.info.metric_version >= 0:
                self.metrics.append((header.info.metric_version, header.info.metric))
        heard.sort(key=lambda entry: entry[:2])
        self._kept = deque(heard)
        return self._kept

    def take_metrics(self) -> list[tuple[int, float]]:
        """Return the metrics that came since they were last taken."""
        if not (metrics := self.metrics):
            return metrics
        self.metrics = []
        return metrics
