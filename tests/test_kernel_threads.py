"""What is beneath the kernels: a pool of threads, and a cache of compiled code."""

import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mpisync.kernels import fold, jit
from mpisync.kernels.chunks import DONE, NEXT
from mpisync.kernels.dtypes import DTYPES
from mpisync.kernels.fold import FOLD_CHUNK, Reducer
from mpisync.kernels.thread_pool import ThreadPool

MANY = 3 * FOLD_CHUNK - 37  # chunks for three threads
# A first use compiles for some seconds, and a machine that tests is busy.
pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def threaded(monkeypatch):
    """Arrays of any size go to the pool."""
    monkeypatch.setattr(fold, "THREADED_BYTES", 0)


# -- threads ---------------------------------------------------------------------------------------


def folds_right(reducer):
    gradients = [np.full(MANY, j, np.float32) for j in (1, 2)]
    accumulator = np.empty(MANY, np.float32)
    reducer.fold(accumulator, gradients, DTYPES["float32"], start=True)
    return bool((accumulator == 3).all())


def helpers():
    return [t for t in threading.enumerate() if t.name.startswith("mpisync-kernels")]


def test_threads_start_with_the_first_work_and_none_is_left_after_close(threaded):
    reducer = Reducer(3)
    assert reducer.threads == 3 and helpers() == []
    assert folds_right(reducer)
    assert len(helpers()) == 2
    reducer.close()
    assert helpers() == []
    reducer.close()
    assert folds_right(reducer)
    reducer.close()
    assert helpers() == []


def test_a_forgotten_reducer_takes_its_threads_along(threaded):
    reducer = Reducer(2)
    assert folds_right(reducer)
    del reducer
    assert helpers() == []


def test_small_arrays_wake_no_thread():
    with Reducer(2) as reducer:
        gradient = np.ones(2 * FOLD_CHUNK, np.float32)  # two chunks
        reducer.fold(np.empty_like(gradient), [gradient], DTYPES["float32"], start=True)
        assert helpers() == []


def test_a_fork_after_use_does_not_hang(threaded):
    with Reducer(2) as reducer:
        assert folds_right(reducer)
        child = os.fork()
        if child == 0:
            well = folds_right(reducer) and len(helpers()) == 1
            reducer.close()
            os._exit(0 if well and helpers() == [] else 1)
        deadline_s = time.monotonic() + 30
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        if ended == (0, 0):
            os.kill(child, 9)
            os.waitpid(child, 0)
        assert ended == (child, 0)
        assert folds_right(reducer)


def claims_chunks(state):
    """A kernel in Python: claims, and does nothing."""
    while state[NEXT] < 2:
        state[NEXT] += 1
        state[DONE] += 1


def test_a_thread_that_gets_no_core_is_not_waited_for():
    free = threading.Event()

    def kernel(state):
        if threading.current_thread() is not threading.main_thread():
            free.wait()
        claims_chunks(state)

    pool = ThreadPool(2)
    state = np.zeros(3, np.int64)
    deadline = threading.Timer(20, free.set)
    deadline.start()
    pool.run(kernel, state, (), chunks=2)
    assert state[DONE] == 2 and not free.is_set()
    deadline.cancel()
    free.set()
    pool.close()


def test_an_error_in_a_thread_comes_out_at_the_caller():
    claimed = threading.Event()

    def kernel(state):
        if threading.current_thread() is threading.main_thread():
            claimed.wait()
            state[DONE] += 1
        else:
            claimed.set()
            raise MemoryError("no room")

    pool = ThreadPool(2)
    with pytest.raises(MemoryError, match="no room"):
        pool.run(kernel, np.zeros(3, np.int64), (), chunks=2)
    pool.run(claims_chunks, np.zeros(3, np.int64), (), chunks=2)
    pool.close()


def test_without_room_for_threads_the_caller_does_the_work(monkeypatch, threaded):
    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with Reducer(2) as reducer:
        assert folds_right(reducer)


# -- the cache -------------------------------------------------------------------------------------

PROGRAM = """
import numpy as np
from mpisync.kernels.atomics import fence
from mpisync.kernels.jit import directory
fence()
print(directory())
print(fence.stats.cache_hits[()] if () in fence.stats.cache_hits else 0)
"""


def directory_in(environment):
    """Compile in a process of that environment; return the cache's directory and its hits."""
    base = {key: value for key, value in os.environ.items() if key not in CACHE_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        env=base | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    where, hits = done.stdout.split()
    return where, int(hits)


CACHE_VARIABLES = {"HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "TMPDIR"}
NOWHERE = "/dev/null/x"  # no directory can be made here, not even by root


def test_kernels_are_kept_in_the_users_cache(tmp_path):
    where, hits = directory_in({"HOME": str(tmp_path)})
    assert where.startswith(f"{tmp_path}/.cache/mpisync/") and hits == 0
    assert directory_in({"HOME": str(tmp_path)}) == (where, 1)


def test_without_a_home_kernels_are_kept_in_a_private_temporary_directory(tmp_path):
    environment = {"HOME": NOWHERE, "TMPDIR": str(tmp_path)}
    where, hits = directory_in(environment)
    private = tmp_path / f"mpisync-{os.getuid()}"
    assert where.startswith(f"{private}/") and hits == 0
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert directory_in(environment) == (where, 1)


def test_a_temporary_directory_that_others_may_write_to_is_not_trusted(tmp_path):
    planted = tmp_path / f"mpisync-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    assert directory_in({"HOME": NOWHERE, "TMPDIR": str(tmp_path)}) == ("None", 0)
    assert list(planted.iterdir()) == []


def test_numbas_own_variable_goes_first(tmp_path):
    where, _ = directory_in({"NUMBA_CACHE_DIR": str(tmp_path / "asked"), "HOME": str(tmp_path)})
    assert where.startswith(f"{tmp_path}/asked/mpisync/")


def test_torn_files_in_the_cache_are_compiled_anew(tmp_path):
    environment = {"HOME": str(tmp_path)}
    where, _ = directory_in(environment)
    for file in os.listdir(where):
        os.truncate(os.path.join(where, file), 10)
    assert directory_in(environment) == (where, 0)
    assert directory_in(environment) == (where, 1)


def test_a_full_disk_costs_no_more_than_the_cache(monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    function = jit.compiled(lambda number: number + 1)
    monkeypatch.setattr(function._cache._cache_file, "save", full)
    assert function(1) == 2


def test_processes_that_compile_together_do_not_share_file_names():
    def name(number):
        return number

    patterns = {jit.compiled(name)._cache._cache_file._data_name_pattern for _ in range(2)}
    assert len(patterns) == 2 and all("{number" in pattern for pattern in patterns)


def test_a_cached_kernel_is_stale_when_any_source_changes(monkeypatch, tmp_path):
    before = jit._digest()
    shutil.copytree(Path(jit.__file__).parent, tmp_path / "kernels")
    monkeypatch.setattr(jit, "__file__", str(tmp_path / "kernels/jit.py"))
    assert jit._digest.__wrapped__() == before
    with open(tmp_path / "kernels/vectors.py", "a") as source:
        source.write("# another\n")
    assert jit._digest.__wrapped__() != before


def test_warming_compiles_all_that_a_step_needs():
    program = """
import numpy as np
from mpisync.kernels import chunks, fold
from mpisync.kernels.dtypes import DTYPES
fold.warm(["float32"])
kernels = [k for k in vars(chunks).values() if hasattr(k, "signatures")]
before = [len(k.signatures) for k in kernels]
a, b = np.ones(9, np.float32), np.ones(9, np.float32)
fold.Reducer(1).fold(a, [b] * 9, DTYPES["float32"], start=True, weights=[1] * 9, divisor=2)
fold.Reducer(1).fold(a, [b], DTYPES["float32"], start=False, divisor=2.5, norms=True)
fold.Reducer(1).copy(a, b)
b.flags.writeable = False
fold.pack(b, a, DTYPES["float32"]), fold.peak(b, DTYPES["float32"])
assert before == [len(k.signatures) for k in kernels] and sum(before) > 5, before
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=200).returncode == 0
