"""MNIST and CIFAR-10 from files in a local folder."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mpisync.tasks.base import Classification, Scaled
from mpisync.tasks.readers import Bytes, check_labels, read_cifar10, read_idx

__all__ = ["CIFAR10", "MNIST"]


def _tensors(images: Bytes, labels: Bytes) -> tuple[Tensor, Tensor]:
    return torch.tensor(images), torch.tensor(labels, dtype=torch.int64)


class MNIST(Classification):
    """Handwritten digits of 28 × 28 pixels.

    Source: Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits".

    Args:
        folder: Holds the four IDX files, each as it is or with .gz behind its name.

    Raises:
        ValueError: A file breaks its format, or two of them do not belong together.
        OSError: A file is missing or cannot be read.
    """

    name = "mnist"
    about = "handwritten digits of 28 × 28 pixels (MNIST), a small convolutional network (20,490 parameters)"
    files = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte"
    target = 0.95
    batch_size = 64
    steps = 600
    learning_rate = 3e-3

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__(self._read(Path(folder), "train"), self._read(Path(folder), "t10k"))

    def _read(self, folder: Path, part: str) -> tuple[Tensor, Tensor]:
        images_file = self._find(folder, f"{part}-images-idx3-ubyte")
        labels_file = self._find(folder, f"{part}-labels-idx1-ubyte")
        images, labels = read_idx(images_file, (28, 28)), read_idx(labels_file)
        if len(images) != len(labels):
            raise ValueError(
                f"{images_file} and {labels_file} must hold as many items, but hold {len(images):,} images and "
                f"{len(labels):,} labels: get both again"
            )
        check_labels(labels, labels_file)
        return _tensors(images[:, None], labels)

    def _find(self, folder: Path, name: str) -> Path:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
        raise FileNotFoundError(f"{folder} has neither {name} nor {name}.gz: give the folder that holds {self.files}")

    def model(self) -> nn.Module:
        """Return the network."""
        return nn.Sequential(
            Scaled(255),
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # 16 × 14 × 14
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),  # 1568
            nn.Linear(1568, 10),
        )  # fmt: skip


class CIFAR10(Classification):
    """Small colour photographs in ten classes.

    Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009); its binary version.

    Args:
        folder: Holds data_batch_1.bin to data_batch_5.bin and test_batch.bin.

    Raises:
        ValueError: A file breaks its format, or is shorter than the others.
        OSError: A file is missing or cannot be read.
    """

    name = "cifar10"
    about = "photographs of 32 × 32 pixels in ten classes (CIFAR-10), a small convolutional network (66,570 parameters)"
    files = "data_batch_1.bin to data_batch_5.bin and test_batch.bin"
    target = 0.6
    batch_size = 64
    steps = 2000
    learning_rate = 2e-3

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        parts = [self._read(Path(folder), f"data_batch_{number}.bin") for number in range(1, 6)]
        sizes = [len(labels) for _, labels in parts]
        if len(set(sizes)) > 1:  # a file that was cut between two records
            raise ValueError(
                f"{folder}: data_batch_1.bin to data_batch_5.bin must hold as many records each, but hold "
                f"{', '.join(map(str, sizes))}: get the shorter ones again"
            )
        images, labels = zip(*parts, strict=True)
        training = _tensors(np.concatenate(images), np.concatenate(labels))
        super().__init__(training, _tensors(*self._read(Path(folder), "test_batch.bin")))

    def _read(self, folder: Path, name: str) -> tuple[Bytes, Bytes]:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: give the folder that holds {self.files}")
        return read_cifar10(folder / name)

    def model(self) -> nn.Module:
        """Return the network."""
        return nn.Sequential(
            Scaled(255),
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # 32 × 16 × 16
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # 64 × 8 × 8
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),  # 1024
            nn.Linear(1024, 10),
        )  # fmt: skip
