"""The device's kernels, compiled as C++, against the CPU's, bit by bit: what a card must compute too."""

import doctest
import os
import platform
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from host_kernel import built, compiled
from launch import ROOT
from test_kernels import bits, gradients_of, placed, same, stored, widened
from test_large import GIB, available_bytes

from mpisync.device import kernel
from mpisync.device.kernel import LINK, NORM_BLOCK, PEAKS, Kernels, largest
from mpisync.kernels import fold
from mpisync.kernels.chunks import add_partials
from mpisync.kernels.dtypes import DTYPES
from mpisync.kernels.fold import Reducer

NAMES = list(DTYPES)
# A first use of the CPU's kernels compiles for some seconds, and a machine that tests is busy.
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def kernels(launch):
    return Kernels(launch, multiprocessors=1)


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def at(array):
    return array.ctypes.data


def folded(kernels, accumulator, gradients, name, **options):
    """Fold by the device's kernel, in place, and return the largest magnitude."""
    peaks = np.zeros(PEAKS, np.uint64)
    addresses, dtype = [at(g) for g in gradients], DTYPES[name]
    kernels.fold(at(accumulator), addresses, accumulator.size, dtype, peaks=at(peaks), **options)
    return largest(peaks, DTYPES[dtype.accumulator.name])


def expected(accumulator, gradients, name, **options):
    """Fold by the CPU's kernel, into a copy, and return it and the largest magnitude."""
    result = accumulator.copy()
    Reducer().fold(result, gradients, DTYPES[name], **options)
    return result, fold.peak(result, DTYPES[result.dtype.name])


def of_any_bits(rng, name, count, size):
    """Numbers of all magnitudes: subnormal ones, Inf and NaN too."""
    dtype = DTYPES[name]
    return [rng.integers(0, 256, size * dtype.itemsize, np.uint8).view(dtype.storage) for _ in range(count)]


def weights_of(rng, count):
    return rng.uniform(0.1, 3, count).tolist()


# -- the fold --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_gradients_gives_the_cpus_bits(kernels, name, rng):
    gradients = gradients_of(rng, name, 64, 1037)
    before = rng.standard_normal(1037).astype(DTYPES[name].accumulator)
    for count in range(65):
        weights = weights_of(rng, count)
        for start in (True, False) if count else (False,):
            for w in (None, weights):
                for divisor in (None, 3.0, float(count or 1)):
                    options = {"start": start, "weights": w, "divisor": divisor}
                    result = before.copy()
                    peak = folded(kernels, result, gradients[:count], name, **options)
                    wanted, highest = expected(before, gradients[:count], name, **options)
                    assert same(result, wanted) and peak == highest, (count, options)


@pytest.mark.parametrize("name", NAMES)
def test_arrays_may_begin_anywhere_and_have_any_length(kernels, name, rng):
    dtype = DTYPES[name]
    for size in [*range(20), 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 4095, 4096, 4097]:
        for offset in range(9):
            for apart, behind in ((0, 0), (1, 0), (0, 1)):  # aligned together somewhere; the gradients not; the sum not
                gradients = [placed(g, offset + apart * j) for j, g in enumerate(gradients_of(rng, name, 3, size))]
                memory, begin = placed(np.full(size + 32, 77, dtype.accumulator), 0), offset + behind
                accumulator = memory[begin : begin + size]
                folded(kernels, accumulator, gradients, name, start=True, divisor=3.0)
                wanted, _ = expected(np.empty(size, dtype.accumulator), gradients, name, start=True, divisor=3.0)
                assert same(accumulator, wanted), (size, offset, apart, behind)
                assert (memory[:begin] == 77).all() and (memory[begin + size :] == 77).all()


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_any_bits_give_the_cpus(kernels, name, rng):
    size = 200_003
    gradients = of_any_bits(rng, name, 9, size)
    for count, weights in ((1, None), (3, None), (3, weights_of(rng, 3)), (9, weights_of(rng, 9))):
        options = {"start": True, "weights": weights, "divisor": 3.0}
        result = np.empty(size, DTYPES[name].accumulator)
        folded(kernels, result, gradients[:count], name, **options)
        wanted, _ = expected(result, gradients[:count], name, **options)
        assert same(result, wanted), (count, weights)
        assert count > 1 or (np.isnan(result).any() and np.isfinite(result).any())


@pytest.mark.parametrize("name", NAMES)
def test_special_values_give_the_cpus_bits(kernels, name):
    kind = np.float16 if name == "float16" else DTYPES[name].accumulator.type
    limits = np.finfo(kind)
    special = [0.0, 1.0, np.inf, np.nan, limits.max, limits.tiny, limits.tiny / 2, limits.smallest_subnormal]
    special = np.array([*special, *(-x for x in special), 1 + limits.eps], kind)
    first, second = (grid.ravel() for grid in np.meshgrid(stored(special, name), stored(special, name)))
    for gradients in ([first], [first, second], [second, first, first]):
        for weights in (None, [0.0, -1.0, 0.5][: len(gradients)]):
            for divisor in (None, 3.0, 1e-30, np.inf):
                options = {"start": True, "weights": weights, "divisor": divisor}
                result = np.empty(first.size, DTYPES[name].accumulator)
                folded(kernels, result, gradients, name, **options)
                assert same(result, expected(result, gradients, name, **options)[0]), options


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_every_16_bit_number_is_widened_exactly(kernels, name):
    gradient = np.arange(1 << 16, dtype=np.uint16)
    result = np.empty(gradient.size, np.float32)
    folded(kernels, result, [gradient], name, start=True)
    assert same(result, widened(gradient, name))


def test_the_number_of_threads_changes_no_bit(launch, rng):
    gradients, results = gradients_of(rng, "float32", 11, 30_011), []
    for multiprocessors in (1, 2, 1000):
        result = np.empty(30_011, np.float32)
        peak = folded(Kernels(launch, multiprocessors), result, gradients, "float32", start=True, divisor=11.0)
        results.append((result.tobytes(), peak))
    assert len(set(results)) == 1


def test_a_launch_takes_no_more_blocks_than_the_device_holds():
    launches = []
    kernels = Kernels(lambda name, blocks, threads, argument: launches.append((name, blocks, threads)), 2)
    kernels.fold(64, [4096] * 20, 1 << 40, DTYPES["bfloat16"], start=True)
    kernels.squares(4096, 1 << 40, DTYPES["float32"], 64)
    kernels.pack(4096, 0, 100, DTYPES["float64"])
    kernels.pack(4096, 0, 0, DTYPES["float64"])
    assert launches == [
        *[("fold<BFloat16>", 16, 256)] * 3, ("squares<float>", 128, 32), ("pack<unsigned long long>", 1, 256)
    ]  # fmt: skip


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, -np.nan])
@pytest.mark.parametrize("name", NAMES)
def test_one_bad_element_is_found_wherever_it_is(kernels, name, bad):
    size = 1037
    spoilt, good = (stored(np.ones(size), name) for _ in range(2))
    result = np.empty(size, DTYPES[name].accumulator)
    assert folded(kernels, result, [good, good], name, start=True) == 2
    for i in [*range(20), *range(20, size - 20, 97), *range(size - 20, size)]:
        spoilt[i] = stored(np.array([bad]), name)[0]
        assert folded(kernels, result, [good, spoilt], name, start=True, divisor=2.0) == np.inf, i
        spoilt[i] = good[i]


# -- a fold and a step of plain SGD in one pass ----------------------------------------------------


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_an_update_gives_the_cpus_bits_and_torchs(kernels, name, rng):
    dtype = DTYPES[name]
    gradients = gradients_of(rng, name, 64, 1037)
    before, summed = rng.standard_normal((2, 1037)).astype(name)
    for count in range(65):
        for start in (True, False) if count else (False,):
            for weights in (None, weights_of(rng, count)):
                options = {"weights": weights, "divisor": 3.0}
                mean, _ = expected(summed, gradients[:count], name, start=start, **options)
                by_cpu = before.copy()
                Reducer().fused_sgd_step(by_cpu, [mean], dtype, rate=0.3)
                by_torch = torch.from_numpy(before.copy()).add_(torch.from_numpy(mean), alpha=-0.3)
                result, accumulator, peaks = before.copy(), summed.copy(), np.zeros(PEAKS, np.uint64)
                kernels.fused_sgd_step(
                    at(result), [at(g) for g in gradients[:count]], result.size, dtype,
                    accumulator=at(accumulator), start=start, rate=0.3, peaks=at(peaks), **options,
                )  # fmt: skip
                assert same(result, by_cpu) and same(result, by_torch.numpy()), (count, start, weights)
                assert largest(peaks, dtype) == np.abs(mean).max()


def fused_multiply_add(a, b, c):
    """a * b + c in float32, rounded once: float64 holds the product, and rounding the sum to odd loses nothing."""
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    other = total - product
    error = (product - (total - other)) + (c - other)
    is_even = (total.view(np.int64) & 1) == 0
    odd = np.where((error != 0) & is_even, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    return odd.astype(np.float32)


def test_an_update_is_rounded_once(kernels, rng):
    for name in ("float32", "float64"):
        mean, before = rng.standard_normal((2, 5000)).astype(name) * np.array([[1], [2**-6]], name)
        rate, result = np.dtype(name).type(0.3), before.copy()
        kernels.fused_sgd_step(
            at(result), [at(mean)], mean.size, DTYPES[name], accumulator=0, start=True, rate=0.3
        )
        if name == "float32":
            exact = fused_multiply_add(mean, -rate, before)
        else:
            pairs = zip(before, mean, strict=True)
            exact = np.array([float(Fraction(p) - Fraction(rate) * Fraction(m)) for p, m in pairs])
        assert same(result, exact)
        assert not same(result, before - rate * mean), "numbers for which rounding twice is something else"


# -- copies and norms ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_packing_copies_every_bit_and_finds_the_largest_magnitude(kernels, name, rng):
    dtype = DTYPES[name]
    for size in [1, 2, 3, *range(4, 60, 5), 4097, 40_011]:
        for offset, gradient in enumerate([*of_any_bits(rng, name, 4, size), *gradients_of(rng, name, 5, size)]):
            source, peaks = placed(gradient, offset), np.zeros((2, PEAKS), np.uint64)
            memory = placed(np.zeros(size + 32, dtype.storage), 0)
            kernels.pack(at(source), at(memory[3:]), size, dtype, peaks=at(peaks[0]))
            kernels.pack(at(source), 0, size, dtype, peaks=at(peaks[1]))
            assert memory[3 : 3 + size].tobytes() == source.tobytes()
            assert not memory[:3].any() and not memory[3 + size :].any()
            assert largest(peaks[0], dtype) == largest(peaks[1], dtype) == fold.peak(source, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_norms_have_the_cpus_bits(launch, name, rng):
    for size in (1, 15, 16, 17, NORM_BLOCK, NORM_BLOCK + 7, 70 * NORM_BLOCK + 1037):
        for offset in (0, 1):
            (gradient,) = (placed(g, offset) for g in gradients_of(rng, name, 1, size))
            result = Reducer().fold(
                np.empty(size, DTYPES[name].accumulator), [gradient], DTYPES[name], start=True, norms=True
            )
            partials = np.full((1, -(-size // NORM_BLOCK)), np.nan)
            Kernels(launch, multiprocessors=2).squares(at(gradient), size, DTYPES[name], at(partials))
            assert (add_partials(partials, 0),) == result.gradient_squares


@pytest.mark.long
def test_kernels_count_beyond_31_bits(launch):
    if available_bytes() < 10 * GIB:
        pytest.skip("needs 10 GiB of free memory")
    # one thread: that many, one after the other, would each touch all pages
    kernels = Kernels(lambda name, blocks, threads, argument: launch(name, 1, 1, argument), multiprocessors=1)
    size, dtype = (1 << 31) + 70, DTYPES["bfloat16"]
    gradient, result = np.zeros(size, np.uint16), np.empty(size, np.float32)
    gradient[-70:] = stored(np.arange(70), "bfloat16")
    assert folded(kernels, result, [gradient], "bfloat16", start=True) == 69
    assert result[-70:].tolist() == list(range(70)) and not result[:-70].any()
    partials = np.empty(-(-size // NORM_BLOCK))
    kernels.squares(at(gradient), size, dtype, at(partials))
    assert partials[-1] == sum(i * i for i in range(70)) and not partials[:-1].any()
    peaks = np.zeros(PEAKS, np.uint64)
    kernels.pack(at(gradient), 0, size, dtype, peaks=at(peaks))
    assert largest(peaks, dtype) == 69


# -- what is refused -------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_before_anything_is_launched():
    def launch(*_):
        raise AssertionError("launched")

    kernels, dtype = Kernels(launch, 1), DTYPES["float32"]
    with pytest.raises(ValueError, match="gradients must not be empty where the sum starts"):
        kernels.fold(64, [], 10, dtype, start=True)
    with pytest.raises(ValueError, match="weights must be as many as gradients: 1, not 2"):
        kernels.fold(64, [128], 10, dtype, start=True, weights=[1, 2])
    with pytest.raises(ValueError, match="multiple of the 4 bytes of an element, and not 130"):
        kernels.fold(64, [*[128] * LINK, 130], 10, dtype, start=True)
    for start, count in ((True, LINK + 1), (False, 1)):
        with pytest.raises(ValueError, match="and not 0"):
            kernels.fused_sgd_step(64, [128] * count, 10, dtype, accumulator=0, start=start, rate=0.1)
    with pytest.raises(TypeError, match="dtype must be one of float64, float32, not bfloat16"):
        kernels.fused_sgd_step(64, [128], 10, DTYPES["bfloat16"], accumulator=0, start=True, rate=0.1)
    with pytest.raises(ValueError, match="multiple of the 8 bytes"):
        kernels.pack(128, 132, 10, DTYPES["float64"])
    with pytest.raises(ValueError, match="multiple of the 8 bytes"):
        kernels.squares(128, 10, dtype, 132)


# -- that these tests would notice -----------------------------------------------------------------


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the compiler's option for FMA is x86's")
@pytest.mark.parametrize("name", ["float32", "float64"])
def test_contraction_would_be_seen(name, rng, tmp_path):
    kernels = Kernels(compiled(tmp_path, "-ffp-contract=fast", "-mfma"), multiprocessors=1)
    gradients, weights = gradients_of(rng, name, 3, 10_000), weights_of(rng, 3)
    result = np.empty(10_000, name)
    folded(kernels, result, gradients, name, start=True, weights=weights)
    wanted, _ = expected(result, gradients, name, start=True, weights=weights)
    assert (bits(result) != bits(wanted)).sum() > 1000


# Arguments: the library, and how many elements too many it is told of. Arrays end where their memory does.
SANITIZED = """
import sys
import numpy as np
from host_kernel import loaded
from mpisync.device.kernel import NORM_BLOCK, PEAKS, Kernels
from mpisync.kernels.dtypes import DTYPES

kernels, beyond = Kernels(loaded(sys.argv[1]), multiprocessors=1), int(sys.argv[2])
for dtype in DTYPES.values():
    for size in [*range(1, 18), 100, NORM_BLOCK + 19]:
        for offset in range(5):
            for apart, behind in ((0, 0), (1, 0), (0, 1)):
                arrays = [np.ones(offset + apart * j + size, dtype.storage)[offset + apart * j :] for j in range(10)]
                sums = [np.ones(offset + behind + size, dtype.accumulator)[offset + behind :] for _ in range(2)]
                peaks, partials = np.zeros(PEAKS, np.uint64), np.zeros(-(-size // NORM_BLOCK))
                gradients = [array.ctypes.data for array in arrays]
                total, parameters = (array.ctypes.data for array in sums)
                n, p = size + beyond, peaks.ctypes.data
                kernels.fold(total, gradients, n, dtype, start=True, divisor=3.0, peaks=p)
                kernels.fold(total, gradients[:3], n, dtype, start=False, weights=[1.0, 2.0, 3.0], peaks=p)
                if dtype.storage == dtype.accumulator:
                    kernels.fused_sgd_step(
                        parameters, gradients, n, dtype, accumulator=total, start=True, rate=0.1, peaks=p
                    )
                kernels.pack(gradients[0], gradients[1], n, dtype, peaks=p)
                kernels.squares(gradients[0], n, dtype, partials.ctypes.data)
print("nothing found")
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """The kernels with checks of addresses and of undefined behaviour, and the environment that they want."""
    flags = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    library = built(tmp_path_factory.mktemp("sanitized"), *flags)
    runtime = subprocess.run(
        [shutil.which("g++"), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True, timeout=20
    ).stdout.strip()
    path = f"{ROOT}:{Path(__file__).parent}"
    return library, {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": path}


@pytest.mark.parametrize("beyond", [0, 1])
def test_no_address_beyond_the_arrays_and_nothing_undefined(sanitized, beyond):
    library, env = sanitized
    run = subprocess.run(
        [sys.executable, "-c", SANITIZED, library, str(beyond)], env=env, capture_output=True, text=True, timeout=100
    )
    if beyond:
        assert run.returncode != 0 and "heap-buffer-overflow" in run.stderr, "an element too many would be seen"
    else:
        assert (run.returncode, run.stdout) == (0, "nothing found\n"), run.stderr


def test_undefined_behaviour_would_be_seen(sanitized):
    library, env = sanitized
    program = """
import sys
import numpy as np
from host_kernel import loaded
from mpisync.device import kernel

memory = np.zeros(100)
argument = kernel._Pack(source=memory.ctypes.data + 8 - memory.ctypes.data % 16, target=0, size=2, packs=1)
loaded(sys.argv[1])("pack<unsigned long long>", 1, 1, argument)
"""
    run = subprocess.run([sys.executable, "-c", program, library], env=env, capture_output=True, text=True, timeout=60)
    assert run.returncode != 0 and "misaligned address" in run.stderr


def test_the_example_runs():
    results = doctest.testmod(kernel)
    assert results.attempted and not results.failed


def test_the_plan_needs_neither_cupy_nor_torch_nor_numba():
    program = "import sys, mpisync.device.kernel; assert not {'cupy', 'torch', 'numba'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 0
    assert kernel.SOURCE.read_text().count("#include") == 0
