"""Strict readers of MNIST's and CIFAR-10's files: what breaks the format is refused by name, nothing is unpickled."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np
import numpy.typing as npt

__all__ = ["read_cifar10", "read_idx"]

Bytes = npt.NDArray[np.uint8]

CLASSES = 10
MOST_ITEMS = 1_000_000  # a header that claims more is not believed, so that a small file cannot fill the memory
CIFAR_BYTES = 1 + 3 * 32 * 32  # of a record: the label, then the red, green and blue planes


def read_idx(path: str | os.PathLike[str], shape: tuple[int, ...] = ()) -> Bytes:
    """Read a file of unsigned bytes in IDX format, gzipped if its name ends in .gz.

    Args:
        path: The file.
        shape: Of an item: (28, 28) for MNIST's images, () for its labels.

    Returns:
        An array of N items, the file's first dimension.

    Raises:
        ValueError: The file breaks the format; the text says where and what to do.
        OSError: The file cannot be read.

    Example:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "labels")
        >>> with open(path, "wb") as file:
        ...     _ = file.write(bytes([0, 0, 8, 1, 0, 0, 0, 3]) + bytes([7, 2, 1]))
        >>> read_idx(path)
        array([7, 2, 1], dtype=uint8)
    """
    path = Path(path)
    try:
        with cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb") as file:
            return _read_idx(file, path, shape)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} must be a whole gzip file, but {error}: get it again") from None


def _read_idx(file: IO[bytes], path: Path, shape: tuple[int, ...]) -> Bytes:
    dimensions = 1 + len(shape)
    magic = bytes([0, 0, 8, dimensions])  # unsigned bytes, so many dimensions
    head = file.read(4 + 4 * dimensions)
    if head[:4] != magic:
        advice = " (it is gzipped: name it .gz)" if head[:2] == b"\x1f\x8b" else ""
        raise ValueError(
            f"{path} must begin with the IDX magic {magic.hex(' ')}, not {head[:4].hex(' ') or 'nothing'}{advice}: "
            "is it another of the four files, or of another format?"
        )
    if len(head) < 4 + 4 * dimensions:
        raise ValueError(f"{path} must have {4 + 4 * dimensions} bytes of header, but has {len(head)}: get it again")
    count, *found = (int(size) for size in np.frombuffer(head, ">u4", offset=4))
    if tuple(found) != shape:
        raise ValueError(f"{path} must hold items of {_sizes(shape)}, but says {_sizes(found)}: it is another data set")
    if not 0 < count <= MOST_ITEMS:
        raise ValueError(f"{path} must hold from 1 to {MOST_ITEMS:,} items, but says {count:,}: get it again")
    size = count * int(np.prod(shape, dtype=np.int64))
    body = file.read(size + 1)  # one more, to see that the file ends
    if len(body) != size:
        has = "more" if len(body) > size else f"{len(body):,}"
        raise ValueError(f"{path} must have {size:,} bytes after its header, but has {has}: get it again")
    return np.frombuffer(body, np.uint8).reshape(count, *shape)


def _sizes(shape: tuple[int, ...] | list[int]) -> str:
    return " × ".join(map(str, shape)) or "one byte"


def read_cifar10(path: str | os.PathLike[str]) -> tuple[Bytes, Bytes]:
    """Read a file of CIFAR-10's binary version.

    Returns:
        Images (N, 3, 32, 32) and labels (N,).

    Raises:
        ValueError: The file breaks the format; the text says where and what to do.
        OSError: The file cannot be read.

    Example:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "test_batch.bin")
        >>> with open(path, "wb") as file:
        ...     _ = file.write(bytes([6]) + bytes(3 * 32 * 32))
        >>> images, labels = read_cifar10(path)
        >>> images.shape, labels.tolist()
        ((1, 3, 32, 32), [6])
    """
    path = Path(path)
    size = path.stat().st_size
    if not size or size % CIFAR_BYTES or size // CIFAR_BYTES > MOST_ITEMS:
        raise ValueError(
            f"{path} must hold whole records of {CIFAR_BYTES} bytes, from 1 to {MOST_ITEMS:,}, but has {size:,} bytes, "
            f"{size % CIFAR_BYTES} too many: get CIFAR-10's binary version again"
        )
    records = np.fromfile(path, np.uint8).reshape(-1, CIFAR_BYTES)
    labels = records[:, 0].copy()
    check_labels(labels, path)
    return records[:, 1:].reshape(-1, 3, 32, 32), labels


def check_labels(labels: Bytes, path: Path) -> None:
    """Refuse a label that is none of the ten classes."""
    if (largest := int(labels.max())) >= CLASSES:
        where = int(labels.argmax())
        raise ValueError(
            f"{path}: labels must be from 0 to {CLASSES - 1}, but item {where} has {largest}: get it again"
        )
