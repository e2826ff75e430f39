"""Where gradients and parameters are in a simulated run, and when they come."""

from __future__ import annotations

from collections import deque

from mpisync.planning.costs import Costs
from mpisync.policies import Arrival

__all__ = ["Network"]


class Network:
    """The links of a run and what is on them; times are in seconds since its beginning.

    Attributes:
        queue: Announced gradients that the root has not asked for, first come first.
        wanted: Those that it has asked for, by worker.
    """

    def __init__(self, costs: Costs, workers: int) -> None:
        self.costs = costs
        self.queue: deque[Arrival] = deque()
        self.wanted: dict[int, Arrival] = {}
        self._home = costs.nodes - 1
        self._node = [costs.node_of(worker, workers) for worker in range(workers)]
        self._is_near = [costs.is_near(node) for node in self._node]
        self._is_home = [near and node == self._home for near, node in zip(self._is_near, self._node, strict=True)]
        self._come: dict[int, int] = {}  # worker: sequence of the gradient whose bytes are all here
        self._has = [0] * workers  # the version that a far worker has
        self._reached_s = [0.0] * costs.nodes  # when each node has the newest version
        self._in_s = self._out_s = 0.0  # when the root's link is free again
        self._pending = [0] * costs.nodes  # accepted gradients not in a sum yet
        self._accepted_s = [0.0] * costs.nodes

    # -- parameters --------------------------------------------------------------------------------

    def published(self, version: int, at_s: float) -> None:
        """A version is out: begin to send it to the nodes."""
        self._pending = [0] * self.costs.nodes
        if self.costs.topology == "tree":
            for node in range(self._home):
                self._out_s = max(self._out_s, at_s) + self.costs.link_s
                self._reached_s[node] = self._out_s + self.costs.latency_s

    def served_s(self, worker: int, version: int, at_s: float) -> float:
        """When a worker has the newest version and goes on, if it may from `at_s` on."""
        if self._is_home[worker]:
            return at_s + self.costs.wake_s
        costs, told_s = self.costs, at_s + self.costs.latency_s
        if self._is_near[worker]:
            return max(told_s, self._reached_s[self._node[worker]]) + costs.wake_s
        if self._has[worker] == version:
            return told_s
        self._has[worker] = version
        self._out_s = max(self._out_s, at_s) + costs.link_s
        return self._out_s + costs.latency_s

    # -- gradients ---------------------------------------------------------------------------------

    def heard_s(self, worker: int, done_s: float) -> tuple[float, float]:
        """When the header of a computed gradient comes to the root, and its time of arrival."""
        if self._is_home[worker]:
            return done_s + self.costs.wake_s, done_s  # its worker stamps it, by the same clock
        heard_s = done_s + self.costs.latency_s
        if self._is_near[worker]:
            heard_s += self.costs.wake_s
        elif self.costs.is_inline:
            heard_s += self.costs.link_s
        return heard_s, heard_s

    def is_whole(self, arrival: Arrival) -> bool:
        """Whether every byte of a gradient is where it will be folded."""
        if self._is_near[arrival.worker] or self.costs.is_inline:
            return True
        return self._come.get(arrival.worker) == arrival.sequence

    def payload_s(self, arrival: Arrival, now_s: float) -> float:
        """Ask for a gradient; when its last byte will have come."""
        self.wanted[arrival.worker] = arrival
        self._in_s = max(self._in_s, now_s + self.costs.latency_s) + self.costs.link_s
        return self._in_s + self.costs.latency_s

    def came(self, arrival: Arrival) -> bool:
        """Take note that a gradient is whole; whether anybody still wants it."""
        wanted = self.wanted.get(arrival.worker)
        if wanted is None or wanted.sequence != arrival.sequence:
            return False
        del self.wanted[arrival.worker]
        self._come[arrival.worker] = arrival.sequence
        return True

    def drop(self, worker: int) -> None:
        """Fetch a worker's gradient no more, if it is not whole."""
        self.wanted.pop(worker, None)
        if self.queue:
            self.queue = deque(one for one in self.queue if one.worker != worker)

    # -- folding -----------------------------------------------------------------------------------

    def _folder(self, worker: int) -> int:
        """The node whose aggregator folds this worker's gradients."""
        return self._home if self.costs.topology == "star" else self._node[worker]

    def accepted(self, worker: int, idle_s: float, now_s: float) -> float:
        """Count a gradient to be folded; until when the root is busy with those before it.

        Args:
            worker: Whose it is.
            idle_s: Until when the root had nothing else to do.
            now_s: When it was accepted.
        """
        node, busy_s = self._folder(worker), 0.0
        begins_s = self._accepted_s[node] + self.costs.fold_after_s
        if self._pending[node] and idle_s >= begins_s:
            if node == self._home:
                busy_s = begins_s + self.costs.pass_s(self._pending[node])
            self._pending[node] = 0
        self._pending[node] += 1
        self._accepted_s[node] = now_s
        return busy_s

    def pending(self, now_s: float) -> list[int]:
        """Of each node, how many accepted gradients are in no sum yet."""
        folded_s = self.costs.fold_after_s
        return [
            count if now_s < accepted_s + folded_s else 0
            for count, accepted_s in zip(self._pending, self._accepted_s, strict=True)
        ]
