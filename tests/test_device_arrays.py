"""`PartialReduce` with arrays on a device, on a stand-in for it: it does with them what it does with the host's."""

import functools
import time

import numpy as np
import pytest
import torch
from stand_in import CUDA, StandIn, StandInArray, StandInTensor, tensor

import mpisync
from mpisync import BackupWorkers, PartialReduce, PeerFailed
from mpisync.device.host import HostMemory
from mpisync.session import device_arrays
from mpisync.session.arrays import ArrayForm
from mpisync.session.device_arrays import DeviceArrayForm, form_of

SHAPE, STEPS, RANKS = (5, 3), 3, 3
BOTH = pytest.mark.parametrize("transport", ["shared", "messages"])
ROOTS = pytest.mark.parametrize("root_device", ["auto", "cpu"])


@pytest.fixture
def device(monkeypatch):
    """Have every card be a stand-in, one in each process; return it."""
    memory = StandIn(CUDA)
    monkeypatch.setattr(device_arrays, "card", lambda number: memory)
    monkeypatch.setattr(device_arrays, "_tensor", tensor)
    return memory


@pytest.fixture(autouse=True)
def settings(request, monkeypatch):
    for name, setting in (("transport", "MPISYNC_TRANSPORT"), ("root_device", "MPISYNC_DEVICE")):
        if name in request.fixturenames:
            monkeypatch.setenv(setting, request.getfixturevalue(name))


class Foreign:
    """An array of another library's, which speaks DLPack and nothing else."""

    def __init__(self, plain, at=CUDA):
        self.tensor, self.at = plain, at

    def __dlpack__(self, **how):
        return self.tensor.__dlpack__(**how)

    def __dlpack_device__(self):
        return self.at


def on_host(values, dtype=torch.float64):
    return torch.tensor(np.asarray(values)).to(dtype)


def array(values, dtype=torch.float64):
    return StandInArray(on_host(values, dtype).numpy(), CUDA)


def a_tensor(values, dtype=torch.float64):
    return on_host(values, dtype).as_subclass(StandInTensor)


def foreign(values, dtype=torch.float64):
    return Foreign(on_host(values, dtype))


def wide(thing):
    """Return the values of an array of whatever kind, on the host."""
    if isinstance(thing, StandInArray):
        return thing._array.astype(np.float64)
    plain = getattr(thing, "tensor", thing)
    is_tensor = isinstance(plain, torch.Tensor)
    return np.array(plain.as_subclass(torch.Tensor).double().numpy() if is_tensor else plain, np.float64)


def descend(comm, make, *, target=None, look=lambda thing: None, policy=BackupWorkers(0)):  # noqa: B008 (frozen)
    """Update parameters by means of random gradients; return what was seen on the way, and the parameters."""
    random, seen = np.random.default_rng(comm.rank), []
    with PartialReduce(comm, like=make(np.zeros(SHAPE)), parameters=make(np.ones(SHAPE)), policy=policy) as reduction:
        if reduction.is_root:
            for step in reduction.serve(STEPS):
                look(step.mean)
                seen.append(wide(step.mean))
                step.publish(make(wide(reduction.parameters) - 0.1 * wide(step.mean)))
        else:
            pulled = make(np.zeros(SHAPE)) if target is None else target
            while reduction.pull(pulled):
                look(pulled)
                seen.append(wide(pulled))
                assert reduction.push(make(random.standard_normal(SHAPE))).accepted
                look(reduction.gradient)
            seen.append(wide(pulled))
    look(reduction.parameters)
    return [*seen, wide(reduction.parameters)]


def same_bits(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


# -- what works ------------------------------------------------------------------------------------

KINDS = {
    "float64 arrays": (array, torch.float64, StandInArray),
    "float32 arrays": (array, torch.float32, StandInArray),
    "float16 arrays": (array, torch.float16, StandInArray),
    "float32 tensors": (a_tensor, torch.float32, StandInTensor),
    "float16 tensors": (a_tensor, torch.float16, StandInTensor),
    "bfloat16 tensors": (a_tensor, torch.bfloat16, StandInTensor),
    "foreign float32": (foreign, torch.float32, StandInArray),
    "foreign bfloat16": (foreign, torch.bfloat16, StandInTensor),
}


@BOTH
@ROOTS
@pytest.mark.parametrize(("make", "dtype", "given"), KINDS.values(), ids=KINDS)
@pytest.mark.parallel(RANKS)
def test_the_hosts_bits_come_out(comm, device, transport, root_device, make, dtype, given):
    def look(thing):
        assert not device.is_busy, "what is given back is done"
        assert thing.__dlpack_device__() == CUDA and tuple(getattr(thing, "tensor", thing).shape) == SHAPE
        assert isinstance(thing, given | Foreign)

    found = descend(comm, functools.partial(make, dtype=dtype), look=look)
    counts = dict(device.counts)
    same_bits(found, descend(comm, functools.partial(on_host, dtype=dtype)))
    if comm.rank == RANKS - 1:
        assert (counts.get("fold", 0) >= STEPS) == (transport == "shared" and root_device == "auto")
    else:
        assert counts.get("pack", 0) >= STEPS, "else it proves nothing"
    assert device.counts["open"] == 0


@BOTH
@ROOTS
@pytest.mark.parallel(RANKS)
@pytest.mark.parametrize("make", [array, a_tensor], ids=["arrays", "tensors"])
def test_what_is_given_saves_the_copies(comm, device, transport, root_device, make):
    """The gradient and the parameters of the reduction itself; whoever keeps the latter has the final ones, too."""
    with PartialReduce(comm, like=make(np.zeros(SHAPE)), policy=BackupWorkers(0)) as reduction:
        theta = reduction.parameters
        if reduction.is_root:
            for step in reduction.serve(STEPS):
                device.copy(array(wide(theta) - wide(step.mean)), array_of(theta))
                assert step.publish(theta).updated
        else:
            gradient, pulled = reduction.gradient, []
            while reduction.pull(theta):
                pulled.append(wide(theta))
                device.copy(array(np.full(SHAPE, comm.rank + 1.0)), array_of(gradient))
                assert (reduction.push() if len(pulled) % 2 else reduction.push(gradient)).accepted
            same_bits(pulled, [np.full(SHAPE, -1.5 * step) for step in range(STEPS)])
    np.testing.assert_array_equal(wide(reduction.parameters), np.full(SHAPE, -1.5 * STEPS))
    np.testing.assert_array_equal(wide(theta), np.full(SHAPE, -1.5 * STEPS))


def array_of(thing):
    return thing if isinstance(thing, StandInArray) else StandInArray(thing.as_subclass(torch.Tensor).numpy(), CUDA)


@ROOTS
@pytest.mark.parallel(RANKS)
def test_a_gradient_goes_straight_to_the_root_and_a_version_back(comm, device, root_device):
    size_bytes = 8 * 100_000
    with PartialReduce(comm, like=array(np.zeros(100_000)), policy=BackupWorkers(0)) as reduction:
        if reduction.is_root:
            for step in reduction.serve(10):
                step.publish(reduction.parameters)
        else:
            theta, gradient = array(np.zeros(100_000)), array(np.ones(100_000))
            reduction.pull(theta)
            device.counts.clear()
            reduction.push(gradient)
            moved = dict(device.counts)
            if root_device == "auto":
                assert moved["written"] < 1.1 * size_bytes and moved["read"] < 1.1 * size_bytes, moved
            else:  # no kernel writes to the host's memory
                assert moved["written"] < 0.1 * size_bytes <= size_bytes <= moved["out"] < 1.1 * size_bytes, moved
            device.counts.clear()
            reduction.pull(theta)
            assert device.counts["written"] == size_bytes, device.counts
            while reduction.pull(theta):
                reduction.push(gradient)
        if root_device == "auto":
            assert device.counts["in"] + device.counts["out"] < 0.5 * size_bytes, "10 gradients, and none by the host"


ORDERS = {
    "transposed": lambda values: torch.tensor(np.asarray(values).T.copy()).as_subclass(StandInTensor).T,
    "strided": lambda values: torch.tensor(np.repeat(values, 2, axis=1)).as_subclass(StandInTensor)[:, ::2],
    "an array, strided": lambda values: StandInArray(np.repeat(np.asarray(values), 2, axis=1)[:, ::2], CUDA),
}


@BOTH
@ROOTS
@pytest.mark.parallel(RANKS)
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_arrays_in_any_order_are_taken(comm, device, transport, root_device, order):
    same_bits(descend(comm, order), descend(comm, on_host))


@pytest.mark.parallel(RANKS)
@pytest.mark.parametrize("policy", ["backup:1", "async:k=1"])
def test_policies_by_which_gradients_are_late_or_old(comm, device, policy):
    """Each version is a number, and is pulled whole."""
    with PartialReduce(comm, like=array(np.zeros(SHAPE)), policy=mpisync.policies.parse_policy(policy)) as reduction:
        if reduction.is_root:
            for step in reduction.serve(30):
                step.publish(array(np.full(SHAPE, step.step + 1.0)))
        else:
            theta, turn = array(np.zeros(SHAPE)), 0
            while reduction.pull(pulled := (theta, reduction.parameters)[turn % 2]):
                turn += 1
                assert (wide(pulled) == reduction._worker.version).all()
                reduction.push(array(np.ones(SHAPE)))
    assert (wide(reduction.parameters) == 30.0).all()


@BOTH
@pytest.mark.parametrize("hosts", [{0}, {2}, {0, 1}], ids=["a worker", "the root", "all workers"])
@pytest.mark.parallel(RANKS)
def test_some_ranks_may_have_their_arrays_on_the_host(comm, device, transport, hosts):
    found = descend(comm, on_host if comm.rank in hosts else array)
    same_bits(found, descend(comm, on_host))
    assert device.counts["fold"] == 0


@pytest.mark.parametrize("who", [0, 2], ids=["a worker", "the root"])
@pytest.mark.parallel(RANKS)
def test_where_a_device_cannot_be_reached_gradients_come_to_the_host(comm, monkeypatch, device, capfd, who):
    def refuse(*_, **__):
        raise OSError(12, f"rank {who} has no more arrays")

    if comm.rank == who:
        monkeypatch.setattr(device, "attach" if who != 2 else "share", refuse)
    same_bits(descend(comm, array), descend(comm, on_host))
    if comm.rank == 2:
        assert f"not all workers reach stand-in:0, which is the root's (rank {who} has no mo" in capfd.readouterr().err
        assert device.counts["fold"] == 0


@pytest.mark.parallel(RANKS)
def test_a_device_without_room_leaves_the_reduction_to_the_host(comm, monkeypatch, device, capfd):
    # two gradients, their sum, a version for workers and one of the root's: 128 bytes each, a little less for the sum
    monkeypatch.setattr(device, "free_bytes", lambda: 500.0)
    same_bits(descend(comm, array), descend(comm, on_host))
    if comm.rank == 2:
        assert "stand-in:0 has 0 MB free, so the root reduces in the host's memory" in capfd.readouterr().err
        assert device.counts["fold"] == 0


# -- what is refused -------------------------------------------------------------------------------

THERE = r"but `like` is on stand-in:0: give an array that is there.*tensor.to.*cupy.asarray.*jax.device_put"
REFUSED = {
    "a host array": (lambda: np.zeros(4, np.float32), ValueError, f"is in host memory, {THERE}"),
    "a host tensor": (lambda: torch.zeros(4), ValueError, f"is in host memory, {THERE}"),
    "another card's": (lambda: Foreign(torch.zeros(4), (2, 1)), ValueError, f"is on cuda:1, {THERE}"),
    "another kind of device": (lambda: Foreign(torch.zeros(4), (10, 0)), ValueError, "is on a ROCm device, but"),
    "no memory": (lambda: torch.zeros(4, device="meta"), ValueError, "is on meta, but"),
    "another shape": (lambda: array(np.zeros((2, 2)), torch.float32), ValueError, r"\[4\] float32 .* \[2, 2\] float32"),
    "another dtype": (lambda: array(np.zeros(4)), ValueError, r"this is \[4\] float64: .*convert"),
    "bfloat16": (lambda: a_tensor(np.zeros(4), torch.bfloat16), ValueError, r"this is \[4\] bfloat16"),
    "a list": (lambda: [0.0] * 4, TypeError, "must be a CuPy array, a CUDA tensor or another .* not a list"),
    "nothing": (lambda: None, TypeError, "not None"),
    "requires grad": (
        lambda: a_tensor(np.zeros(4), torch.float32).requires_grad_(), ValueError, r"give tensor.detach\(\)"
    ),
    "refused by its library": (lambda: Foreign(torch.zeros(4, requires_grad=True)), TypeError, "cannot be read by"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "kind", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_such_array_is_refused_with_what_to_do(device, make, kind, says):
    form = form_of(array(np.zeros(4), torch.float32))
    assert isinstance(form, DeviceArrayForm)
    for take in (form.taken, form.target):
        with pytest.raises(kind, match=f"^the gradient .*{says}"):
            take(make(), "the gradient")


class Immutable(Foreign):
    """As JAX's are."""


Immutable.__module__ = "jaxlib._jax"


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Immutable(torch.zeros(4)), "Immutable is read-only"),
        (lambda: torch.zeros(1).as_subclass(StandInTensor).expand(4), "is expanded"),
    ],
    ids=["immutable", "expanded"],
)
def test_what_cannot_be_written_is_no_target(device, make, why):
    form = form_of(array(np.zeros(4), torch.float32))
    assert (wide(form.taken(make(), "it")) == 0).all()
    with pytest.raises(ValueError, match=f"it must be writable, but this .*{why}.*: pull into"):
        form.target(make(), "it")


def test_what_is_on_a_device_is_not_taken_for_the_hosts(device):
    form = form_of(np.zeros(4, np.float32))
    assert isinstance(form, ArrayForm)
    with pytest.raises(ValueError, match="it is on a CUDA device: arrays must be where `like` is, in host memory"):
        form.taken(array(np.zeros(4), torch.float32), "it")


def test_what_fits_is_neither_copied_to_be_read_nor_to_be_written(device):
    for dtype in (torch.float32, torch.bfloat16):
        plain = on_host(np.zeros(4), dtype)
        for thing in (plain.as_subclass(StandInTensor), Foreign(plain)):
            form = form_of(thing)
            assert device.address(form.taken(thing, "it")) == plain.data_ptr()
            assert form.target(thing, "it").data_ptr() == plain.data_ptr()


def test_arrays_of_no_dimension_are_taken(device):
    for thing in (a_tensor(2.0, torch.bfloat16), array(2.0)):
        form = form_of(thing)
        assert wide(form.given(form.taken(thing, "it"))) == 2.0 and form.shape == ()


def test_memory_imports_what_other_libraries_have_there(device):
    plain = torch.arange(4.0)
    assert HostMemory().imported(plain).ctypes.data == device.address(device.imported(plain)) == plain.data_ptr()


def fails(comm, where, kind, says, *, worker=None, root=None):
    """One rank errs in the second step; it says what is wrong, and the others end soon."""
    theta, began_s = array(np.zeros(4), torch.float32), time.monotonic()
    with pytest.raises((kind, PeerFailed)) as caught:
        with PartialReduce(comm, like=theta, policy=BackupWorkers(0)) as reduction:
            if reduction.is_root:
                for step in reduction.serve(5):
                    root(step) if root is not None and step.step == 1 else step.publish(theta)
            else:
                errs = worker is not None and comm.rank == where
                while reduction.pull(theta):
                    worker(reduction) if errs else reduction.push(theta)
    assert time.monotonic() - began_s < 10.0
    assert (caught.type is PeerFailed) == (comm.rank != where)
    texts = comm.allgather(str(caught.value))
    assert all(says in text for text in texts), texts


AWAY = {
    "in host memory": lambda: np.zeros(4, np.float32),
    "on cuda:1": lambda: Foreign(torch.zeros(4), (2, 1)),
}


@BOTH
@ROOTS
@pytest.mark.parametrize(("where", "make"), AWAY.items(), ids=AWAY)
@pytest.mark.parametrize("verb", ["push", "pull", "publish"])
@pytest.mark.parallel(RANKS)
def test_what_is_elsewhere_ends_all_ranks_with_the_same_words(comm, device, transport, root_device, verb, where, make):
    says = f"is {where}, but `like` is on stand-in:0"
    if verb == "publish":
        fails(comm, 2, ValueError, says, root=lambda step: step.publish(make()))
    else:
        fails(comm, 0, ValueError, says, worker=lambda reduction: getattr(reduction, verb)(make()))


@pytest.mark.parametrize("rank", [0, 2], ids=["worker", "root"])
@pytest.mark.parallel(RANKS)
def test_what_one_rank_cannot_use_is_refused_on_all(comm, monkeypatch, device, rank):
    good = array(np.zeros(2))
    for like, says in (
        (array(np.zeros((0, 3))), r"like must have elements, but its shape is \[0, 3\]"),
        (Foreign(torch.zeros(2, dtype=int)), "dtype must be one of float64, .* not int64"),
        (Foreign(torch.zeros(2), (10, 0)), "like is on a ROCm device: arrays must be"),
    ):
        with pytest.raises(ValueError, match=f"rank {rank}: {says}"):
            PartialReduce(comm, like=like if comm.rank == rank else good)
    with pytest.raises(ValueError, match=f"rank {rank}: the parameters is in host memory, but"):
        PartialReduce(comm, like=good, parameters=np.zeros(2) if comm.rank == rank else None)

    def card(number):
        if comm.rank == rank:
            raise ValueError("CuPy is missing")
        return device

    monkeypatch.setattr(device_arrays, "card", card)
    with pytest.raises(ValueError, match=f"rank {rank}: CuPy is missing"):
        PartialReduce(comm, like=good)


@pytest.mark.parallel(RANKS)
def test_a_device_that_is_none_is_refused_on_all(comm, monkeypatch, device):
    monkeypatch.setenv("MPISYNC_DEVICE", "gpu")
    with pytest.raises(ValueError, match="rank 2: MPISYNC_DEVICE='gpu': must be auto, cpu, or a card as cuda:0"):
        PartialReduce(comm, like=array(np.zeros(2)))
