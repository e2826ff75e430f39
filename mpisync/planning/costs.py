"""What messages and the root cost in a simulated run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Costs"]

Topology = Literal["star", "tree", "sharded"]
TOPOLOGIES = ("star", "tree", "sharded")
_LEAST_FOLD_BYTES_PER_S = 10e9  # the root waits for a fuller pass as long as one takes at this rate
_FOLD_AFTER_S = 1e-3  # and so long at least
INLINE_BYTES = 16 << 10  # a gradient of no more rides in its header's message


@dataclass(frozen=True)
class Costs:
    """What it costs that workers and root are not one: messages, folding, the update, waking up.

    The workers stand in equal blocks on `nodes` nodes; the root is on the last. On a node gradients
    and parameters lie in shared memory, if it is `shared`, and only news of them travels; from node
    to node they go over links with a latency and a bandwidth each way.

    * star: workers of other nodes send their gradients to the root, once it asks for them, and are
      sent the parameters, one after another over the root's link.
    * tree: each node's relay sums what was accepted there and sends the root one partial sum; the
      root sends the relays the parameters.
    * sharded: each node's aggregator owns an equal part of the parameters, so that every link
      carries B·(M − 1)/M of sums and as much of parameters, for gradients of B bytes on M nodes.

    What each step costs follows from these fields alone; all are free by default.

    Attributes:
        topology: How gradients and parameters travel between nodes.
        nodes: How many there are.
        shared: Whether a node's workers share memory with its aggregator; a star may do without.
        gradient_bytes: Size of a gradient, and of the parameters.
        latency_s: Of a message from node to node, or between processes that share no memory.
        bandwidth_bytes_per_s: Of each node's link, in each direction.
        wake_s: From news on a node until who waits for it goes on.
        header_s: The root's work for one gradient, but for its bytes.
        fold_bytes_per_s: How fast a pass that folds k gradients moves them and the sum, k + 1 arrays.
        update_s: The optimizer's update of all parameters.
        publish_s: The root's work to publish a version, but for its bytes on links.

    Example:
        >>> costs = Costs("sharded", nodes=4, gradient_bytes=100_000_000, bandwidth_bytes_per_s=1e9)
        >>> round(costs.reduce_s([2, 2, 2, 2]), 6), round(costs.publication_s, 6)  # 75 MB each
        (0.075, 0.075)
    """

    topology: Topology = "star"
    nodes: int = 1
    shared: bool = True
    gradient_bytes: int = 0
    latency_s: float = 0.0
    bandwidth_bytes_per_s: float = math.inf
    wake_s: float = 0.0
    header_s: float = 0.0
    fold_bytes_per_s: float = math.inf
    update_s: float = 0.0
    publish_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no machine has."""
        if self.topology not in TOPOLOGIES:
            raise ValueError(f"topology must be {', '.join(TOPOLOGIES)}, not {self.topology!r}")
        if self.nodes < 1:
            raise ValueError(f"nodes must be at least 1, not {self.nodes}: 1 is a single machine")
        for name in ("gradient_bytes", "latency_s", "wake_s", "header_s", "update_s", "publish_s"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, not {value!r}")
        if self.topology != "star" and not self.shared:
            raise ValueError(f"a {self.topology} needs workers that share memory with their node's aggregator")
        for name in ("bandwidth_bytes_per_s", "fold_bytes_per_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, not {getattr(self, name)!r}")

    def node_of(self, worker: int, workers: int) -> int:
        """The node on which a worker stands; the root stands on the last."""
        return worker * self.nodes // workers

    def is_near(self, node: int) -> bool:
        """Whether a node's workers hand over their gradients without sending them to the root."""
        return self.shared and (node == self.nodes - 1 or self.topology != "star")

    @property
    def is_inline(self) -> bool:
        """Whether gradients are so small that they ride in their headers' messages."""
        return self.gradient_bytes <= INLINE_BYTES

    @property
    def link_s(self) -> float:
        """How long a gradient or all parameters keep a link busy."""
        return self.gradient_bytes / self.bandwidth_bytes_per_s

    @property
    def fold_after_s(self) -> float:
        """How long after the last acceptance an idle root folds what it has."""
        return max(self.gradient_bytes / _LEAST_FOLD_BYTES_PER_S, _FOLD_AFTER_S)

    def pass_s(self, gradients: int) -> float:
        """How long one pass takes that folds so many gradients into the sum."""
        return (gradients + 1) * self.gradient_bytes / self.fold_bytes_per_s if gradients else 0.0

    def reduce_s(self, pending: Sequence[int]) -> float:
        """From the last gradient of a step until the mean is whole.

        Args:
            pending: Of each node, how many of its accepted gradients are in no sum yet.
        """
        fold_s, others = self.pass_s(max(pending)), self.nodes - 1
        if self.topology == "star" or not others:
            return fold_s
        asked_s = 2 * self.latency_s + fold_s
        if self.topology == "tree":
            return asked_s + others * self.link_s + self.pass_s(others)
        share = others / self.nodes
        return asked_s + share * self.link_s + self.pass_s(others) / self.nodes

    @property
    def updating_s(self) -> float:
        """The update, of the part that one aggregator owns."""
        return self.update_s / self.nodes if self.topology == "sharded" else self.update_s

    @property
    def publication_s(self) -> float:
        """From the update until the next step opens."""
        if self.topology != "sharded" or self.nodes == 1:
            return self.publish_s
        return self.publish_s + self.latency_s + (self.nodes - 1) / self.nodes * self.link_s
