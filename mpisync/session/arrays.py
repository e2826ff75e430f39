"""The arrays that users of `PartialReduce` hand in and are given: anything that speaks DLPack, without a copy."""

from __future__ import annotations

import abc
import math
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from mpisync.device.base import Array, Memory
from mpisync.kernels.dtypes import Dtype, dtype_of

HOSTS = (1, 3)  # DLPack's numbers of host memory: plain, and page-locked for CUDA
CUDA = 2
_NAMES = {
    CUDA: "a CUDA device", 4: "an OpenCL device", 7: "a Vulkan device", 8: "a Metal device", 10: "a ROCm device"
}  # fmt: skip
_TO_HOST = (
    "arrays must be where `like` is, in host memory; copy it there first (torch: tensor.cpu(), CuPy: array.get(), "
    "JAX: jax.device_get), or give every array, `like` too, on one CUDA device"
)


class Form(abc.ABC):
    """The form that all arrays of a `PartialReduce` have: `like`'s shape and dtype, in `like`'s memory.

    Inside, an array is flat, and of the dtype's `storage`: the bits, for 16-bit floats.

    Args:
        plain: `like`, as an array or a tensor.

    Attributes:
        shape: The shape.
        dtype: The dtype.
        memory: Of the device that arrays are on; None for the host's.
        lends: Whether users work in the memory that ranks share; else in memory of their own.

    Raises:
        TypeError: Its dtype cannot be aggregated.
        ValueError: It has no element.
    """

    memory: Memory | None = None
    lends: ClassVar[bool]

    def __init__(self, plain: Any) -> None:
        self.dtype: Dtype = dtype_of(plain)
        self.shape: tuple[int, ...] = tuple(plain.shape)
        if 0 in self.shape:
            raise ValueError(f"like must have elements, but its shape is {list(self.shape)}: nothing is to reduce")

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @abc.abstractmethod
    def is_in(self, memory: Memory) -> bool:
        """Say whether arrays of this form lie in `memory`."""

    @abc.abstractmethod
    def allocate(self, dtype: np.dtype[Any]) -> Array:
        """Return flat memory for an array, zeroed, with elements of `dtype`."""

    @abc.abstractmethod
    def taken(self, thing: Any, what: str) -> Array:
        """Return the elements of an array that was handed in: flat, and without a copy where it is contiguous.

        Args:
            thing: The array.
            what: What to call it.

        Raises:
            TypeError: It is no array.
            ValueError: It is of another shape or dtype, or elsewhere.
        """

    @abc.abstractmethod
    def target(self, thing: Any, what: str) -> Any:
        """Return a view, of this shape, of an array that is to be written to.

        Raises:
            TypeError: It is no array.
            ValueError: It is of another shape or dtype, or elsewhere, or cannot be written to.
        """

    def is_one(self, target: Any, flat: Array) -> bool:
        """Say whether a target is a view of flat memory that ranks share, which nobody but its owner may write to."""
        return False

    @abc.abstractmethod
    def fill(self, target: Any, read: Callable[[Array], object]) -> None:
        """Have `read` write the bytes of a target."""

    @abc.abstractmethod
    def copy(self, source: Array, target: Array) -> None:
        """Copy flat memory, unless the two are one; one of them may be another memory's than this form's."""

    @abc.abstractmethod
    def given(self, storage: Array) -> Any:
        """Return flat storage, or a mean in the accumulator's dtype, as users see it: a tensor if `like` is one."""

    def _check(self, plain: Any, what: str) -> None:
        name = str(plain.dtype).removeprefix("torch.")
        if tuple(plain.shape) != self.shape or name != self.dtype.name:
            raise ValueError(
                f"{what} must be {list(self.shape)} {self.dtype.name} as `like` is, but this is {list(plain.shape)} "
                f"{name}: reshape or convert it first"
            )


class ArrayForm(Form):
    """The form of arrays in host memory.

    Args:
        like: An array of that form.

    Raises:
        TypeError: It is no array, or its dtype cannot be aggregated.
        ValueError: It has no element, or is not in host memory.
    """

    lends = True

    def __init__(self, like: Any) -> None:
        plain = _plain(like, "like")
        super().__init__(plain)
        self._is_tensor = not isinstance(plain, np.ndarray)
        self._numpy_dtype = None if self._is_tensor else plain.dtype  # of what users are given; ml_dtypes' bfloat16 too

    def is_in(self, memory: Memory) -> bool:
        """Say whether that is the host's memory."""
        return memory.is_host

    def allocate(self, dtype: np.dtype[Any]) -> np.ndarray:
        """Return flat memory for an array, zeroed."""
        return np.zeros(self.size, dtype)

    def taken(self, thing: Any, what: str) -> np.ndarray:
        """Return the elements of an array that was handed in."""
        array = self._checked(thing, what)
        if not (array.flags.c_contiguous and array.flags.aligned):
            array = np.array(array, order="C")
        return array.reshape(-1)

    def target(self, thing: Any, what: str) -> np.ndarray:
        """Return a view of an array that is to be written to."""
        array = self._checked(thing, what)
        is_read_only = isinstance(thing, np.generic) or not array.flags.writeable
        check_target(thing, what, array, array.strides, is_read_only=is_read_only)
        return array

    def is_one(self, target: np.ndarray, flat: np.ndarray) -> bool:
        """Say whether both begin at the same place."""
        return target.ctypes.data == flat.ctypes.data

    def fill(self, target: np.ndarray, read: Callable[[np.ndarray], object]) -> None:
        """Have `read` write the bytes of a target."""
        whole = target if target.flags.c_contiguous else np.empty(target.shape, target.dtype)
        read(whole.reshape(-1).view(np.uint8))
        if whole is not target:
            np.copyto(target, whole)

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy flat memory, unless the two are one."""
        if source.ctypes.data != target.ctypes.data:
            np.copyto(target, source)

    def given(self, storage: np.ndarray) -> Any:
        """Return flat memory as users see it."""
        own = storage.dtype == self.dtype.storage
        if self._is_tensor:
            import torch

            tensor = torch.from_numpy(storage)
            return (tensor.view(getattr(torch, self.dtype.name)) if own else tensor).view(self.shape)
        return (storage.view(self._numpy_dtype) if own else storage).reshape(self.shape)

    def _checked(self, thing: Any, what: str) -> np.ndarray:
        plain = _plain(thing, what)
        self._check(plain, what)
        if not isinstance(plain, np.ndarray):
            import torch

            plain = (plain.view(torch.uint16) if self.dtype.itemsize == 2 else plain).numpy()
        return self.dtype.stored(plain)


def _plain(thing: Any, what: str) -> Any:
    """Return a NumPy array or a dense CPU tensor with the memory of `thing`, of whatever dtype."""
    if isinstance(thing, np.ndarray | np.generic):
        if isinstance(thing, np.ma.MaskedArray):
            raise TypeError(f"{what} is a masked array, and masked elements would count: give array.filled(0)")
        return np.asarray(thing)
    if (torch := sys.modules.get("torch")) is not None and isinstance(thing, torch.Tensor):
        return _plain_tensor(thing, what)
    check_speaks_dlpack(thing, what, "a NumPy array, a CPU tensor")
    device = int(thing.__dlpack_device__()[0])
    if device not in HOSTS:
        raise ValueError(f"{what} is on {name_of(device)}: {_TO_HOST}")
    return _imported(thing, what)


def _imported(thing: Any, what: str) -> Any:
    """Import an array by DLPack; as a tensor where its dtype is bfloat16, which NumPy has not."""
    try:
        return np.from_dlpack(thing)
    except (RuntimeError, BufferError, TypeError) as error:
        reason = error
    try:
        from torch.utils.dlpack import from_dlpack

        return _plain_tensor(from_dlpack(thing), what)
    except (ImportError, RuntimeError, BufferError, TypeError):
        raise TypeError(f"{what} cannot be read by DLPack: {reason}; give a NumPy array of it") from reason


def _plain_tensor(tensor: Any, what: str) -> Any:
    check_tensor(tensor, what)
    if tensor.device.type != "cpu":
        raise ValueError(f"{what} is on {tensor.device}: {_TO_HOST}")
    return tensor


def check_tensor(tensor: Any, what: str) -> None:
    """Refuse a tensor whose memory does not hold its elements, or that is part of a graph.

    Raises:
        TypeError: It is not dense.
        ValueError: It requires grad, or is a lazy view.
    """
    import torch

    if tensor.is_nested or tensor.layout is not torch.strided:
        raise TypeError(f"{what} is a sparse or nested tensor: give a dense one, such as tensor.to_dense()")
    if tensor.requires_grad:
        raise ValueError(f"{what} requires grad, and none would flow through it: give tensor.detach()")
    if tensor.is_neg() or tensor.is_conj():
        raise ValueError(f"{what} is a lazy negation or conjugate: give tensor.resolve_neg().resolve_conj()")


def check_target(thing: Any, what: str, view: Any, strides: tuple[int, ...], *, is_read_only: bool) -> None:
    """Refuse a target that cannot be written to.

    Args:
        thing: What was handed in.
        what: What to call it.
        view: Of it, an array or a tensor.
        strides: The view's.
        is_read_only: Whether it says so.

    Raises:
        ValueError: It cannot.
    """
    overlaps = any(stride == 0 and count > 1 for stride, count in zip(strides, view.shape, strict=True))
    if is_read_only or overlaps:
        why = "expanded, with elements that share memory" if overlaps else "read-only"
        raise ValueError(
            f"{what} must be writable, but this {type(thing).__name__} is {why}: pull into an array or tensor that "
            "owns its memory"
        )


def check_speaks_dlpack(thing: Any, what: str, such_as: str) -> None:
    """Refuse what is no array.

    Raises:
        TypeError: It does not speak DLPack.
    """
    if not (hasattr(thing, "__dlpack__") and hasattr(thing, "__dlpack_device__")):
        raise TypeError(
            f"{what} must be {such_as} or another array that speaks DLPack, not "
            f"{'None' if thing is None else f'a {type(thing).__name__}'}; numpy.asarray makes one of numbers"
        )


def name_of(kind: int) -> str:
    """Return what people call a device of DLPack's `kind`."""
    return _NAMES.get(kind, f"a device of DLPack's kind {kind}")
