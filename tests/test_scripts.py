"""Public training scripts, in a session as they are: equal to one process, with backup workers, and alone."""

import copy
import re
from functools import partial
from types import SimpleNamespace

import pytest
import scripts
import scripts_of_text
import torch
from mpi4py import MPI
from scripts import Place
from training import WORKERS, fails_everywhere

import mpisync

SCRIPTS = {
    script.__name__: script
    for script in (
        scripts_of_text.language_model, scripts_of_text.trainer_with_callbacks, scripts_of_text.word_language_model,
        scripts.epochs_with_best_accuracy, scripts.gan, scripts.sum_of_losses, scripts.reinforce,
        scripts.exact_full_batch, scripts.fine_tuned, scripts.criterion_with_parameters, scripts.graphs,
        scripts.contrastive, scripts.mixed_precision, scripts.fit_and_partial_fit, scripts.all_in_functions,
    )
}  # fmt: skip


class Plain:
    """One process without a session: the lines that a session's four replace, and its options by hand."""

    worker, workers = 0, 1

    def __init__(self, model, optimizers, *, scheduler=None, clip_norm=None, on_step=None, weight="equal"):
        self.model, self.scheduler, self.clip_norm, self.on_step = model, scheduler, clip_norm, on_step
        self.optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        self.version, self.evaluated, self.loader = 0, 0, None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def batches(self, loader, *, steps):
        last = self.version + steps
        if loader is not self.loader:
            self.loader, self.drawn = loader, iter(loader)
        while self.version < last:
            batch = next(self.drawn, None)
            if batch is None:
                self.drawn = iter(loader)
            else:
                yield batch

    def step(self, loss, samples=None):
        parameters = list(self.model.parameters())
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        if self.on_step is not None:
            self.on_step(SimpleNamespace(step=self.version))
        self.version += 1

    def evaluate(self, fn, *, every):
        if self.version // every > self.evaluated:
            self.evaluated = self.version // every
            return fn(copy.deepcopy(self.model))

    def state_dict(self):
        state = {"version": self.version, "model": self.model.state_dict()}
        return {**state, "optimizer": self.optimizers[0].state_dict()}


def in_plain_torch(name, folder, parts):
    folder.mkdir(exist_ok=True)
    return SCRIPTS[name](Place(Plain, MPI.COMM_SELF, parts, folder=folder))


def in_a_session(name, comm, folder, backups=0):
    start = partial(mpisync.Session, comm, policy=mpisync.BackupWorkers(backups), progress=False)
    return SCRIPTS[name](Place(start, comm, backups=backups, folder=folder))


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


NOTICE = re.compile(r"mpisync: one process trains alone, so the policy .* is ignored; start it with .*\n")


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_with_all_workers_equals_one_process(comm, tmp_path, capfd, name):
    found = in_a_session(name, comm, tmp_path)
    assert "".join(comm.allgather(capfd.readouterr().err)) == ""
    close(found, in_plain_torch(name, tmp_path / "plain", parts=WORKERS))


@pytest.mark.parallel(WORKERS + 1)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_with_a_backup_worker_comes_to_its_end_and_is_told_nothing(comm, tmp_path, capfd, name):
    found = in_a_session(name, comm, tmp_path, backups=1)
    assert "".join(comm.allgather(capfd.readouterr().err)) == ""
    values = {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}
    assert values and all(value.isfinite().all() for value in values.values())
    for other in comm.allgather(values):
        torch.testing.assert_close(other, values, rtol=0, atol=0)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_alone_is_the_loop_that_it_was(tmp_path, capfd, name):
    found = in_a_session(name, MPI.COMM_SELF, tmp_path)
    assert NOTICE.sub("", capfd.readouterr().err) == ""
    close(found, in_plain_torch(name, tmp_path / "plain", parts=1))


@pytest.mark.parallel(WORKERS + 1)
def test_a_list_of_one_batch_is_refused_with_what_to_write_for_all_data_at_once(comm):
    model = torch.nn.Linear(6, 3)
    with fails_everywhere(comm, ValueError, "a list of 1 batches is too short", "pass itertools.repeat(batch)"):
        with mpisync.Session(comm, model, torch.optim.SGD(model.parameters(), lr=0.1), progress=False) as session:
            for x in session.batches([torch.ones(4, 6)], steps=1):
                model(x).sum().backward()
                session.step()
