"""Seeds: every random number of a computation follows from (seed, worker, sequence)."""

import enum
import hashlib
import random
import struct

import numpy as np
import torch


class Stream(enum.IntEnum):
    """The purpose of random numbers; streams of the same computation are independent."""

    ORDER = 0  # the permutation of an epoch, the same on all workers
    LOADER = 1  # what a loader draws by itself when an epoch begins
    DATA = 2  # drawing and augmenting one batch
    LOOP = 3  # the user's loop body: dropout, noise


def derive(seed: int, worker: int, sequence: int, stream: Stream) -> int:
    """Return 64 bits that follow from the four arguments and nothing else."""
    # A hash, not a sum: seed 1 of worker 0 must not be seed 0 of worker 1. It takes 1 us.
    words = struct.pack("<Q3q", seed & 0xFFFFFFFFFFFFFFFF, worker, sequence, stream)
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")


def seed_everything(seed: int, worker: int, sequence: int, stream: Stream) -> None:
    """Seed the global generators of torch, NumPy and random for one computation."""
    value = derive(seed, worker, sequence, stream)
    # torch.manual_seed formats a stack trace for each backend that has not started (160 us, at
    # every batch); the CPU's generator alone takes 1 us.
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(value)
    np.random.seed(value & 0xFFFFFFFF)
    random.seed(value)
