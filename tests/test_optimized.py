"""python -O: no assert of the package has an effect, and training gives the same bits without them."""

import ast
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from launch import ROOT, environment, run_script

STEPS, RATE, SIZE = 5, 0.5, 1000
LIMIT_S = 110.0  # torch is compiled anew for -O, once
# Two workers and the root, by both faces; each rank prints what its parameters are at the end.
SCRIPT = f"""
import zlib
import numpy as np
import torch
from mpi4py import MPI
import mpisync

comm = MPI.COMM_WORLD

def show(face, array):
    print(face, __debug__, zlib.crc32(np.ascontiguousarray(array).tobytes()), flush=True)

theta = np.linspace(-1, 1, {SIZE}, dtype=np.float32)
with mpisync.PartialReduce(comm, like=theta, policy=mpisync.BackupWorkers(0), parameters=theta) as reduction:
    if reduction.is_root:
        for step in reduction.serve(steps={STEPS}):
            theta -= np.float32({RATE}) * step.mean
            step.publish(theta)
    else:
        while reduction.pull(theta):
            reduction.push((comm.rank + 1) * theta)
show("PartialReduce", theta)

def train(face, **options):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr={RATE})
    batches = [torch.eye(4)[i : i + 1] for i in range(4)]
    policy = mpisync.BackupWorkers(0)
    with mpisync.Session(comm, model, optimizer, policy=policy, progress=False, **options) as session:
        for x in session.batches(batches, steps={STEPS}):
            loss = model(x).square().mean()
            loss.backward()
            session.step(loss)
    show(face, model.weight.detach().numpy())

train("Session")
train("Session-that-clips", clip_norm=0.1)
"""


# -- what asserts are --------------------------------------------------------------------------------


def is_plain(node):
    """Say whether evaluating an expression is sure to do nothing: names, their attributes, constants."""
    if isinstance(node, ast.Attribute):
        return is_plain(node.value)
    return isinstance(node, ast.Name | ast.Constant)


def only_narrows(test):
    """Say whether an assert's condition is of the forms that tell a type checker something."""
    if isinstance(test, ast.BoolOp):
        return all(map(only_narrows, test.values))
    if isinstance(test, ast.Call):  # of a class by its plain name
        return ast.unparse(test.func) == "isinstance" and all(map(is_plain, test.args)) and not test.keywords
    # a comparison: an attribute by itself is one that is asked for its effect
    return isinstance(test, ast.Compare) and all(map(is_plain, [test.left, *test.comparators]))


def asserts_with_effect(text):
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Assert) and not only_narrows(node.test)
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "mpisync").rglob("*.py")), ids=lambda path: path.stem)
def test_no_assert_has_an_effect(path):
    assert asserts_with_effect(path.read_text()) == []


@pytest.mark.parametrize(
    ("text", "narrows"),
    [
        ("assert a is not None", True),
        ("assert a.b is not None and c > 0, 'why'", True),
        ("assert isinstance(value, float)", True),
        ("assert self.sums", False),
        ("assert f()", False),
        ("assert f() is not None", False),
        ("assert f().a is not None", False),
        ("assert (a := b) is not None", False),
        ("assert isinstance(f(), float)", False),
        ("def f():\n    assert not a[0]", False),
    ],
)
def test_what_an_effect_is(text, narrows):
    assert (asserts_with_effect(text) == []) == narrows


# -- what runs without them ------------------------------------------------------------------------


def trained(**env):
    """Run the script; (whether asserts are there, the parameters' bits) of each face, the same on every rank."""
    run = run_script(3, SCRIPT, env=env, timeout_s=LIMIT_S)
    assert run.returncode == 0 and not run.left, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 9 and len(set(lines)) == 3, run.stdout
    return {face: (debug, bits) for face, debug, bits in map(str.split, lines)}


def alone():
    """Compute in one process what the script trains: two gradients have one sum, in whichever order they come."""
    theta = np.linspace(-1, 1, SIZE, dtype=np.float32)
    for _ in range(STEPS):
        theta -= np.float32(RATE) * ((1 * theta + 2 * theta) / np.float32(2))
    torch.manual_seed(0)
    weight = torch.nn.Linear(4, 1, bias=False).weight.detach().numpy()
    for step in range(STEPS):  # rows 0 and 2 are worker 0's, the others worker 1's, and each changes its own weight
        for row in (2 * step % 4, 2 * step % 4 + 1):
            weight[0, row] -= np.float32(RATE) * (2 * weight[0, row] / 2)
    return {"PartialReduce": bits(theta), "Session": bits(weight)}


def bits(array):
    return str(zlib.crc32(array.tobytes()))


@pytest.mark.long
@pytest.mark.timeout(2 * LIMIT_S + 20)
def test_training_gives_the_same_bits():
    checked, optimized = trained(), trained(PYTHONOPTIMIZE="1")
    assert {debug for debug, _ in checked.values()} == {"True"}
    assert {debug for debug, _ in optimized.values()} == {"False"}
    found = {face: own for face, (_, own) in optimized.items()}
    assert found == {face: own for face, (_, own) in checked.items()}
    assert found == {**found, **alone()}


MEAN_FIRST = """
import numpy as np
from mpisync.aggregation.closed_step import ClosedStep
from mpisync.aggregation.running_sum import Sums
from mpisync.aggregation.work import Gradient, Work
from mpisync.policies import Arrival
from mpisync.transport.wire import GradientInfo

class Total:
    mean, extras = [np.zeros(2)], []

    def finish(self):
        self.mean[0] += [1.0, 2.0]
        return Sums(finite=True)

gradient = Gradient(Arrival(0, 0, 0, 0.0), GradientInfo(1), Work([]))
closed = ClosedStep(0, [gradient], Total(), [], 0.0, lambda: 0.0, lambda closed: None)
print(__debug__, closed.mean[0].tolist(), closed.mean[0].tolist(), closed.finite)
"""


@pytest.mark.parametrize("flags", [[], ["-O"]])
def test_a_step_is_folded_once_though_only_its_mean_is_asked_for(flags):
    command = [sys.executable, *flags, "-c", MEAN_FIRST]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert run.stdout == f"{not flags} [1.0, 2.0] [1.0, 2.0] True\n", run.stderr
