"""Deciding and folding apart: one collector for two aggregators, each of which folds its own workers' gradients."""

import itertools

import numpy as np
import pytest

from mpisync.aggregation.collector import Collector
from mpisync.aggregation.late_work import Discard
from mpisync.aggregation.running_sum import RunningSum
from mpisync.device.host import HostMemory
from mpisync.kernels.dtypes import DTYPES
from mpisync.kernels.fold import Reducer
from mpisync.policies import Arrival, BackupWorkers
from mpisync.transport.layout import Layout
from mpisync.transport.wire import GradientInfo

LAYOUT = Layout.of([("float32", 40)])


class Node:
    """Another node's aggregator: it has its workers' gradients and their sum, and decides nothing."""

    is_contiguous = True

    def __init__(self, workers):
        self.gradients = {worker: np.zeros(LAYOUT.size_bytes, np.uint8) for worker in workers}
        self.total = RunningSum(LAYOUT, HostMemory(), [self], weighted=False, norms=False)

    def gradient(self, worker, block):
        return LAYOUT.view(self.gradients[worker], block)

    def partial_sum(self):
        self.total.fold()
        return self.total.mean[0]


class Whole:
    """A gradient is whole where its node has it."""

    def is_whole(self, worker):
        return True

    def drop(self, worker):
        pass


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_what_one_collector_accepts_is_folded_where_it_lies(order):
    nodes = [Node([0, 2]), Node([1, 3])]
    node_of = {worker: node for node in nodes for worker in node.gradients}
    now_s = itertools.count()
    collector = Collector(
        BackupWorkers(1),
        4,
        Discard(),
        payloads=Whole(),
        clock=lambda: float(next(now_s)),
    )
    rng = np.random.default_rng(order)
    for worker, node in node_of.items():
        node.gradient(worker, LAYOUT.wholes[0])[:] = rng.standard_normal(40) * 10.0 ** rng.integers(-4, 5, 40)
    for worker in order:
        collector.register(Arrival(worker, 0, 0, float(next(now_s))), GradientInfo(3, 0.5, peak=1.0), handed=3)
        if not collector.player.is_closing:
            collector.player.judge(worker)
    accept_list = []
    for gradient, refusal, *_ in collector.decided():
        assert refusal is None
        accept_list.append(gradient.worker)
        node_of[gradient.worker].total.add(node_of[gradient.worker], gradient.worker, gradient.info)
    assert accept_list == list(order[:3]) == [one.worker for one in collector.gradients]

    # each node folds its own in the order of acceptance, then the nodes' partial sums are folded in their order
    expected = None
    for node in nodes:
        own = [node.gradient(w, LAYOUT.wholes[0]) for w in accept_list if w in node.gradients]
        partial = own[0].copy()
        for gradient in own[1:]:
            partial += gradient
        np.testing.assert_array_equal(node.partial_sum(), partial)
        expected = partial if expected is None else expected + partial
    mean = np.zeros(40, np.float32)
    parts = [node.partial_sum() for node in nodes]
    Reducer(1).fold(mean, parts, DTYPES["float32"], start=True, divisor=3.0)
    np.testing.assert_array_equal(mean, expected / np.float32(3))

    record = collector.close({0, 1, 2, 3}, closed_s=5.0, published_s=6.0, samples_used=9)
    collector.player.judge_again()
    assert [w for w, *_ in record.accepted] == accept_list
    assert [(g.worker, r.verdict, by) for g, r, by, _ in collector.decided()] == [(order[3], "late", 1)]
    assert [account.in_flight for account in collector.accounts] == [0] * 4
