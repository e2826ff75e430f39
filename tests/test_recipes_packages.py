"""Recipes with other packages: what they print, and that they train as the package's own loop on the union does."""

import importlib.util
import re
import subprocess
import sys

import numpy as np
import pytest
from launch import ROOT, environment, run_script

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

WORKERS, LIMIT_S = 2, 120.0

# What a script of one process has in place of the session: the package's own loop, or torch's.
PLAIN = """
done = 0
while done < STEPS:
    for batch in loader:
        if done < STEPS:
            optimizer.zero_grad()
            {loss}
            {after}
            optimizer.step()
            done += 1
"""
CLIPPED = "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)"
# By recipe: its package, what it prints, what follows its head in the script of one process, and how its parameters are
# reached at the end.
RECIPES = {
    "transformers_loop": (
        "transformers",
        r"version 80, accuracy ([\d.]+)",
        "model.train()\n"
        + PLAIN.format(loss="model(**batch).loss.backward()", after=CLIPPED).replace(
            "optimizer.step()", "optimizer.step(); scheduler.step()"
        ),
        "model.parameters()",
    ),
    "transformers_trainer": (
        "transformers",
        r"version 80, accuracy ([\d.]+)",
        "trainer.train()\n",
        "trainer.model.parameters()",
    ),
    "fabric": (
        "lightning_fabric",
        r"version 100, accuracy ([\d.]+)",
        PLAIN.format(loss="cross_entropy(model(batch[0]), batch[1]).backward()", after=""),
        "model.parameters()",
    ),
    "skorch_net": (
        "skorch",
        r"epoch 3: accuracy ([\d.]+)",
        "net.__class__ = NeuralNetClassifier\nnet.partial_fit(images[:1500], labels[:1500], epochs=EPOCHS)\n",
        "net.module_.parameters()",
    ),
    "jax_optax": (
        "jax",
        r"200 steps, accuracy ([\d.]+)",
        "state = optimizer.init(flat)\n"
        "for rows, _ in zip(batches(0, 1), range(STEPS)):\n"
        "    _, gradient = loss_and_gradient(flat, images[rows], labels[rows])\n"
        "    flat, state = update(flat, state, gradient)\n",
        "reduction.parameters",
    ),
}


def needs(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: make test-recipes")


def text_of(name, workers):
    """The recipe in float64 and in the data's order, with batches as large as those of `workers` together.

    Rounding is not what is compared: Adam makes steps of a full rate of gradients that are zero but for it.
    """
    code = (ROOT / "docs" / "recipes" / f"{name}.py").read_text().replace("float32", "float64")
    code = code.replace("import torch\n", "import torch\ntorch.set_default_dtype(torch.float64)\n", 1)
    code = code.replace("shuffle=True", "shuffle=False")
    found = re.search(r"^BATCH, (STEPS|EPOCHS) = (\d+), ", code, re.M)
    return code.replace(found[0], f"BATCH, {found[1]} = {workers * int(found[2])}, ")


def saves(values, folder):
    each = "p.detach().numpy()" if values.endswith("parameters()") else "np.asarray(p)"
    return f"""
import numpy as np
from mpi4py import MPI
np.savez("{folder}/" + str(MPI.COMM_WORLD.rank), *[{each} for p in {values}])
"""


ENV = {"HF_HUB_OFFLINE": "1", "JAX_ENABLE_X64": "1"}


# Several scripts in one, each by itself, since importing these packages takes seconds.
EACH = "for text in {texts!r}:\n    exec(text, {{'__name__': '__main__'}})\n"


def parameters(folder, rank):
    with np.load(folder / f"{rank}.npz") as file:
        return np.concatenate([file[name].ravel() for name in file.files])


@pytest.fixture(params=RECIPES)
def recipe(request):
    needs(RECIPES[request.param][0])
    return request.param


def own_loop(name, folder):
    """The recipe with the package's own loop in place of the session, on the union of the workers' batches."""
    _, _, loop, values = RECIPES[name]
    head = text_of(name, WORKERS).partition("# What trainer.train()")[0].partition("with mpisync.")[0]
    asked = (
        "per_device_train_batch_size=BATCH, max_steps=STEPS, train_sampling_strategy='sequential', save_strategy='no'"
    )
    head = head.replace('TrainingArguments(\n    "output",', f"TrainingArguments('output', {asked}, ")
    return head + loop + saves(values.replace("reduction.parameters", "flat"), folder)


def accuracies(name, stdout):
    return [float(text) for text in re.findall(RECIPES[name][1], stdout)]


def test_it_trains_as_the_packages_own_loop_does_on_the_union_of_the_batches(recipe, tmp_path):
    folders = [tmp_path / each for each in ("together", "alone", "plain")]
    for folder in folders:
        folder.mkdir()
    together, alone, plain = folders
    values = RECIPES[recipe][3]

    code = text_of(recipe, 1)
    backup = code.replace("BackupWorkers(0)", "BackupWorkers(1)").replace("shuffle=False", "shuffle=True")
    texts = EACH.format(texts=[code + saves(values, together), backup])
    run = run_script(WORKERS + 1, texts, timeout_s=LIMIT_S, env=ENV, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    found = accuracies(recipe, run.stdout)
    assert len(found) == 2 and min(found) > 0.75, "with no backup worker and with one"

    scripts = [own_loop(recipe, plain)]
    if recipe != "jax_optax":  # which needs a root and a worker
        scripts.append(text_of(recipe, WORKERS) + saves(values, alone))
    (tmp_path / "script.py").write_text(EACH.format(texts=scripts))
    one = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path, env=environment(ENV), capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert one.returncode == 0, one.stderr
    expected = parameters(plain, 0)
    for rank in range(WORKERS + 1):
        assert np.abs(parameters(together, rank) - expected).max() < 1e-5
    if recipe != "jax_optax":
        assert np.abs(parameters(alone, 0) - expected).max() < 1e-5 and len(accuracies(recipe, one.stdout)) == 1


TRAINS_ITSELF = """
with mpisync.Session(MPI.COMM_WORLD, trainer.model, trainer.optimizer, progress=False) as session:
    trainer.train()
"""


@pytest.mark.parametrize("what", ["its own loop", "the launcher's variables"])
def test_what_a_trainer_cannot_do_is_as_the_page_says(what, tmp_path):
    needs("transformers")
    code = text_of("transformers_trainer", 1)
    if what == "its own loop":
        code, word = code.partition("with mpisync.")[0] + TRAINS_ITSELF, "optimizer.state_dict() was called on a worker"
    else:
        code, word = code.replace("os.environ.pop(name, None)", "pass"), "MASTER_ADDR expected, but not set"
    run = run_script(WORKERS + 1, code, timeout_s=LIMIT_S, env=ENV, cwd=tmp_path)
    assert run.returncode != 0 and not run.timed_out and word in run.stderr, run.stderr
