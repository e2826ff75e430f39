"""The tasks: that they learn, cost what they say, and read files strictly."""

import gzip
import math
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from launch import ROOT, environment

from mpisync import launchers
from mpisync.tasks.images import CIFAR10, MNIST
from mpisync.tasks.readers import CIFAR_BYTES, read_cifar10, read_idx
from mpisync.tasks.table import TASKS, make_task
from mpisync.tasks.text import Batches, Transformer, pad, paragraphs, read_library


def train(task, steps, batch_size=None):
    """The metrics after so many steps of one process."""
    torch.manual_seed(0)
    model, done = task.model(), 0
    optimizer = task.optimizer(model)
    while True:
        for batch in task.loader(batch_size):
            if done == steps:
                return task.evaluate(model)
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
            done += 1


# -- learning --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits-mlp", pytest.param("digits-cnn", marks=pytest.mark.long)])
def test_digits_are_learned(name):
    task = make_task(name)
    before, after = train(task, 0), train(task, task.steps)
    assert before[task.metric] < 0.4 and after[task.metric] > task.target


def test_the_hyperplane_is_found():
    task = make_task("hyperplane")
    before, after = train(task, 0), train(task, 250)
    assert after[task.metric] < 0.7 * before[task.metric]
    assert after["relative distance"] < 0.8 and before["relative distance"] == pytest.approx(1)
    assert sum(parameter.numel() for parameter in task.model().parameters()) == 8193
    first, again = (next(iter(torch.utils.data.DataLoader(make_task("hyperplane").loader().dataset))) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]), "the same points in every process"


def entropy_of(samples):
    counts = np.bincount(np.frombuffer(b"".join(samples), np.uint8), minlength=256)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


@pytest.mark.long
def test_the_text_is_learned_beyond_the_frequency_of_its_bytes():
    task = make_task("text")
    lone = entropy_of(task._training)
    assert 4 < lone < 6
    after = train(task, 60)
    assert after[task.metric] < lone - 0.4
    assert train(task, 0)[task.metric] == pytest.approx(8, abs=0.7), "it begins by guessing"


def test_the_text_costs_as_its_length_does_and_lengths_vary_much():
    task = make_task("text")
    costs = sorted(task.cost(batch) for batch in task.loader())
    assert costs[-1] / costs[0] > 10
    assert costs[len(costs) // 2] < costs[-1] / 2, "a tail to the right"
    batch = next(iter(task.loader()))
    assert task.cost(batch) == batch[0].numel() >= batch[1].sum()


def test_padding_changes_no_prediction_and_no_byte_is_seen_before_it_is_predicted():
    torch.manual_seed(0)
    model = Transformer().double().eval()
    short, both = pad([b"def f(x): return"]), pad([b"def f(x): return", b"x" * 40])
    with torch.no_grad():
        alone, beside = model(short[0])[0], model(both[0])[0, :16]
        torch.testing.assert_close(alone, beside)
        changed = short[0].clone()
        changed[0, 9] = 65
        torch.testing.assert_close(model(changed)[0, :10], alone[:10])
        assert not torch.allclose(model(changed)[0, 10:], alone[10:])


def test_paragraphs_are_cut_at_blank_lines_and_batches_hold_like_lengths():
    assert paragraphs(b"a" * 15 + b"\n\n" + b"b" * 16 + b"\n  \n" + b"c" * 513 + b"\n\n\n" + b"d" * 512) == [
        b"b" * 16, b"d" * 512,
    ]  # fmt: skip
    batches = Batches([bytes([65]) * n for n in range(16, 116)], 8)
    spans = [mask.sum(1) for _, mask in (batches[i] for i in range(len(batches)))]
    assert len(batches) == 13 and max(int(s.max() - s.min()) for s in spans) <= 8
    assert sum(len(s) for s in spans) == 100, "none is left out"


def test_a_library_without_source_is_refused(tmp_path):
    (tmp_path / "one.py").write_text("import os\n")
    with pytest.raises(FileNotFoundError, match="0 paragraphs to train on and 0 to hold out, at least 100"):
        read_library(tmp_path)


# -- files -----------------------------------------------------------------------------------------


def idx(items):
    return struct.pack(f">4B{items.ndim}I", 0, 0, 8, items.ndim, *items.shape) + items.astype(np.uint8).tobytes()


def an_mnist(folder, count=40, packed=False):
    rng = np.random.default_rng(0)
    for part in ("train", "t10k"):
        labels = np.arange(count) % 10
        images = rng.integers(0, 30, (count, 28, 28))
        images[np.arange(count), 2 * labels, :] = 255  # a stripe tells the class
        for name, items in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            path = folder / (f"{name}.gz" if packed else name)
            path.write_bytes(gzip.compress(idx(items)) if packed else idx(items))
    return folder


def a_cifar10(folder, count=30):
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{n}.bin" for n in range(1, 6)] + ["test_batch.bin"]:
        labels = np.arange(count) % 10
        planes = rng.integers(0, 30, (count, 3, 32, 32))
        planes[np.arange(count), labels % 3, 3 * labels, :] = 255
        records = np.concatenate([labels[:, None], planes.reshape(count, -1)], 1).astype(np.uint8)
        (folder / name).write_bytes(records.tobytes())
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_mnists_files_are_read_and_learned(packed, tmp_path):
    task = MNIST(an_mnist(tmp_path, packed=packed))
    images, labels = next(iter(task.loader(batch_size=40)))
    assert images.shape == (40, 1, 28, 28) and images.dtype == torch.uint8
    assert all(image[0, 2 * label].eq(255).all() for image, label in zip(images, labels, strict=True))
    assert train(task, 30, batch_size=20)[task.metric] > 0.9


def test_cifars_files_are_read(tmp_path):
    task = CIFAR10(a_cifar10(tmp_path))
    images, labels = next(iter(task.loader(batch_size=150)))
    assert images.shape == (150, 3, 32, 32)
    assert all(image[label % 3, 3 * label].eq(255).all() for image, label in zip(images, labels, strict=True))


@pytest.mark.long
def test_cifar_is_learned(tmp_path):
    task = CIFAR10(a_cifar10(tmp_path))
    assert train(task, 60, batch_size=50)[task.metric] > 0.9


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda raw: b"\0\0\x09\x01" + raw[4:], "must begin with the IDX magic 00 00 08 01"),
        (lambda raw: b"", "not nothing"),
        (lambda raw: gzip.compress(raw), "it is gzipped: name it .gz"),
        (lambda raw: raw[:-1], "must have 40 bytes after its header, but has 39"),
        (lambda raw: raw + b"\0", "must have 40 bytes after its header, but has more"),
        (lambda raw: raw[:4] + struct.pack(">I", 2**31), "2,147,483,648|more than|from 1 to"),
        (lambda raw: raw[:6], "header"),
    ],
)
def test_an_idx_file_that_breaks_its_format_is_refused(spoil, words, tmp_path):
    path = tmp_path / "labels"
    path.write_bytes(spoil(idx(np.arange(40) % 10)))
    with pytest.raises(ValueError, match=words) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


def test_a_torn_gzip_file_is_refused(tmp_path):
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(idx(np.arange(400) % 10))[:-12])
    with pytest.raises(ValueError, match="must be a whole gzip file"):
        read_idx(path)


@pytest.mark.parametrize("size", [0, CIFAR_BYTES - 1, CIFAR_BYTES + 1])
def test_a_cifar_file_of_no_whole_records_is_refused(size, tmp_path):
    path = tmp_path / "test_batch.bin"
    path.write_bytes(bytes(size))
    with pytest.raises(ValueError, match=f"must hold whole records of {CIFAR_BYTES} bytes"):
        read_cifar10(path)


def test_labels_of_no_class_are_refused(tmp_path):
    an_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.full(40, 10)))
    with pytest.raises(ValueError, match="labels must be from 0 to 9, but item 0 has 10"):
        MNIST(tmp_path)
    path = tmp_path / "data.bin"
    path.write_bytes(bytes([200]) + bytes(CIFAR_BYTES - 1))
    with pytest.raises(ValueError, match="labels must be from 0 to 9, but item 0 has 200"):
        read_cifar10(path)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    an_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(39)))
    with pytest.raises(ValueError, match="hold 40 images and 39 labels"):
        MNIST(tmp_path)
    a_cifar10(tmp_path)
    whole = (tmp_path / "data_batch_3.bin").read_bytes()
    (tmp_path / "data_batch_3.bin").write_bytes(whole[:-CIFAR_BYTES])
    with pytest.raises(ValueError, match="hold 30, 30, 29, 30, 30"):
        CIFAR10(tmp_path)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_what_lacks_is_named(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has n.*: give the folder that holds"):
        make_task(name, tmp_path)
    with pytest.raises(ValueError, match="reads local files: give the folder"):
        make_task(name)
    with pytest.raises(ValueError, match="brings its data: leave the folder"):
        make_task("text", tmp_path)
    with pytest.raises(ValueError, match="a task must be one of digits-mlp, .*, not 'imagenet'"):
        make_task("imagenet")


# -- with backup workers ---------------------------------------------------------------------------


@pytest.mark.timeout(120)
@pytest.mark.skipif(launchers.placement() is not None, reason="it starts mpirun itself")
@pytest.mark.parametrize("name", [pytest.param("text", marks=pytest.mark.long), "mnist"])
def test_the_script_trains_any_task_with_backup_workers(name, tmp_path):
    assert name in TASKS
    more = ["--data", str(an_mnist(tmp_path, count=200))] if name == "mnist" else []
    run = subprocess.run(
        [sys.executable, "-m", "mpisync", "run", "-n", "4", str(ROOT / "mpisync/commands/task.py"), name,
         "--steps", "6", "--on-late", "requeue", "--every", "2", *more],
        env=environment(), capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    metric = {"text": "bits per byte", "mnist": "test accuracy"}[name]
    value = next(line.split(": ")[1] for line in run.stdout.splitlines() if line.startswith(f"{metric}: "))
    assert math.isfinite(float(value))
    assert "handed = " in run.stderr and "gradients did not count" in run.stderr
