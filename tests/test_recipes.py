"""The recipes in the documentation: the scripts do what they print, and their pattern is right to the bit."""

import os
import re
import signal

import numpy as np
import pytest
import torch
from launch import ROOT, run_script, start_script
from torch import nn
from torch.nn.functional import softplus
from training import DATA, WORKERS, fails_everywhere, flat

import mpisync

# One process alone is tests/test_alone.py's; that each recipe runs so too is a longer proof.
NPROCS = pytest.mark.parametrize("nprocs", [3, pytest.param(1, marks=pytest.mark.long)])
PRINTED = re.compile(r"(\w+): bright half (-?[\d.]+), dark half (-?[\d.]+), (\d+)% bright on the left")


@pytest.mark.long
@pytest.mark.parametrize("nprocs", [3, 1])
def test_the_gan_generates_what_the_data_look_like(nprocs):
    run = run_script(nprocs, ROOT / "docs" / "recipes" / "gan.py", timeout_s=150)
    assert run.returncode == 0, run.stderr
    found = [(name, *map(float, numbers)) for name, *numbers in PRINTED.findall(run.stdout)]
    assert [name for name, *_ in found] == ["real", "generated"], run.stdout
    (_, bright, dark, left), (_, their_bright, their_dark, their_left) = found
    assert abs(bright - their_bright) < 0.2 and abs(dark - their_dark) < 0.2
    assert 20 < left < 80 and 20 < their_left < 80, "both kinds"


class Pair(nn.ModuleDict):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__({"generator": nn.Linear(2, 6).double(), "discriminator": nn.Linear(6, 1).double()})
        self.optimizers = [torch.optim.Adam(part.parameters(), lr=0.1) for part in self.values()]


BATCHES = DATA.tensors[0].split(8)


def losses(model, real):
    fake = model["generator"](real[:, :2])
    judge = model["discriminator"]
    return judge, fake, lambda: softplus(-judge(real)).mean() + softplus(judge(fake.detach())).mean()


def made_by(judge, fake):
    judge.requires_grad_(False)
    made = softplus(-judge(fake)).mean()
    made.backward()
    judge.requires_grad_(True)
    return made


def in_one_process(parts_of):
    """Train on the union of two workers' batches; `parts_of` says which parts a step updates."""
    model = Pair()
    for step in range(6):
        for optimizer in model.optimizers:
            optimizer.zero_grad()
        for worker in range(WORKERS):
            judge, fake, judged = losses(model, BATCHES[worker::WORKERS][step % 4])
            for name, loss in (("generator", softplus(-judge(fake)).mean()), ("discriminator", judged())):
                if name in parts_of(step):
                    own = list(model[name].parameters())
                    gradients = torch.autograd.grad(loss / WORKERS, own, retain_graph=True)
                    for p, gradient in zip(own, gradients, strict=True):
                        p.grad = gradient if p.grad is None else p.grad + gradient
        for optimizer in model.optimizers:
            optimizer.step()
    return flat(model)


@pytest.mark.parallel(WORKERS + 1)
def test_each_loss_reaches_its_own_part_and_both_are_of_one_version(comm):
    model = Pair()
    with mpisync.Session(comm, model, model.optimizers, progress=False) as session:
        for real in session.batches(list(BATCHES), steps=6):
            judge, fake, judged = losses(model, real)
            loss = judged()
            loss.backward()
            session.step(loss + made_by(judge, fake))
    expected = in_one_process(lambda step: ("generator", "discriminator"))
    np.testing.assert_allclose(flat(model), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parallel(WORKERS + 1)
def test_parts_that_take_turns_go_by_the_version(comm):
    model = Pair()
    with mpisync.Session(comm, model, model.optimizers, progress=False) as session:
        for real in session.batches(list(BATCHES), steps=6):
            judge, fake, judged = losses(model, real)
            if session.version % 3 < 2:
                (loss := judged()).backward()
            else:
                loss = made_by(judge, fake)
            session.step(loss)
    expected = in_one_process(lambda step: ("discriminator",) if step % 3 < 2 else ("generator",))
    np.testing.assert_allclose(flat(model), expected, rtol=1e-9, atol=1e-12)
    assert not np.allclose(flat(model), in_one_process(lambda step: ("generator", "discriminator")))


EPOCH = re.compile(r"epoch (\d): version (\d+), accuracy ([\d.]+), rate ([\d.e-]+)")


@NPROCS
def test_epochs_validate_set_the_rate_and_save(nprocs, tmp_path):
    run = run_script(nprocs, ROOT / "docs" / "recipes" / "epochs.py", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    found = [(int(epoch), int(version), float(accuracy)) for epoch, version, accuracy, _ in EPOCH.findall(run.stdout)]
    steps = 60 // max(1, nprocs - 1)
    assert [(epoch, version) for epoch, version, _ in found] == [(n, (n + 1) * steps) for n in range(4)], run.stdout
    assert found[-1][2] > 0.85
    saved = torch.load(tmp_path / "digits.pt")
    assert saved["version"] == 4 * steps and saved["epoch"] == 3 and saved["optimizer"]["state"]
    assert "warn" not in run.stderr.lower(), run.stderr


SLOWER = "        session.step(loss)\n        __import__('time').sleep(0.01)\n"


@pytest.mark.timeout(240)  # seven starts of Python
@NPROCS
def test_a_run_that_was_killed_goes_on_and_ends_as_if_it_had_not_been(nprocs, tmp_path):
    path = ROOT / "docs" / "recipes" / "resume.py"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    expected = run_script(nprocs, path, cwd=whole)
    assert expected.returncode == 0 and expected.stdout.startswith("begins at 0 of 300\n"), expected.stderr

    slow = path.read_text().replace("        session.step(loss)\n", SLOWER)
    with start_script(nprocs, slow, cwd=killed) as job:
        job.wait_for("saved 60 of 300")
        for pid in job.pids():
            os.kill(pid, signal.SIGKILL)
        assert "ends" not in job.output("stdout")
    found = run_script(nprocs, path, cwd=killed)
    assert found.returncode == 0, found.stderr
    begun = int(re.match(r"begins at (\d+) of 300\n", found.stdout)[1])
    assert 60 <= begun < 300 and begun % 20 == 0
    assert found.stdout.splitlines()[-1] == expected.stdout.splitlines()[-1], "the same parameters"
    assert float(re.search(r"ends at 300 of 300: accuracy ([\d.]+)", found.stdout)[1]) > 0.9
    for run in (expected, found):
        assert all(line.startswith("mpisync: one process trains alone") for line in run.stderr.splitlines()), run.stderr
    if nprocs == 1:  # it is done
        again = run_script(nprocs, path, cwd=killed)
        assert again.stdout.splitlines() == ["begins at 300 of 300", found.stdout.splitlines()[-1]]


@pytest.mark.long
@pytest.mark.parametrize("nprocs", [3, 1])
def test_reinforce_learns_a_short_way(nprocs):
    run = run_script(nprocs, ROOT / "docs" / "recipes" / "reinforce.py", timeout_s=100)
    assert run.returncode == 0, run.stderr
    versions, moves = re.fullmatch(r"after (\d+) updates: ([\d.]+) moves an episode\n", run.stdout).groups()
    assert 5 < int(versions) < 300 and float(moves) < 9, "stopped because it was won"
    assert all(line.startswith("mpisync: one process trains alone") for line in run.stderr.splitlines()), run.stderr


def by_hand_in_one_process(parts):
    """The recipe as its original is: torch's clipping, the rate by hand, sums; `parts` workers' samples a batch."""
    torch.manual_seed(0)
    data = torch.randn(640, 20).double()
    labels = (data @ torch.randn(20, 5).double()).argmax(1)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)
    step, clipped = 0, [0, 0]
    for epoch in range(3):
        for x, y in zip(data.split(16 * parts), labels.split(16 * parts), strict=True):
            optimizer.param_groups[0]["lr"] = 0.01 * min(step + 1, 5) / 5 if epoch == 0 else 0.01 * 0.3**epoch
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
            clipped[0] += max(float(p.grad.abs().max()) for p in model.parameters()) > 5.0
            nn.utils.clip_grad_value_(model.parameters(), 5.0)
            clipped[1] += float(nn.utils.clip_grad_norm_(model.parameters(), 20.0)) > 20.0
            optimizer.step()
            step += 1
    assert min(clipped) > 0, "both limits matter"
    return float(sum(p.detach().norm() for p in model.parameters()))


@NPROCS
def test_what_is_set_by_hand_is_what_one_process_does(nprocs):
    run = run_script(nprocs, ROOT / "docs" / "recipes" / "by_hand.py")
    assert run.returncode == 0, run.stderr
    workers = max(1, nprocs - 1)
    means = re.findall(r"epoch (\d): worker (\d)'s mean loss is ([\d.]+)", run.stdout)
    assert sorted((int(epoch), int(worker)) for epoch, worker, _ in means) == [
        (epoch, worker) for epoch in range(3) for worker in range(workers)
    ]
    found = float(re.search(r"norms ([\d.]+)", run.stdout)[1])
    assert abs(found - by_hand_in_one_process(workers)) < 1e-6
    assert all(line.startswith("mpisync: one process trains alone") for line in run.stderr.splitlines()), run.stderr


@pytest.mark.parallel(WORKERS + 1)
def test_the_root_is_told_why_it_has_none_of_the_loops_variables(comm, capfd):
    model = nn.Linear(6, 1).double()
    with fails_everywhere(comm, NameError, "last"):
        with mpisync.Session(comm, model, torch.optim.SGD(model.parameters(), lr=0.1), progress=False) as session:
            for x in session.batches(list(BATCHES), steps=2):
                last = model(x).sum()
                last.backward()
                session.step(last)
            print(last)
    text = "".join(comm.allgather(capfd.readouterr().err))
    assert text.count("is the root, which never runs the loop's body (") == 1, text
