"""Folds, norms and copies against NumPy, bit by bit."""

import math

import numpy as np
import pytest
import torch

from mpisync.kernels import fold
from mpisync.kernels.chunks import BLOCK
from mpisync.kernels.dtypes import DTYPES
from mpisync.kernels.fold import FOLD_CHUNK, Reducer, pack, peak

NAMES = list(DTYPES)
MANY = 3 * FOLD_CHUNK - 37  # chunks for three threads, the last one odd
# A first use compiles for some seconds, and a machine that tests is busy.
pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def threaded(monkeypatch):
    """Arrays of any size go to the pool."""
    monkeypatch.setattr(fold, "THREADED_BYTES", 0)


@pytest.fixture(params=["stored", "streamed"])
def stores(request, monkeypatch):
    """Results of any size go through the caches, or past them."""
    monkeypatch.setattr(fold, "STREAMED_BYTES", 0 if request.param == "streamed" else 1 << 60)


def gradients_of(rng, name, count, size):
    """Random gradients of such different magnitudes that every other order rounds differently."""
    values = rng.standard_normal((count, size)) * 2.0 ** rng.integers(-8, 8, (count, size))
    return [stored(row, name) for row in values]


def stored(values, name):
    if name == "bfloat16":
        return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return np.asarray(values, name).view(DTYPES[name].storage)


def widened(gradient, name):
    if name == "bfloat16":
        return (gradient.astype(np.uint32) << 16).view(np.float32)
    if name == "float16":
        return gradient.view(np.float16).astype(np.float32)
    return gradient


def reference(accumulator, gradients, name, weights=None, divisor=None):
    """The fold in NumPy, rounded after every operation; from `accumulator` unless it is None."""
    kind = DTYPES[name].accumulator.type
    total = accumulator
    for j, gradient in enumerate(gradients):
        term = widened(gradient, name)
        if weights is not None:
            term = kind(weights[j]) * term
        total = term.copy() if total is None else total + term
    return total if divisor is None else total / kind(divisor)


def bits(array):
    """The bits of floats, those of all NaNs alike."""
    integers = array.view(f"u{array.itemsize}").copy()
    integers[np.isnan(array)] = 0
    return integers


def same(array, other):
    return array.dtype == other.dtype and np.array_equal(bits(array), bits(other))


def placed(array, offset):
    """A copy that begins `offset` elements behind an address aligned to a cache line."""
    memory = np.zeros(array.nbytes + 256, np.uint8)
    begin = -memory.ctypes.data % 64 + offset * array.itemsize
    copy = memory[begin : begin + array.nbytes].view(array.dtype)
    copy[:] = array
    return copy


# -- the fold --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 21))
@pytest.mark.parametrize("name", NAMES)
def test_a_fold_is_a_strict_left_fold(name, count, rng, stores):
    dtype = DTYPES[name]
    gradients = gradients_of(rng, name, count, 2 * BLOCK + 1037)
    before = rng.standard_normal(gradients[0].size).astype(dtype.accumulator)
    weights = rng.uniform(0.1, 3, count)
    for start in (True, False):
        for w in (None, weights):
            for divisor in (None, 3.0):
                accumulator = before.copy()
                fold.Reducer().fold(accumulator, gradients, dtype, start=start, weights=w, divisor=divisor)
                expected = reference(None if start else before, gradients, name, w, divisor)
                assert same(accumulator, expected), (start, w is not None, divisor)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_threads_changes_no_bit(name, threads, rng, threaded, stores):
    dtype = DTYPES[name]
    gradients = gradients_of(rng, name, 6, MANY)
    weights = rng.uniform(0.1, 3, 6)
    accumulator = np.empty(MANY, dtype.accumulator)
    expected = reference(None, gradients, name, weights, 5.0)
    with Reducer(threads) as reducer:
        for _ in range(5):
            accumulator[:] = np.nan
            reducer.fold(accumulator, gradients, dtype, start=True, weights=weights, divisor=5.0)
            assert same(accumulator, expected)


@pytest.mark.parametrize("name", NAMES)
def test_arrays_may_begin_anywhere_and_have_any_length(name, rng, stores):
    dtype = DTYPES[name]
    for size in [*range(40), 1023, 1024, 1025, BLOCK - 1, BLOCK + 1]:
        for offset in (0, 1, 3, 15, 16) if size > 40 else range(18):
            gradients = [placed(g, offset + j) for j, g in enumerate(gradients_of(rng, name, 5, size))]
            memory = placed(np.full(size + 32, 77, dtype.accumulator), 0)
            accumulator = memory[offset : offset + size]
            Reducer().fold(accumulator, gradients, dtype, start=True, divisor=5.0)
            assert same(accumulator, reference(None, gradients, name, None, 5.0)), (size, offset)
            assert (memory[:offset] == 77).all() and (memory[offset + size :] == 77).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_fold_over_several_calls_is_the_fold_in_one(name, rng):
    dtype = DTYPES[name]
    gradients = gradients_of(rng, name, 7, 1000)
    accumulator = np.empty(1000, dtype.accumulator)
    reducer = Reducer()
    reducer.fold(accumulator, gradients[:2], dtype, start=True)
    reducer.fold(accumulator, gradients[2:3], dtype, start=False)
    reducer.fold(accumulator, gradients[3:], dtype, start=False)
    result = reducer.fold(accumulator, [], dtype, start=False, divisor=7.0, norms=True)
    assert same(accumulator, reference(None, gradients, name, None, 7.0))
    assert result.finite and result.gradient_squares == ()
    assert result.sum_squares == pytest.approx(math.fsum(accumulator.astype(float) ** 2))


@pytest.mark.parametrize("name", NAMES)
def test_special_values_come_out_as_ieee_754_says(name, rng):
    dtype = DTYPES[name]
    kind = np.float16 if name == "float16" else dtype.accumulator.type
    limits = np.finfo(kind)
    special = [0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, limits.max, -limits.max, limits.tiny]
    special += [limits.tiny / 2, -limits.tiny / 4, limits.smallest_subnormal, 1 + limits.eps]
    values = stored(np.array(special, kind), name)
    first, second = (grid.ravel() for grid in np.meshgrid(values, values))
    accumulator = np.empty(first.size, dtype.accumulator)
    with np.errstate(all="ignore"):
        for gradients in ([first], [first, second], [second, first, first]):
            for divisor in (None, 2.0, 3.0):
                Reducer().fold(accumulator, gradients, dtype, start=True, divisor=divisor)
                assert same(accumulator, reference(None, gradients, name, None, divisor))


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_every_16_bit_number_is_widened_exactly(name, flush):
    gradient = np.arange(1 << 16, dtype=np.uint16)
    expected = widened(gradient, name)
    if name == "bfloat16" and flush:  # its subnormals are float32's, and arithmetic flushes those
        keep = np.abs(expected) >= np.finfo(np.float32).tiny
        gradient, expected = gradient[keep], expected[keep]
    accumulator = np.empty(gradient.size, np.float32)
    torch.set_flush_denormal(flush)
    try:
        Reducer().fold(accumulator, [gradient], DTYPES[name], start=True)
    finally:
        torch.set_flush_denormal(False)
    assert same(accumulator, expected)


def test_a_weight_is_rounded_and_so_is_its_product():
    size = 64
    gradient = np.full(size, 1 + 2**-12, np.float32)
    accumulator = np.full(size, -1.0, np.float32)
    Reducer().fold(accumulator, [gradient], DTYPES["float32"], start=False, weights=[1 + 2**-12])
    assert (accumulator == np.float32(2**-11)).all()  # a fused multiply-add leaves 2**-24 more


# -- finite or not ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, -math.nan])
@pytest.mark.parametrize("name", NAMES)
def test_one_bad_element_is_found_wherever_it_is(name, bad, stores):
    dtype = DTYPES[name]
    size = BLOCK + 1037
    good = stored(np.ones(size), name)
    spoilt, accumulator = good.copy(), np.empty(size, dtype.accumulator)
    reducer = Reducer()
    # Within whole vectors a lane is like another, so far from the edges some positions stand for all.
    for i in [*range(70), *range(70, size - 70, 97), *range(size - 70, size)]:
        spoilt[i] = stored(np.array([bad]), name)[0]
        assert peak(spoilt, dtype) == np.inf, i
        assert pack(spoilt, np.empty_like(spoilt), dtype) == np.inf, i
        arrays = [good, spoilt, good, good, good, good] if i % 2 else [good, spoilt]
        assert not reducer.fold(accumulator, arrays, dtype, start=True, divisor=2.0).finite, i
        spoilt[i] = good[i]
    assert peak(spoilt, dtype) == 1
    assert pack(spoilt, np.empty_like(spoilt), dtype) < np.inf
    assert reducer.fold(accumulator, [good, spoilt], dtype, start=True, divisor=2.0).finite


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_numbers_are_finite_and_their_sum_is_not(name):
    dtype = DTYPES[name]
    largest = np.full(100, dtype.infinity - 1, f"u{dtype.itemsize}").view(dtype.storage)
    accumulator = np.empty(100, dtype.accumulator)
    assert peak(largest, dtype) == widened(largest, name)[0]
    assert Reducer().fold(accumulator, [largest], dtype, start=True).finite
    weights = [float(np.finfo(dtype.accumulator).max)] * 2
    result = Reducer().fold(accumulator, [largest] * 2, dtype, start=True, weights=weights)
    assert not result.finite and not np.isfinite(accumulator).any()


@pytest.mark.parametrize("position", [0, FOLD_CHUNK - 1, FOLD_CHUNK, 2 * FOLD_CHUNK, MANY - 1])
def test_a_bad_element_in_any_threads_chunk_is_found(position, threaded):
    gradient, accumulator = np.ones(MANY, np.float32), np.empty(MANY, np.float32)
    gradient[position] = np.nan
    with Reducer(3) as reducer:
        assert not reducer.fold(accumulator, [gradient], DTYPES["float32"], start=True).finite
        assert reducer.peak(gradient, DTYPES["float32"]) == np.inf


# -- a fold and a step of plain SGD in one pass ----------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("name", ["float32", "float64"])
def test_a_descent_is_the_fold_and_torchs_step_bit_by_bit(name, count, rng, threaded):
    kind = getattr(torch, name)
    for size in (1, 15, 16, 17, 100, 1024, 1025, BLOCK + 19, MANY):
        gradients = [stored(g, name) for g in rng.standard_normal((count, size))]
        before, weights = rng.standard_normal(size).astype(name), rng.uniform(1, 9, count).tolist()
        for threads, first, factors in ((1, 0, None), (3, 0, weights), (2, min(count - 1, 2), None)):
            reducer, mean = Reducer(threads), np.empty(size, name)
            reducer.fold(mean, gradients, DTYPES[name], start=True, weights=factors, divisor=3.0)
            expected = torch.from_numpy(before.copy()).to(kind).add_(torch.from_numpy(mean), alpha=-0.3)
            summed = np.empty(size, name) if first else None
            if first:
                reducer.fold(summed, gradients[:first], DTYPES[name], start=True)
            got = before.copy()
            reducer.fused_sgd_step(
                got, gradients[first:], DTYPES[name],
                accumulator=summed, weights=factors, divisor=3.0, rate=0.3,
            )  # fmt: skip
            assert same(got, expected.numpy()), (size, threads, first)
            reducer.close()


def test_what_cannot_descend_is_refused():
    ones, half = np.ones(4, np.float32), np.ones(4, np.uint16)
    with pytest.raises(TypeError, match="dtype must be one of float64, float32, not bfloat16"):
        Reducer().fused_sgd_step(half, [half], DTYPES["bfloat16"], rate=0.1)
    with pytest.raises(ValueError, match="must not be empty"):
        Reducer().fused_sgd_step(ones, [], DTYPES["float32"], rate=0.1)
    with pytest.raises(ValueError, match="4 elements, not 3"):
        Reducer().fused_sgd_step(ones, [ones[:3]], DTYPES["float32"], rate=0.1)


# -- norms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_norms_are_exact_enough_and_the_same_on_any_number_of_threads(name, rng, threaded):
    dtype = DTYPES[name]
    gradients = gradients_of(rng, name, 6, MANY)
    accumulator = np.empty(MANY, dtype.accumulator)
    results = []
    for threads in (1, 2, 3):
        with Reducer(threads) as reducer:
            results += [
                reducer.fold(accumulator, gradients, dtype, start=True, divisor=6.0, norms=True) for _ in range(3)
            ]
    assert len(set(results)) == 1
    assert same(accumulator, reference(None, gradients, name, None, 6.0))
    assert results[0].sum_squares == pytest.approx(math.fsum(accumulator.astype(float) ** 2), rel=1e-13)
    exact = [math.fsum(widened(g, name).astype(float) ** 2) for g in gradients]
    assert results[0].gradient_squares == pytest.approx(exact, rel=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradients_norm_depends_on_that_gradient_alone(name, rng):
    dtype = DTYPES[name]
    gradients = gradients_of(rng, name, 5, 2 * BLOCK + 77)
    accumulator = np.empty(gradients[0].size, dtype.accumulator)
    weights = [2.0, 3.0, 4.0, 5.0, 6.0]
    together = Reducer().fold(accumulator, gradients, dtype, start=True, weights=weights, norms=True)
    for offset, gradient, squares in zip(range(5), gradients, together.gradient_squares, strict=True):
        alone = [placed(gradient, offset)]
        result = Reducer().fold(accumulator, alone, dtype, start=False, norms=True)
        assert result.gradient_squares == (squares,)


def test_norms_are_added_block_by_block(rng):
    gradient = gradients_of(rng, "float64", 1, 2 * BLOCK + 77)[0]
    total = 0.0
    for begin in range(0, gradient.size, BLOCK):
        block = gradient[begin : begin + BLOCK] ** 2
        lanes = block[: block.size // 8 * 8].reshape(-1, 8)
        sums = lanes[0].copy()
        for row in lanes[1:]:
            sums += row
        partial = sums[0]
        for value in [*sums[1:], *block[lanes.size :]]:
            partial += value
        total += partial
    accumulator = np.empty_like(gradient)
    result = Reducer().fold(accumulator, [gradient], DTYPES["float64"], start=True, norms=True)
    assert result.gradient_squares == (total,) and result.sum_squares == total


def test_norms_are_computed_only_when_asked_for(rng):
    gradients = gradients_of(rng, "float32", 2, 100)
    accumulator = np.empty(100, np.float32)
    result = Reducer().fold(accumulator, gradients, DTYPES["float32"], start=True)
    assert result.sum_squares == 0.0 and result.gradient_squares == ()


# -- copies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_packing_keeps_every_bit(name, rng, stores):
    dtype = DTYPES[name]
    for size in [*range(70), BLOCK + 5]:
        source = rng.integers(0, 256, size * dtype.itemsize, np.uint8).view(dtype.storage)
        for offset in (0, 1, 5):
            memory = placed(np.zeros(size + 64, dtype.storage), 0)
            target = memory[offset : offset + size]
            source = placed(source, offset + 1)
            values = np.abs(widened(source, name))
            largest = float(values.max(initial=0.0)) if np.isfinite(values).all() else np.inf
            assert pack(source, target, dtype) == peak(source, dtype) == largest
            assert target.tobytes() == source.tobytes(), (size, offset)
            assert not memory[:offset].any() and not memory[offset + size :].any()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bytes_are_copied_wherever_they_are(threads, rng, threaded, stores):
    with Reducer(threads) as reducer:
        for size in [*range(0, 140, 3), 3 * fold.COPY_CHUNK_BYTES + 11]:
            source = placed(rng.integers(0, 256, size, np.uint8), 7)
            memory = np.zeros(size + 64, np.uint8)
            reducer.copy(source, memory[13 : 13 + size])
            assert memory[13 : 13 + size].tobytes() == source.tobytes()
            assert not memory[:13].any() and not memory[13 + size :].any()


def test_a_copy_takes_arrays_of_any_kind():
    source = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    target = np.zeros(12, np.float32)
    Reducer().copy(source, target)
    assert target.tobytes() == source.tobytes()


# -- what is refused -------------------------------------------------------------------------------


def frozen(size):
    array = np.zeros(size, np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("accumulator", "gradients", "message"),
    [
        (np.zeros(4), [np.zeros(4, np.float32)], "dtype float32, not float64"),
        (np.zeros(4, np.float32), [np.zeros(4)], "dtype float32, not float64"),
        (np.zeros(4, np.float32), [np.zeros(5, np.float32)], "must have 4 elements, not 5"),
        (np.zeros(4, np.float32), [np.zeros(8, np.float32)[::2]], "contiguous"),
        (np.zeros((2, 2), np.float32), [np.zeros((2, 2), np.float32)], "flat"),
        (frozen(4), [np.zeros(4, np.float32)], "writeable"),
        (np.zeros(17, np.uint8)[1:].view(np.float32), [np.zeros(4, np.float32)], "aligned"),
        (np.zeros(4, np.float32), [], "must not be empty"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(accumulator, gradients, message):
    before = accumulator.copy()
    with pytest.raises((TypeError, ValueError), match=message):
        Reducer().fold(accumulator, gradients, DTYPES["float32"], start=True)
    assert np.array_equal(accumulator, before)


def test_a_gradient_may_be_read_only_or_a_memmap(tmp_path):
    (tmp_path / "gradient").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    mapped = np.memmap(tmp_path / "gradient", np.float32, "r")
    accumulator = np.zeros(4, np.float32)
    Reducer().fold(accumulator, [mapped, frozen(4)], DTYPES["float32"], start=True)
    assert accumulator.tolist() == [0, 1, 2, 3]


def test_weights_must_be_as_many_as_gradients():
    accumulator, gradient = np.zeros(4, np.float32), np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="weights must be as many as gradients: 1, not 2"):
        Reducer().fold(accumulator, [gradient], DTYPES["float32"], start=True, weights=[1, 2])


def test_targets_of_a_copy_must_fit():
    with pytest.raises(ValueError, match="4 elements, not 5"):
        pack(np.zeros(5, np.float32), np.zeros(4, np.float32), DTYPES["float32"])
    with pytest.raises(ValueError, match="12 elements, not 16"):
        Reducer().copy(np.zeros(4, np.float32), np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="contiguous"):
        Reducer().copy(np.zeros(4), np.zeros(8)[::2])
    with pytest.raises(ValueError, match="writeable"):
        pack(frozen(4), frozen(4), DTYPES["float32"])


def test_there_must_be_a_thread():
    with pytest.raises(ValueError, match="threads must be at least 1, not 0"):
        Reducer(0)
