"""The arrays that `PartialReduce` is handed: what speaks DLPack and fits is taken, all else is refused in words."""

import time

import ml_dtypes
import numpy as np
import pytest
import torch

from mpisync import Async, BackupWorkers, PartialReduce, PeerFailed
from mpisync.session.arrays import ArrayForm

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(params=["shared", "messages"])
def transport(request, monkeypatch):
    monkeypatch.setenv("MPISYNC_TRANSPORT", request.param)


class Foreign:
    """An array of another library's, which speaks DLPack and nothing else; maybe on another device."""

    def __init__(self, tensor, device=(1, 0)):
        self.tensor, self.device = tensor, device

    def __dlpack__(self, **how):
        return self.tensor.__dlpack__(**how)

    def __dlpack_device__(self):
        return self.device


def wide(array):
    """Return the values of an array or tensor of whatever kind."""
    array = getattr(array, "tensor", array)
    return array.double().numpy() if isinstance(array, torch.Tensor) else np.asarray(array).astype(np.float64)


def descend(comm, like, gradient, steps=3, target=None, publish=lambda theta: theta, push=None):
    """Subtract the mean of equal gradients in every step, and return what all ranks have at the end."""
    with PartialReduce(comm, like=like, policy=BackupWorkers(0)) as reduction:
        if reduction.is_root:
            for step in reduction.serve(steps):
                theta = wide(reduction.parameters) - wide(step.mean)
                step.publish(publish(theta))
        else:
            pulled = like if target is None else target
            while reduction.pull(pulled):
                push(reduction) if push is not None else reduction.push(gradient)
            np.testing.assert_array_equal(wide(pulled), wide(reduction.parameters))
    return reduction.parameters


VALUES = np.arange(6.0).reshape(2, 3) + 1


def expected(steps=3):
    return -steps * VALUES


# -- what is taken ---------------------------------------------------------------------------------


@pytest.mark.parallel(3)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tensors_are_taken_for_all_arrays_and_given(comm, transport, dtype):
    make = lambda values: torch.tensor(values, dtype=dtype)  # noqa: E731
    final = descend(comm, make(np.zeros((2, 3))), make(VALUES), publish=make)
    assert isinstance(final, torch.Tensor) and final.dtype is dtype
    np.testing.assert_array_equal(wide(final), expected())


@pytest.mark.parallel(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_arrays_of_another_library_are_taken(comm, transport, dtype):
    make = lambda values: Foreign(torch.tensor(values, dtype=dtype))  # noqa: E731
    target = torch.zeros(2, 3, dtype=dtype)
    final = descend(comm, make(np.zeros((2, 3))), make(VALUES), publish=make, target=Foreign(target))
    np.testing.assert_array_equal(wide(final), expected())
    assert isinstance(final, torch.Tensor) == (dtype is torch.bfloat16), "which NumPy has not"


@pytest.mark.parametrize("kind", [torch.Tensor, np.ndarray])
@pytest.mark.parallel(3)
def test_bfloat16_may_come_from_both(comm, transport, kind):
    array, tensor = VALUES.astype(BFLOAT16), torch.tensor(VALUES, dtype=torch.bfloat16)
    like, other = (tensor, array) if kind is torch.Tensor else (array, tensor)
    final = descend(comm, like * 0, other, publish=lambda theta: torch.tensor(theta, dtype=torch.bfloat16))
    assert isinstance(final, kind) and final.dtype == like.dtype
    np.testing.assert_array_equal(wide(final), expected())


def unaligned(values):
    array = np.frombuffer(bytearray(values.nbytes + 1), np.uint8)[1:].view(values.dtype).reshape(values.shape)
    array[...] = values
    return array


def read_only(values):
    values = values.copy()
    values.flags.writeable = False
    return values


ORDERS = {
    "Fortran": np.asfortranarray,
    "strided": lambda values: np.repeat(values, 2, axis=1)[:, ::2],
    "reversed": lambda values: values[::-1, ::-1].copy()[::-1, ::-1],
    "read-only": read_only,
    "unaligned": unaligned,
    "matrix": lambda values: np.matrix(values),
    "transposed tensor": lambda values: torch.tensor(values.T.copy()).T,
}


@pytest.mark.parallel(3)
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_arrays_in_any_order_are_taken(comm, transport, order):
    target = np.zeros((2, 3)) if order in (read_only,) else order(np.zeros((2, 3)))
    final = descend(comm, np.zeros((2, 3)), order(VALUES), publish=order, target=target)
    np.testing.assert_array_equal(wide(final), expected())


@pytest.mark.parallel(3)
def test_arrays_of_no_dimension_are_taken(comm, transport):
    final = descend(comm, np.array(0.0), np.float64(2.0), publish=lambda theta: np.float64(theta), target=np.array(9.0))
    assert final.shape == () and final == -6.0


@pytest.mark.parallel(3)
@pytest.mark.parametrize("like", [np.zeros((2, 3)), torch.zeros(2, 3)], ids=["array", "tensor"])
def test_the_memory_that_is_shared_saves_the_copies(comm, transport, like):
    def fill(reduction):
        reduction.gradient[...] = VALUES if isinstance(like, np.ndarray) else torch.tensor(VALUES)
        verdict = reduction.push()
        assert verdict.accepted

    with PartialReduce(comm, like=like, policy=BackupWorkers(0)) as reduction:
        if reduction.is_root:
            for step in reduction.serve(3):
                reduction.parameters -= step.mean
                step.publish(reduction.parameters)
        else:
            while reduction.pull(reduction.parameters):
                fill(reduction)
    np.testing.assert_array_equal(wide(reduction.parameters), expected())


@pytest.mark.parallel(3)
def test_a_square_transposed_in_place_is_published_transposed(comm, transport):
    with PartialReduce(comm, like=np.zeros((2, 2)), policy=BackupWorkers(0)) as reduction:
        if reduction.is_root:
            for step in reduction.serve(1):
                reduction.parameters[...] = step.mean
                step.publish(reduction.parameters.T)  # begins where the shared memory does
        else:
            while reduction.pull(theta := np.zeros((2, 2))):
                reduction.push(np.array([[1.0, 2.0], [3.0, 4.0]]))
            assert (theta == [[1.0, 3.0], [2.0, 4.0]]).all()


@pytest.mark.parallel(3)
def test_parameters_that_are_pulled_into_are_of_that_version_where_old_ones_may_be_read(comm, transport):
    """Each version is a number."""
    with PartialReduce(comm, like=np.zeros(4), policy=Async(1)) as reduction:
        if reduction.is_root:
            for step in reduction.serve(30):
                step.publish(np.full(4, step.step + 1.0))
        else:
            theta = reduction.parameters
            while reduction.pull(theta):
                assert (theta == reduction._worker.version).all()
                reduction.push(np.ones(4))
            assert (theta == 30).all(), "also for whoever keeps the array"
    assert (reduction.parameters == 30).all()


# -- what is refused -------------------------------------------------------------------------------


def expanded(count):
    return torch.zeros(1).expand(count)


NO_ARRAYS = {
    "another size": (lambda: np.zeros(1, np.float32), ValueError, r"must be \[4\] float32 as `like`.* \[1\] float32"),
    "another shape": (lambda: np.zeros((2, 2), np.float32), ValueError, r"this is \[2, 2\] float32: reshape"),
    "another dtype": (lambda: np.zeros(4), ValueError, r"this is \[4\] float64: .*convert"),
    "a tensor of another dtype": (lambda: torch.zeros(4, dtype=torch.bfloat16), ValueError, r"\[4\] bfloat16"),
    "integers": (lambda: np.zeros(4, int), ValueError, r"this is \[4\] int64"),
    "big-endian": (lambda: np.zeros(4, ">f4"), ValueError, r"this is \[4\] >f4"),
    "a list": (lambda: [1.0, 2.0, 3.0, 4.0], TypeError, "must be a NumPy array, .* not a list; numpy.asarray"),
    "a list of arrays": (lambda: [np.zeros(2), np.zeros(2)], TypeError, "not a list"),
    "a number": (lambda: 1.0, TypeError, "not a float"),
    "masked": (lambda: np.ma.array(np.zeros(4, np.float32), mask=[0, 1, 0, 0]), TypeError, r"array.filled\(0\)"),
    "requires grad": (lambda: torch.zeros(4, requires_grad=True), ValueError, r"give tensor.detach\(\)"),
    "sparse": (lambda: torch.zeros(4).to_sparse(), TypeError, r"tensor.to_dense\(\)"),
    "meta": (lambda: torch.zeros(4, device="meta"), ValueError, r"is on meta: .* tensor.cpu\(\)"),
    "a GPU": (lambda: Foreign(torch.zeros(4), (2, 1)), ValueError, r"is on a CUDA device: .* CuPy: array.get\(\)"),
    "an unknown device": (lambda: Foreign(torch.zeros(4), (99, 0)), ValueError, "device of DLPack's kind 99"),
    "negated": (lambda: torch.zeros(4)._neg_view(), ValueError, r"resolve_neg\(\)"),
    "refused by its library": (lambda: Foreign(torch.zeros(4, requires_grad=True)), TypeError, "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "kind", "says"), NO_ARRAYS.values(), ids=NO_ARRAYS)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_what_is_no_such_array_is_refused_with_what_to_do(make, kind, says):
    form = ArrayForm(np.zeros(4, np.float32))
    for take in (form.taken, form.target):
        with pytest.raises(kind, match=f"^the gradient .*{says}"):
            take(make(), "the gradient")


@pytest.mark.parametrize(
    "make", [lambda: read_only(np.zeros(4, np.float32)), lambda: expanded(4)], ids=["read-only", "expanded"]
)
def test_what_cannot_be_written_is_no_target(make):
    form = ArrayForm(np.zeros(4, np.float32))
    assert (form.taken(make(), "it") == 0).all()
    with pytest.raises(ValueError, match="it must be writable, but this .* pull into"):
        form.target(make(), "it")
    with pytest.raises(ValueError, match="it must be writable"):
        ArrayForm(np.float32(0)).target(np.float32(0), "it")


def test_what_fits_is_neither_copied_to_be_read_nor_to_be_written():
    for dtype in (torch.float32, torch.bfloat16):
        tensor = torch.zeros(4, dtype=dtype)
        form = ArrayForm(tensor)
        for thing in (tensor, Foreign(tensor)):
            assert form.taken(thing, "it").ctypes.data == form.target(thing, "it").ctypes.data == tensor.data_ptr()
    array = np.zeros((2, 3))
    assert ArrayForm(array).taken(array, "it").ctypes.data == array.ctypes.data


@pytest.mark.parallel(3)
@pytest.mark.parametrize("rank", [0, 2], ids=["worker", "root"])
def test_a_like_that_one_rank_cannot_use_is_refused_on_all(comm, rank):
    for like, says in (
        ([0.0, 0.0], "like must be a NumPy array, a CPU tensor"),
        (np.zeros(2, int), "dtype must be one of float64, .* not int64"),
        (np.zeros(2, ">f8"), "dtype must be one of float64, .* not >f8"),
        (np.zeros((0, 3)), r"like must have elements, but its shape is \[0, 3\]"),
        (Foreign(torch.zeros(2), (10, 0)), "like is on a ROCm device: .* or give every array, `like` too, on one CUDA"),
    ):
        with pytest.raises(ValueError, match=f"rank {rank}: {says}"):
            PartialReduce(comm, like=like if comm.rank == rank else np.zeros(2))
    with pytest.raises(ValueError, match=f"rank {rank}: policy must be one of mpisync's"):
        PartialReduce(comm, like=np.zeros(2), policy="backup:1" if comm.rank == rank else None)


def fails(comm, where, kind, says, *, worker=None, root=None):
    """One rank errs in the second step; it says what is wrong, and the others end soon."""
    theta, began_s = np.zeros(4, np.float32), time.monotonic()
    with pytest.raises((kind, PeerFailed)) as caught:
        with PartialReduce(comm, like=theta, policy=BackupWorkers(0)) as reduction:
            if reduction.is_root:
                for step in reduction.serve(5):
                    root(step) if root is not None and step.step == 1 else step.publish(theta)
            else:
                errs = worker is not None and comm.rank == where
                while reduction.pull(theta):
                    worker(reduction) if errs else reduction.push(np.ones(4, np.float32))
    assert time.monotonic() - began_s < 10.0
    assert (caught.type is PeerFailed) == (comm.rank != where)
    texts = comm.allgather(str(caught.value))
    assert all(says in text for text in texts), texts


GOOD = np.ones(4, np.float32)
PUBLISHED = {
    "a shape that broadcasts": (lambda step: step.publish(GOOD[:1]), ValueError, "but this is [1] float32"),
    "a wider dtype": (lambda step: step.publish(np.zeros(4)), ValueError, "but this is [4] float64"),
    "nothing": (lambda step: step.publish(None), TypeError, "not None"),
    "twice": (lambda step: [step.publish(GOOD) for _ in range(2)], RuntimeError, "published already"),
}  # fmt: skip


@pytest.mark.parallel(3)
@pytest.mark.parametrize(("root", "kind", "says"), PUBLISHED.values(), ids=PUBLISHED)
def test_what_cannot_be_published_ends_all_ranks_with_the_same_words(comm, transport, root, kind, says):
    fails(comm, 2, kind, says, root=root)


PUSHED = {
    "another dtype": (lambda r: r.push(np.ones(4)), ValueError, "but this is [4] float64"),
    "a list": (lambda r: r.push([1.0] * 4), TypeError, "must be a NumPy array"),
    "no samples": (lambda r: r.push(GOOD, samples=0), ValueError, "samples must be at least 1"),
    "less than none": (lambda r: r.push(GOOD, samples=-3), ValueError, "and below 2**63, not -3"),
    "too many": (lambda r: r.push(GOOD, samples=2**63), ValueError, "samples must be at least 1 and below 2**63"),
    "a part of a sample": (lambda r: r.push(GOOD, samples=2.5), TypeError, "samples must be a whole number, not 2.5"),
    "truth": (lambda r: r.push(GOOD, samples=True), TypeError, "samples must be a whole number, not True"),
    "several losses": (lambda r: r.push(GOOD, loss=np.ones(3)), TypeError, "loss must be one number, not a ndarray"),
    "a loss in text": (lambda r: r.push(GOOD, loss="0.5"), TypeError, "loss must be one number, not '0.5'"),
    "write to what all share": (lambda r: np.copyto(r.parameters, 1), ValueError, "read-only"),
}


@pytest.mark.parallel(3)
@pytest.mark.parametrize(("worker", "kind", "says"), PUSHED.values(), ids=PUSHED)
def test_what_cannot_be_pushed_ends_all_ranks_with_the_same_words(comm, transport, worker, kind, says):
    fails(comm, 0, kind, says, worker=worker)


@pytest.mark.parallel(3)
def test_a_push_before_the_first_pull_is_refused_where_it_is_made(comm, transport):
    theta = np.zeros(4, np.float32)
    with PartialReduce(comm, like=theta, policy=BackupWorkers(0)) as reduction:
        if reduction.is_root:
            for step in reduction.serve(2):
                step.publish(theta - step.mean)
            with pytest.raises(RuntimeError, match="push is a worker's"):
                reduction.push(theta)
            with pytest.raises(RuntimeError, match="published already, or the training has ended"):
                step.publish(theta)
        else:
            with pytest.raises(RuntimeError, match="push comes before pull"):
                reduction.push(theta)
            while reduction.pull(theta):
                reduction.push(GOOD)
            with pytest.raises(RuntimeError, match="push comes too late"):
                reduction.push(GOOD)
            assert not reduction.pull(theta), "and it has the final parameters"
    assert (reduction.parameters == -1).all()
    reduction.parameters += 1  # the rank's own


@pytest.mark.parallel(3)
def test_a_loop_that_is_left_with_an_unpublished_step_is_an_error_everywhere(comm, transport):
    theta, began_s = np.zeros(4, np.float32), time.monotonic()
    with pytest.raises((RuntimeError, PeerFailed), match="step 0 was closed but not published") as caught:
        with PartialReduce(comm, like=theta, policy=BackupWorkers(0)) as reduction:
            if reduction.is_root:
                step = next(reduction.serve())
            else:
                while reduction.pull(theta):
                    reduction.push(GOOD)
    assert time.monotonic() - began_s < 10.0
    assert (caught.type is PeerFailed) == (comm.rank != 2)
    if reduction.is_root:
        with pytest.raises(RuntimeError, match="or the training has ended"):
            step.publish(theta)
    assert (reduction.parameters == 0).all()


@pytest.mark.parallel(3)
def test_losses_may_be_numbers_of_any_kind_or_not_known(comm):
    theta, records = np.zeros(4, np.float32), []
    losses = [1, 2.5, np.float32(0.5), np.array([3.0]), torch.tensor(4.0, requires_grad=True), None, float("nan")]
    with PartialReduce(comm, like=theta, policy=BackupWorkers(0)) as reduction:
        if reduction.is_root:
            records = [step.publish(theta) for step in reduction.serve(len(losses))]
        else:
            for loss in losses:
                assert reduction.pull(theta)
                reduction.push(GOOD, loss=loss, samples=np.int64(3))
    found = [[arrival.loss for arrival in record.arrivals] for record in records]
    if reduction.is_root:
        np.testing.assert_array_equal(found, [[x, x] for x in [1, 2.5, 0.5, 3, 4, None, None]])
        assert {record.samples_used for record in records} == {6}
