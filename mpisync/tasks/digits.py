"""Handwritten digits: the 1,797 images of 8 by 8 pixels that come with scikit-learn."""

from __future__ import annotations

import torch
from torch import nn

from mpisync.tasks.base import Classification, Scaled

__all__ = ["DigitsCNN", "DigitsMLP"]


class _Digits(Classification):
    """1,437 images to train on; 360 held out, as many of each digit as it has a share in the whole."""

    target = 0.95
    batch_size = 32
    steps = 200

    def __init__(self) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.uint8).unsqueeze(1)  # 1797 × 1 × 8 × 8, from 0 to 16
        labels = torch.tensor(digits.target)
        train_x, test_x, train_y, test_y = train_test_split(
            images, labels, test_size=360, stratify=labels, random_state=0
        )
        super().__init__((train_x, train_y), (test_x, test_y))


class DigitsMLP(_Digits):
    """Digits for a perceptron with one hidden layer."""

    name = "digits-mlp"
    about = "handwritten digits of 8 × 8 pixels, a perceptron with one hidden layer (9,610 parameters)"
    learning_rate = 5e-3

    def model(self) -> nn.Module:
        """Return the perceptron."""
        return nn.Sequential(Scaled(16), nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


class DigitsCNN(_Digits):
    """Digits for a small convolutional network, that of the demo's script."""

    name = "digits-cnn"
    about = "handwritten digits of 8 × 8 pixels, a small convolutional network (38,282 parameters)"
    learning_rate = 1e-2

    def model(self) -> nn.Module:
        """Return the network."""
        return nn.Sequential(
            Scaled(16),
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # 16 × 4 × 4
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(),  # 512
            nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip
