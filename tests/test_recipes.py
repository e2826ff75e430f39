"""The recipes in the documentation: the scripts do what they print, and their pattern is right to the bit."""

import re

import numpy as np
import pytest
import torch
from launch import ROOT, run_script
from torch import nn
from torch.nn.functional import softplus
from training import DATA, WORKERS, flat

import mpisync

PRINTED = re.compile(r"(\w+): bright half (-?[\d.]+), dark half (-?[\d.]+), (\d+)% bright on the left")


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


@pytest.mark.parametrize("nprocs", [3, 1])
def test_epochs_validate_set_the_rate_and_save(nprocs, tmp_path):
    code = (ROOT / "docs" / "recipes" / "epochs.py").read_text()
    code = code.replace('"digits.pt"', repr(str(tmp_path / "digits.pt")))
    run = run_script(nprocs, code, timeout_s=60)
    assert run.returncode == 0, run.stderr
    found = [(int(epoch), int(version), float(accuracy)) for epoch, version, accuracy, _ in EPOCH.findall(run.stdout)]
    steps = 60 // max(1, nprocs - 1)
    assert [(epoch, version) for epoch, version, _ in found] == [(n, (n + 1) * steps) for n in range(4)], run.stdout
    assert found[-1][2] > 0.85
    saved = torch.load(tmp_path / "digits.pt")
    assert saved["version"] == 4 * steps and saved["epoch"] == 3 and saved["optimizer"]["state"]
    assert "warn" not in run.stderr.lower(), run.stderr
