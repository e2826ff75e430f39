"""MNIST's and CIFAR-10's files, small ones of the right format, and those that break it."""

import gzip

import numpy as np
import pytest
import torch

from mpisync.tasks.readers import MOST_ITEMS, read_cifar10, read_idx
from mpisync.tasks.table import make_task

RNG = np.random.default_rng(0)
RECORD = 3073


def idx(array):
    """Return an array in IDX format."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def header(*sizes):
    return bytes([0, 0, 8, len(sizes)]) + b"".join(size.to_bytes(4, "big") for size in sizes)


def images(count):
    return RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)


def labels(count):
    return (np.arange(count) % 10).astype(np.uint8)


@pytest.fixture
def mnist(tmp_path):
    for part, count in (("train", 150), ("t10k", 30)):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images(count)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels(count)))
    return tmp_path


@pytest.fixture
def cifar10(tmp_path):
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        records = RNG.integers(0, 256, (20, RECORD), dtype=np.uint8)
        records[:, 0] = labels(20)
        (tmp_path / f"{name}.bin").write_bytes(records.tobytes())
    return tmp_path


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_folder_of_small_files_is_a_task(name, request):
    task = make_task(name, request.getfixturevalue(name))
    torch.manual_seed(0)
    model = task.model()
    assert f"({sum(p.numel() for p in model.parameters()):,} parameters)" in task.about
    batch = next(iter(task.loader(16)))
    assert batch[0].dtype == torch.uint8 and task.cost(batch) == 16.0
    optimizer = task.optimizer(model)
    losses = []
    for _ in range(30):  # the same batch by heart: the network takes these shapes, and its gradient is right
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert 0.0 <= task.evaluate(model)["test accuracy"] <= 1.0


def test_pixels_and_labels_are_those_of_the_files(mnist, cifar10):
    task = make_task("mnist", mnist)
    x, y = task._training.tensors
    raw = (mnist / "train-images-idx3-ubyte").read_bytes()
    assert x.shape == (150, 1, 28, 28) and x[3, 0, 5, 7] == raw[16 + 3 * 784 + 5 * 28 + 7]
    assert y.tolist() == labels(150).tolist() and len(task._testing[1]) == 30
    x, y = make_task("cifar10", cifar10)._training.tensors
    raw = (cifar10 / "data_batch_2.bin").read_bytes()  # after the 20 of the first
    assert x.shape == (100, 3, 32, 32) and y[23] == raw[3 * RECORD]
    assert x[23, 1, 2, 4] == raw[3 * RECORD + 1 + 1024 + 2 * 32 + 4], "planes are red, green, blue, row by row"


def test_files_may_be_gzipped(mnist):
    whole = make_task("mnist", mnist)._training.tensors
    for path in list(mnist.iterdir()):
        (mnist / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    zipped = make_task("mnist", mnist)._training.tensors
    assert all(torch.equal(one, other) for one, other in zip(whole, zipped, strict=True))


GOOD = idx(labels(20))
BAD_IDX = {
    "empty": (b"", "must begin with the IDX magic 00 00 08 01, not nothing"),
    "images for labels": (idx(images(2)), "magic 00 00 08 01, not 00 00 08 03"),
    "floats": (bytes([0, 0, 13, 1]) + GOOD[4:], "not 00 00 0d 01"),
    "gzipped": (gzip.compress(GOOD), r"not 1f 8b .* \(it is gzipped: name it .gz\)"),
    "half a header": (GOOD[:6], "must have 8 bytes of header, but has 6"),
    "torn": (GOOD[:-3], "must have 20 bytes after its header, but has 17: get it again"),
    "more": (GOOD + b"\0", "must have 20 bytes after its header, but has more"),
    "no items": (header(0), f"must hold from 1 to {MOST_ITEMS:,} items, but says 0"),
    "a huge claim": (header(2**32 - 1) + b"12", "but says 4,294,967,295"),
}


@pytest.mark.parametrize("case", BAD_IDX)
def test_what_breaks_idx_is_refused(case, tmp_path):
    content, rule = BAD_IDX[case]
    path = tmp_path / "labels"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rule) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


def test_images_of_another_size_are_refused(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(idx(RNG.integers(0, 256, (3, 32, 32), dtype=np.uint8)))
    with pytest.raises(ValueError, match="must hold items of 28 × 28, but says 32 × 32: it is another data set"):
        read_idx(path, (28, 28))


@pytest.mark.parametrize("damage", ["torn", "changed", "not gzip"])
def test_a_damaged_gzip_file_is_refused(damage, tmp_path):
    content = bytearray(gzip.compress(idx(images(5))))
    if damage == "torn":
        content = content[:-100]
    elif damage == "changed":
        content[-6] ^= 1  # of the check sum
    else:
        content = bytearray(idx(images(5)))
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="images.gz must be a whole gzip file, but .*: get it again"):
        read_idx(path, (28, 28))


def test_a_gzip_bomb_is_not_unpacked(tmp_path):
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(header(3) + bytes(50_000_000)))
    with pytest.raises(ValueError, match="must have 3 bytes after its header, but has more"):
        read_idx(path)


def test_what_does_not_belong_together_is_refused(mnist, cifar10):
    (mnist / "train-labels-idx1-ubyte").write_bytes(idx(labels(149)))
    with pytest.raises(ValueError, match="must hold as many items, but hold 150 images and 149 labels"):
        make_task("mnist", mnist)
    (mnist / "train-labels-idx1-ubyte").write_bytes(idx(labels(150) + np.uint8(1)))
    with pytest.raises(ValueError, match="labels must be from 0 to 9, but item 9 has 10"):
        make_task("mnist", mnist)
    short = cifar10 / "data_batch_4.bin"
    short.write_bytes(short.read_bytes()[: 19 * RECORD])  # cut between two records
    with pytest.raises(ValueError, match="must hold as many records each, but hold 20, 20, 20, 19, 20"):
        make_task("cifar10", cifar10)


def test_what_is_missing_is_named(mnist, cifar10):
    (mnist / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="has neither t10k-labels-idx1-ubyte nor .*: give the folder that"):
        make_task("mnist", mnist)
    (cifar10 / "test_batch.bin").unlink()
    with pytest.raises(FileNotFoundError, match="has no test_batch.bin: give the folder that holds data_batch_1.bin"):
        make_task("cifar10", cifar10)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "must hold whole records of 3073 bytes, from 1 to 1,000,000, but has 0 bytes"),
        (bytes(2 * RECORD - 1), "but has 6,145 bytes, 3072 too many"),
        (bytes([10]) + bytes(RECORD - 1), "labels must be from 0 to 9, but item 0 has 10"),
    ],
)
def test_what_breaks_cifar10s_format_is_refused(content, rule, tmp_path):
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rule) as caught:
        read_cifar10(path)
    assert str(path) in str(caught.value)
