"""The arrays that users of `PartialReduce` hand in and are given: anything that speaks DLPack, without a copy."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from mpisync.kernels.dtypes import Dtype, dtype_of

_HOSTS = (1, 3)  # DLPack's numbers of host memory: plain, and page-locked for CUDA
_DEVICES = {2: "a CUDA device", 4: "an OpenCL device", 7: "a Vulkan device", 8: "a Metal device", 10: "a ROCm device"}
_TO_HOST = (
    "arrays travel in host memory; copy it there first (torch: tensor.cpu(), CuPy: array.get(), JAX: jax.device_get)"
)


class ArrayForm:
    """The form that all arrays of a `PartialReduce` have: `like`'s shape and dtype.

    Inside, an array is what NumPy and the kernels can hold, of the dtype's `storage`: the bits, for 16-bit floats.

    Args:
        like: An array of that form.

    Attributes:
        shape: The shape.
        dtype: The dtype.

    Raises:
        TypeError: It is no array, or its dtype cannot be aggregated.
        ValueError: It has no element, or is not in host memory.
    """

    def __init__(self, like: Any) -> None:
        plain = _plain(like, "like")
        self.dtype: Dtype = dtype_of(plain)
        self.shape: tuple[int, ...] = tuple(plain.shape)
        if 0 in self.shape:
            raise ValueError(f"like must have elements, but its shape is {list(self.shape)}: nothing is to reduce")
        self._is_tensor = not isinstance(plain, np.ndarray)
        self._numpy_dtype = None if self._is_tensor else plain.dtype  # of what users are given; ml_dtypes' bfloat16 too

    def taken(self, thing: Any, what: str) -> np.ndarray:
        """Return the elements of an array that was handed in: flat, and without a copy where it is contiguous.

        Args:
            thing: The array.
            what: What to call it.

        Raises:
            TypeError: It is no array.
            ValueError: It is of another shape or dtype, or not in host memory.
        """
        array = self._checked(thing, what)
        if not (array.flags.c_contiguous and array.flags.aligned):
            array = np.array(array, order="C")
        return array.reshape(-1)

    def target(self, thing: Any, what: str) -> np.ndarray:
        """Return a view, of this shape, of an array that is to be written to.

        Raises:
            TypeError: It is no array.
            ValueError: It is of another shape or dtype, or cannot be written to.
        """
        array = self._checked(thing, what)
        steps = zip(array.strides, array.shape, strict=True)
        overlaps = any(stride == 0 and count > 1 for stride, count in steps)
        if isinstance(thing, np.generic) or not array.flags.writeable or overlaps:
            why = "expanded, with elements that share memory" if overlaps else "read-only"
            raise ValueError(
                f"{what} must be writable, but this {type(thing).__name__} is {why}: pull into an array or tensor that "
                "owns its memory"
            )
        return array

    def given(self, storage: np.ndarray) -> Any:
        """Return flat storage, or a mean in the accumulator's dtype, as users see it: a tensor if `like` is one."""
        own = storage.dtype == self.dtype.storage
        if self._is_tensor:
            import torch

            tensor = torch.from_numpy(storage)
            return (tensor.view(getattr(torch, self.dtype.name)) if own else tensor).view(self.shape)
        return (storage.view(self._numpy_dtype) if own else storage).reshape(self.shape)

    def _checked(self, thing: Any, what: str) -> np.ndarray:
        plain = _plain(thing, what)
        name = str(plain.dtype).removeprefix("torch.")
        if tuple(plain.shape) != self.shape or name != self.dtype.name:
            raise ValueError(
                f"{what} must be {list(self.shape)} {self.dtype.name} as `like` is, but this is {list(plain.shape)} "
                f"{name}: reshape or convert it first"
            )
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
    if not (hasattr(thing, "__dlpack__") and hasattr(thing, "__dlpack_device__")):
        raise TypeError(
            f"{what} must be a NumPy array, a CPU tensor or another array that speaks DLPack, not "
            f"{'None' if thing is None else f'a {type(thing).__name__}'}; numpy.asarray makes one of numbers"
        )
    device, _ = thing.__dlpack_device__()
    if int(device) not in _HOSTS:
        where = _DEVICES.get(int(device), f"a device of DLPack's kind {int(device)}")
        raise ValueError(f"{what} is on {where}: {_TO_HOST}")
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
    import torch

    if tensor.is_nested or tensor.layout is not torch.strided:
        raise TypeError(f"{what} is a sparse or nested tensor: give a dense one, such as tensor.to_dense()")
    if tensor.device.type != "cpu":
        raise ValueError(f"{what} is on {tensor.device}: {_TO_HOST}")
    if tensor.requires_grad:
        raise ValueError(f"{what} requires grad, and none would flow through it: give tensor.detach()")
    if tensor.is_neg() or tensor.is_conj():
        raise ValueError(f"{what} is a lazy negation or conjugate: give tensor.resolve_neg().resolve_conj()")
    return tensor
