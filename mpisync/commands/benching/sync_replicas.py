"""A task of TensorFlow's SyncReplicasOptimizer, which `mpisync bench --tensorflow` runs with TensorFlow's interpreter.

It stands alone. Its one argument says in JSON which task of which cluster it is. A worker reads one order a line,
trains, and answers with a line, all in JSON; to start or to train longer than `limit_s` ends it. Every task ends with
its input, or with its parent.

The training is SGD at rate 1 on one variable with gradients that need no computing: a worker fetches the parameters as
any forward pass does, sleeps, marks its gradient (see marks.py) and hands it in. What TensorFlow aggregates is noted at
the server with the time of each update.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from typing import Any

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.01


class Worker:
    """A worker task; the first is the chief, who also aggregates and updates.

    Args:
        tf: TensorFlow.
        server: Its server in this process.
        task: What the argument says.
    """

    def __init__(self, tf: Any, server: Any, task: dict[str, Any]) -> None:
        self._tf, self._v1, self._server = tf, tf.compat.v1, server
        self._index, self._workers, self._places = task["index"], len(task["cluster"]["worker"]), task["places"]
        self._marks = 3 * self._places * self._workers + 1
        self._own, self._ps = f"/job:worker/task:{self._index}", "/job:ps/task:0"
        self._is_chief = self._index == 0
        self._before: tuple[Any, str] | None = None

    def play(self, order: dict[str, Any]) -> dict[str, Any]:
        """Train until the parameters have version `updates`.

        Returns:
            `pushes`: of every gradient the version it was computed at and the step it was handed in for. From the
            chief also `made_s`, when the updates were made, `means`, their marks, and `right`, whether the variable
            is what they add up to.
        """
        self._forget()
        with self._tf.Graph().as_default() as graph, graph.container(order["name"]):
            train, version, sequence = self._build(order)
            config = self._v1.ConfigProto(device_filters=["/job:ps", self._own])
            session = self._v1.Session(self._server.target, config=config)
            self._before = session, order["name"]
            self._begin(session)
            step, pushes = 0, list[tuple[int, int]]()
            while step < order["updates"]:
                handed_for = step
                step, computed_at = session.run([train, version], {sequence: len(pushes)})
                pushes.append((round(float(computed_at)), handed_for))
                step = int(step)
            answer: dict[str, Any] = {"pushes": pushes}
            if self._is_chief:
                made_s, means = session.run(self._notes.dequeue_many(order["updates"]))
                rest = self._theta[self._marks :]
                ends = session.run([self._tf.reduce_min(rest), self._tf.reduce_max(rest)])
                right = all(end == -order["updates"] for end in ends)
                answer.update(made_s=made_s.tolist(), means=means.tolist(), right=right)
        return answer

    def _forget(self) -> None:
        """Give back what the training before held, now that nobody takes part in it any more."""
        if self._before is not None:
            session, name = self._before
            session.close()
            if self._is_chief:
                self._v1.Session.reset(self._server.target, [name])

    def _build(self, order: dict[str, Any]) -> tuple[Any, Any, Any]:
        """Make the graph; what trains, the version that was computed at, and where the gradient's number goes."""
        tf, v1 = self._tf, self._v1
        with tf.device(self._ps):
            self._theta = v1.Variable(tf.zeros([order["elements"]]), name="theta")
            step = v1.Variable(tf.constant(0, tf.int64), trainable=False, name="step")
            self._notes = tf.queue.FIFOQueue(
                -1, [tf.float64, tf.float32], shapes=[(), (self._marks,)], shared_name="notes"
            )
            at_server = self._theta[self._marks - 1]
        with tf.device(self._own):
            slot = v1.Variable(tf.ones([order["elements"]]), trainable=False, collections=[], name=f"slot{self._index}")
            self._slot = slot
            sequence = v1.placeholder(tf.int32, ())
            here = tf.identity(self._theta)[self._marks - 1] if order["fetch"] else at_server
            version = tf.numpy_function(lambda read: _computed(-read, order["sleep_s"]), [here], tf.float32)
            version.set_shape(())
            place = tf.one_hot(self._index * self._places + sequence % self._places, self._places * self._workers)
            marks = tf.concat([place, place * tf.cast(sequence, tf.float32), place * version, [1.0]], 0)
            with tf.control_dependencies([v1.scatter_update(slot, tf.range(self._marks), marks)]):
                gradient = tf.identity(slot)
        descent = _noting(v1.train.GradientDescentOptimizer, tf, self._notes, self._marks)
        self._optimizer = v1.train.SyncReplicasOptimizer(descent, order["aggregate"], self._workers)
        with v1.device(v1.train.replica_device_setter(ps_tasks=1, worker_device=self._own)):
            train = self._optimizer.apply_gradients([(gradient, self._theta)], global_step=step)
        return train, version, sequence

    def _begin(self, session: Any) -> None:
        """Do what the optimizer's own hook does when a session has begun."""
        v1, optimizer = self._v1, self._optimizer
        own, lacking = v1.variables_initializer([self._slot]), v1.report_uninitialized_variables(v1.global_variables())
        if self._is_chief:
            tokens = optimizer.get_init_tokens_op()
            for begin in (v1.global_variables_initializer(), optimizer.chief_init_op, own, tokens):
                session.run(begin)
            runner = optimizer.get_chief_queue_runner()
            runner.create_threads(session, coord=self._tf.train.Coordinator(), daemon=True, start=True)
        else:
            while len(session.run(lacking)):
                time.sleep(_POLL_S)
            session.run(optimizer.local_step_init_op)
            session.run(own)


def _computed(version: Any, sleep_s: float) -> Any:
    """Compute, so to speak."""
    time.sleep(sleep_s)
    return version


def _noting(optimizer: Any, tf: Any, notes: Any, marks: int) -> Any:
    """Make an SGD at rate 1 that notes when it has updated, and the marks of the gradient it was given."""

    class Noting(optimizer):  # type: ignore[misc]
        def apply_gradients(self, pairs: Any, global_step: Any = None, name: Any = None) -> Any:
            ((mean, theta),) = pairs
            update = super().apply_gradients([(mean, theta)], global_step, name)
            with tf.control_dependencies([update]), tf.device(theta.device):
                return notes.enqueue((tf.timestamp(), mean[:marks]))

    return Noting(1.0)


def _end_with(parent: int) -> None:
    """Have this process killed when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit("the parent has ended")


def main() -> None:
    """Be the task that the argument says."""
    task = json.loads(sys.argv[1])
    _end_with(task["parent"])
    signal.alarm(task["limit_s"])  # its default action needs nobody's help
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    tf = importlib.import_module("tensorflow")
    tf.compat.v1.disable_eager_execution()
    tf.compat.v1.logging.set_verbosity(tf.compat.v1.logging.ERROR)
    tf.compat.v1.disable_resource_variables()
    server = tf.compat.v1.train.Server(task["cluster"], job_name=task["job"], task_index=task["index"])
    print(json.dumps({"version": tf.__version__}), file=answers, flush=True)
    worker = Worker(tf, server, task) if task["job"] == "worker" else None
    signal.alarm(0)
    for line in sys.stdin:
        if worker is None:
            raise RuntimeError("the parameter server takes no orders")
        signal.alarm(task["limit_s"])
        print(json.dumps(worker.play(json.loads(line))), file=answers, flush=True)
        signal.alarm(0)
    os._exit(0)  # TensorFlow's servers have no end


if __name__ == "__main__":
    main()
