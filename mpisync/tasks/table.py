"""Tasks by name; torch is imported when one is made."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpisync.tasks.base import Task

__all__ = ["TASKS", "make_task"]

_HOMES = {
    "digits-mlp": ("digits", "DigitsMLP"),
    "digits-cnn": ("digits", "DigitsCNN"),
    "text": ("text", "Text"),
    "hyperplane": ("hyperplane", "Hyperplane"),
    "mnist": ("images", "MNIST"),
    "cifar10": ("images", "CIFAR10"),
}
TASKS = tuple(_HOMES)
"""The names that `make_task` takes."""


def make_task(name: str, folder: str | os.PathLike[str] | None = None) -> Task:
    """Make the task of that name, its data loaded; nothing is downloaded.

    Args:
        name: One of `TASKS`.
        folder: Where the files of `mnist` and `cifar10` are; the others bring their data.

    Raises:
        ValueError: There is no such task, a folder is missing or not wanted, or a file breaks its format.
        OSError: A file is missing or cannot be read.
        ImportError: scikit-learn, which holds the digits, is not installed.

    Example:
        >>> task = make_task("hyperplane")
        >>> sum(parameter.numel() for parameter in task.model().parameters())
        8193
    """
    if name not in _HOMES:
        raise ValueError(f"a task must be one of {', '.join(TASKS)}, not {name!r}")
    module, kind = _HOMES[name]
    make = getattr(import_module(f"mpisync.tasks.{module}"), kind)
    if folder is None:
        if make.files:
            raise ValueError(f"the task {name} reads local files: give the folder that holds {make.files}")
        task: Task = make()
        return task
    if not make.files:
        raise ValueError(f"the task {name} brings its data: leave the folder {os.fspath(folder)!r} out")
    task = make(folder)
    return task
