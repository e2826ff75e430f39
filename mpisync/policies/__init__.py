"""When a step closes and which gradients count: one set of rules for runs, replays and tests."""

from mpisync.policies.adaptive import Adaptive
from mpisync.policies.asynchronous import Async
from mpisync.policies.backup import BackupWorkers
from mpisync.policies.base import Arrival, Decision, OpenStep, Policy
from mpisync.policies.deadline import Deadline
from mpisync.policies.forms import parse_policy
from mpisync.policies.replay import Replay

__all__ = [
    "Adaptive",
    "Arrival",
    "Async",
    "BackupWorkers",
    "Deadline",
    "Decision",
    "OpenStep",
    "Policy",
    "Replay",
    "parse_policy",
]
