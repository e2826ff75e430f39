"""Atomic words: nothing is lost between processes, and what was released is seen."""

import mmap
import os
import subprocess
import sys

import numpy as np
import pytest

from mpisync.kernels.atomics import fence, fetch_add, load_acquire, store_release

WORDS = pytest.mark.parametrize("dtype", [np.int64, np.uint32])

# Word 0 counts, word 1 says how many processes are ready; both then start together.
ADDER = """
import mmap, sys
import numpy as np
from mpisync.kernels.atomics import fetch_add, load_acquire

path, dtype, rounds, processes = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
with open(path, "r+b") as file:
    words = np.frombuffer(mmap.mmap(file.fileno(), 4096), dtype)
fetch_add(words, 0, 0)
fetch_add(words, 1, 1)
while load_acquire(words, 1) < processes:
    pass
for _ in range(rounds):
    fetch_add(words, 0, 1)
"""

# Word 0 is the newest message, the elements from 1024 on are its text, all alike.
WRITER = """
import mmap, os, sys
import numpy as np
from mpisync.kernels.atomics import load_acquire, store_release

path, dtype, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
with open(path, "r+b") as file:
    words = np.frombuffer(mmap.mmap(file.fileno(), 16384), dtype)
for n in range(1, rounds + 1):
    words[1024:1536] = n
    store_release(words, 0, n)
    while load_acquire(words, 1) < n:
        os.sched_yield()
"""


def shared(path, size):
    path.write_bytes(bytes(size))
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), size)


def start(program, *arguments):
    return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)])


@WORDS
def test_words_may_lie_apart(dtype):
    table = np.zeros((12, 40), dtype)
    words = table[:, 1]
    for row in range(12):
        store_release(words, row, 100 + row)
        assert load_acquire(words, row) == table[row, 1] == 100 + row
        assert fetch_add(words, row, 5) == 100 + row
    backwards = words[::-1]
    assert load_acquire(backwards, 0) == 116
    assert table.sum() == table[:, 1].sum() == sum(105 + row for row in range(12)), "nothing else was written"


@WORDS
def test_what_is_stored_is_loaded(dtype):
    words = np.zeros(4, dtype)
    store_release(words, 2, 7)
    assert words.tolist() == [0, 0, 7, 0]
    assert load_acquire(words, 2) == 7 and load_acquire(words, 1) == 0


@WORDS
def test_an_addition_returns_what_was_there(dtype):
    words = np.zeros(2, dtype)
    assert fetch_add(words, 1, 5) == 0
    assert fetch_add(words, 1, -2) == 5
    assert words.tolist() == [0, 3]


def test_uint32_wraps_around():
    words = np.array([2**32 - 1], np.uint32)
    assert fetch_add(words, 0, 2) == 2**32 - 1
    assert load_acquire(words, 0) == 1


def test_int64_holds_what_32_bits_do_not():
    words = np.zeros(1, np.int64)
    store_release(words, 0, -(2**40))
    assert fetch_add(words, 0, 1) == -(2**40)
    assert load_acquire(words, 0) == 1 - 2**40


def test_words_may_be_read_only_for_a_reader():
    words = np.arange(3)
    words.flags.writeable = False
    assert load_acquire(words, 2) == 2
    with pytest.raises(TypeError, match="writeable"):
        store_release(words, 2, 0)
    with pytest.raises(TypeError, match="writeable"):
        fetch_add(words, 2, 1)


@pytest.mark.parametrize("words", [np.zeros(2), np.zeros(2, np.int32), np.zeros((2, 2), np.int64)])
def test_other_arrays_are_refused(words):
    with pytest.raises(TypeError, match="words must be"):
        load_acquire(words, 0)


def test_a_fence_can_be_called():
    assert fence() is None


@WORDS
def test_no_addition_of_another_process_is_lost(dtype, tmp_path):
    words = np.frombuffer(shared(tmp_path / "words", 4096), dtype)
    name, rounds, processes = np.dtype(dtype).name, 200_000, 2
    adders = [start(ADDER, tmp_path / "words", name, rounds, processes) for _ in range(processes)]
    assert [adder.wait(60) for adder in adders] == [0] * processes
    assert load_acquire(words, 0) == rounds * processes


@WORDS
def test_what_was_written_before_a_release_is_seen_by_another_process(dtype, tmp_path):
    words = np.frombuffer(shared(tmp_path / "words", 16384), dtype)
    rounds = 300
    writer = start(WRITER, tmp_path / "words", np.dtype(dtype).name, rounds)
    torn = 0
    for n in range(1, rounds + 1):
        while load_acquire(words, 0) < n:
            assert writer.poll() in (None, 0)
            os.sched_yield()
        torn += bool((words[1024:1536] != n).any())
        store_release(words, 1, n)
    assert writer.wait(60) == 0
    assert torn == 0
