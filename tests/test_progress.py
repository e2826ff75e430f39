"""The progress line, on scripted records: they carry the clock."""

import contextlib
import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch.nn.functional as F
from launch import environment
from training import loader, new_model, sgd

import mpisync
from mpisync.records import ArrivalRecord, StepRecord
from mpisync.session.progress import Progress


class Script:
    """Steps of 0.1 s that follow one another, with what each worker is said to have taken."""

    def __init__(self, workers, total=None, stream=None, pause_s=0.1):
        self.stream = io.StringIO() if stream is None else stream
        hosts = [f"node{worker}" for worker in range(workers)]
        self.progress = Progress(total, hosts, self.stream)
        self.workers, self.pause_s = workers, pause_s
        self.now_s, self.number, self.sequences = 100.0, 0, [0] * workers

    def step(self, compute_s, late=(), data_s=0.0, alive=None, counts=None):
        """Close a step; `compute_s` of each worker in it, those in `late` are late by one."""
        accepted, arrivals = [], []
        for worker, spent_s in compute_s.items():
            sequence, is_late = self.sequences[worker], worker in late
            self.sequences[worker] += 1
            version = self.number - is_late
            arrivals.append(ArrivalRecord(
                worker, sequence, version, "late" if is_late else "accepted", 0.05,
                late_by=int(is_late), compute_s=spent_s, data_s=data_s, samples=8,
            ))
            if not is_late:
                accepted.append((worker, sequence, version))
        opened_s, self.now_s = self.now_s, self.now_s + self.pause_s
        self.progress.step(StepRecord(
            self.number, opened_s, opened_s + self.pause_s / 2, self.now_s, len(accepted),
            self.workers if alive is None else alive, accepted, arrivals,
            samples_used=8 * len(accepted), counts=counts or {},
        ))
        self.number += 1

    @property
    def lines(self):
        return self.stream.getvalue().splitlines()


class Terminal(io.StringIO):
    def isatty(self):
        return True


EVEN = {0: 0.04, 1: 0.04, 2: 0.04}


def test_a_line_says_step_share_wait_rate_and_eta():
    script = Script(3, total=50)
    script.step(EVEN)
    assert script.lines == [
        "step 1/50 | accepted 3/3 | wait p50 50 ms p95 50 ms | 240 samples/s | ETA 0:05"
    ]


def test_waits_are_of_the_recent_steps_by_rank():
    script = Script(3, total=20)
    for _ in range(18):
        script.step(EVEN)
    script.pause_s = 4.0
    script.step(EVEN)
    script.step(EVEN)
    assert "wait p50 50 ms p95 2.0 s" in script.lines[-1]


def test_late_workers_dead_workers_and_rejections_are_shown():
    script = Script(3, total=2)
    script.step({1: 0.04, 2: 0.04})
    script.step({0: 0.05, 1: 0.04, 2: 0.04}, late={0}, alive=2, counts={"rejected": 4})
    assert "accepted 2/3 | alive 2 | late lately: worker 0 ×1 | rejected 4 |" in script.lines[-1]


def test_lates_of_long_ago_are_forgotten():
    script = Script(3, total=120)
    script.step(EVEN, late={0})
    for _ in range(119):
        script.step(EVEN)
    assert "late" not in script.lines[-1]


def test_without_a_terminal_intervals_grow_and_the_last_step_is_printed():
    script = Script(3, total=1000)
    for _ in range(1000):
        script.step(EVEN)
    steps = [int(line.split("/")[0].removeprefix("step ")) for line in script.lines]
    pauses_s = [(b - a) / 10 for a, b in zip(steps, steps[1:], strict=False)]
    assert steps[0] == 1 and steps[-1] == 1000
    assert pauses_s[:-1] == pytest.approx([2, 4, 8, 16, 32], abs=0.11)


def test_without_a_total_there_is_no_eta():
    script = Script(3)
    script.step(EVEN)
    assert script.lines[0].startswith("step 1 |") and "ETA" not in script.lines[0]


def test_a_terminal_has_one_line_rewritten_five_times_a_second(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    script = Script(3, total=1000, stream=Terminal(), pause_s=0.01)
    for _ in range(1000):
        script.step(EVEN)
    text = script.stream.getvalue()
    drawn = text.split("\r")[1:]
    assert text.count("\n") == 1 and text.endswith("\n")
    assert 50 <= len(drawn) <= 52  # in 10 s
    assert all(len(line.rstrip("\n").removesuffix("\x1b[K")) < 40 for line in drawn)


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    script = Script(3, total=2, stream=Terminal())
    script.step(EVEN)
    assert "\r" not in script.stream.getvalue()


def test_a_slow_worker_is_named_at_once_with_host_and_factor_then_less_and_less():
    script = Script(3, total=1000)
    for _ in range(600):
        script.step({0: 0.2, 1: 0.04, 2: 0.05}, late={0})
    named = [line for line in script.lines if line.startswith("slow")]
    assert named[0] == "slow: worker 0 on node0 takes 200 ms a gradient, 4.0 times the median of 50 ms"
    assert named[-1].startswith(named[0] + ", for ") and named[-1].endswith(" s now")
    assert 4 <= len(named) <= 7


def test_of_two_workers_the_slower_one_is_named():
    script = Script(2, pause_s=0.5)
    for _ in range(6):
        script.step({0: 0.04, 1: 0.4})
    assert "slow: worker 1 on node1 takes 400 ms a gradient, 10.0 times" in script.stream.getvalue()


def test_a_worker_that_waits_for_its_data_is_told_so():
    progress = Progress(None, ["a", "b"], stream := io.StringIO())
    for step in range(6):
        accepted = [(0, step, step), (1, step, step)]
        progress.step(StepRecord(step, float(step), step + 0.5, step + 0.6, 2, 2, accepted, [
            ArrivalRecord(0, step, step, "accepted", 0.1, compute_s=0.1, data_s=0.0),
            ArrivalRecord(1, step, step, "accepted", 0.5, compute_s=0.1, data_s=0.4),
        ]))
    named = "slow: worker 1 on b takes 500 ms a gradient, mostly waiting for data, 5.0 times"
    assert named in stream.getvalue()


def test_first_gradients_compare_nobody():
    script = Script(2, pause_s=0.5)
    for compute_s in ({0: 0.04, 1: 0.4}, {0: 0.04, 1: 0.4}, *[{0: 0.04, 1: 0.04}] * 20):
        script.step(compute_s)
    assert "slow" not in script.stream.getvalue()


def test_a_jittery_worker_is_not_named():
    script = Script(3)
    for number in range(100):
        script.step({0: 0.4 if number % 3 == 0 else 0.04, 1: 0.05, 2: 0.04})
    assert not any(line.startswith("slow") for line in script.lines[1:])


def test_differences_too_small_to_matter_are_not_named():
    script = Script(2)
    script.step({0: 0.0001, 1: 0.004})
    assert len(script.lines) == 1


def test_a_worker_that_is_not_heard_of_is_named_while_it_computes():
    script = Script(3)
    script.step(EVEN)
    for _ in range(100):
        script.step({1: 0.04, 2: 0.04})
    named = [line for line in script.lines if line.startswith("slow")]
    assert "worker 0 on node0 has been computing one gradient for 1.1 s and 11 steps; " in named[0]
    assert "the median is 40 ms" in named[0]


def test_a_worker_that_recovers_is_slow_no_more():
    script = Script(3)
    for _ in range(30):
        script.step({0: 0.2, 1: 0.04, 2: 0.05}, late={0})
    for _ in range(600):
        script.step(EVEN)
    assert not any("slow" in line for line in script.lines[-3:])


def test_one_worker_alone_has_nobody_to_be_compared_with():
    script = Script(1)
    script.step({0: 0.5})
    assert len(script.lines) == 1


SCRIPT = """
import torch
from mpi4py import MPI
import mpisync
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with mpisync.Session(MPI.COMM_WORLD, model, optimizer) as session:
    for x in session.batches([torch.ones(4, 2)], steps=50):
        loss = model(x).square().mean()
        loss.backward()
        session.step(loss)
"""


def test_under_mpisync_run_on_a_terminal_the_line_is_rewritten_within_its_width(tmp_path):
    """Ranks see a pipe; the terminal is the launcher's."""
    (tmp_path / "train.py").write_text(SCRIPT)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
    command = [sys.executable, "-m", "mpisync", "run", "-n", "2", "train.py"]
    env = {**environment(), "TERM": "xterm"}
    job = subprocess.Popen(command, cwd=tmp_path, stderr=theirs, stdout=subprocess.DEVNULL, env=env)
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # the terminal has gone with its last user
        while part := os.read(ours, 4096):
            said += part
    os.close(ours)
    assert job.wait(60) == 0
    drawn = [line for line in said.decode().replace("\n", "\r").split("\r") if line.startswith("step ")]
    assert len(drawn) >= 2 and drawn[-1].startswith("step 50/50 | accepted 1/1")
    assert all(len(line.removesuffix("\x1b[K")) == 49 and line.endswith("\x1b[K") for line in drawn)


def test_a_worker_that_has_left_is_not_slow():
    left = set()
    script = Script(3)
    script.progress._is_alive = lambda worker: worker not in left
    for _ in range(30):
        script.step({0: 0.05, 1: 0.05, 2: 0.05})
    left.add(0)
    for _ in range(60):
        script.step({1: 0.05, 2: 0.05}, alive=2)
    assert not [line for line in script.lines if line.startswith("slow")]
    left.clear()
    for _ in range(20):
        script.step({1: 0.05, 2: 0.05})
    assert any(line.startswith("slow: worker 0") for line in script.lines)


@pytest.mark.parallel(4)
def test_a_worker_that_left_its_loop_is_not_called_slow(comm, capfd):
    model = new_model()
    with mpisync.Session(comm, model, sgd(model)) as session:
        for number, (x, y) in enumerate(session.batches(loader(), steps=60)):
            time.sleep(0.05)
            F.cross_entropy(model(x), y).backward()
            session.step()
            if session.worker == 0 and number == 8:
                break
    said = capfd.readouterr().err
    assert "slow: worker 0" not in said and ("alive 2" in said) == (session.worker is None)
