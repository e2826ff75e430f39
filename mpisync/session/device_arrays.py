"""The arrays of a `PartialReduce` that are on a CUDA device: CuPy's, torch's, JAX's, any that speaks DLPack.

They are ordered as everything on a device is: what their library has begun is done before they are read, and what is
given back is done when it is given, whatever stream the library goes on in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from mpisync.device.base import Array, Memory
from mpisync.device.placement import card
from mpisync.session.arrays import (
    CUDA,
    HOSTS,
    ArrayForm,
    Form,
    check_speaks_dlpack,
    check_target,
    check_tensor,
    name_of,
)

_IMMUTABLE = ("jax", "jaxlib")  # libraries whose arrays never change, and do not say so by DLPack


def form_of(like: Any) -> Form:
    """Return the form of arrays that are as `like` is, and where it is.

    Raises:
        TypeError: It is no array, or its dtype cannot be aggregated.
        ValueError: It has no element, or is where nothing can be reduced.
    """
    kind, number = _device(like)
    return DeviceArrayForm(like, card(number), number) if kind == CUDA else ArrayForm(like)


class DeviceArrayForm(Form):
    """The form of arrays on a CUDA device.

    Args:
        like: An array of that form.
        memory: The device's.
        number: The device's, as this process counts.

    Raises:
        TypeError: It is no dense array, or its dtype cannot be aggregated.
        ValueError: It has no element, or is elsewhere.
    """

    lends = False  # the root's memory goes at the end of a run, and users may look at their arrays for longer

    def __init__(self, like: Any, memory: Memory, number: int) -> None:
        self.memory: Memory = memory
        self._number = number
        plain = self._plain(like, "like")
        super().__init__(plain)
        self._is_tensor = plain is like or self.dtype.name == "bfloat16"  # which other libraries' arrays may not have

    def is_in(self, memory: Memory) -> bool:
        """Say whether that is this device's memory."""
        return memory is self.memory

    def allocate(self, dtype: np.dtype[Any]) -> Array:
        """Return flat memory for an array, zeroed."""
        flat = self.memory.allocate(self.size * dtype.itemsize).view(dtype)
        self.memory.finish()
        return flat

    def taken(self, thing: Any, what: str) -> Array:
        """Return the elements of an array that was handed in."""
        return self._flat(self._checked(thing, what).contiguous())

    def target(self, thing: Any, what: str) -> Any:
        """Return an array that is to be written to, as a tensor."""
        tensor = self._checked(thing, what)
        library = type(thing).__module__.partition(".")[0]
        check_target(thing, what, tensor, tensor.stride(), is_read_only=library in _IMMUTABLE)
        return tensor

    def fill(self, target: Any, read: Callable[[Array], object]) -> None:
        """Have `read` write the bytes of a target."""
        import torch

        whole = target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
        read(self._flat(whole).view(np.dtype(np.uint8)))
        if whole is not target:
            target.copy_(whole)
        self.memory.finish()

    def copy(self, source: Array, target: Array) -> None:
        """Copy flat memory, unless the two are one."""
        if self.memory.address(source) != self.memory.address(target):
            self.memory.copy(source, target)
        self.memory.finish()

    def given(self, storage: Array) -> Any:
        """Return flat memory as users see it: a tensor, or what the memory's arrays are."""
        own = storage.dtype == self.dtype.storage
        if self._is_tensor:
            import torch

            tensor = _tensor(storage)
            return (tensor.view(getattr(torch, self.dtype.name)) if own else tensor).view(self.shape)
        return (storage.view(np.dtype(self.dtype.name)) if own else storage).reshape(self.shape)

    def _flat(self, tensor: Any) -> Array:
        """Return a contiguous tensor's memory as an array of the dtype's storage."""
        import torch

        bits = tensor.view(torch.int16) if self.dtype.itemsize == 2 else tensor
        return self.memory.imported(bits.view(-1)).view(self.dtype.storage)

    def _checked(self, thing: Any, what: str) -> Any:
        tensor = self._plain(thing, what)
        self._check(tensor, what)
        return tensor

    def _plain(self, thing: Any, what: str) -> Any:
        """Return a dense tensor with the memory of `thing`, of whatever dtype."""
        check_speaks_dlpack(thing, what, "a CuPy array, a CUDA tensor")
        if _device(thing) != (CUDA, self._number):
            raise ValueError(
                f"{what} is {_where(thing)}, but `like` is on {self.memory.name}: give an array that is there, too "
                "(torch: tensor.to(like.device), CuPy: cupy.asarray(array), JAX: jax.device_put)"
            )
        torch = sys.modules.get("torch")
        tensor = thing if torch is not None and isinstance(thing, torch.Tensor) else _imported(thing, what)
        check_tensor(tensor, what)
        return tensor


def _device(thing: Any) -> tuple[int, int]:
    """Return the kind and the number of the device that an array is on, as DLPack has them; (0, 0) for none."""
    try:
        kind, number = thing.__dlpack_device__()
    except (AttributeError, TypeError, ValueError, RuntimeError, BufferError):  # a tensor without memory, a list
        return 0, 0
    return int(kind), int(number)


def _where(thing: Any) -> str:
    kind, number = _device(thing)
    if kind in HOSTS:
        return "in host memory"
    return f"on cuda:{number}" if kind == CUDA else f"on {name_of(kind) if kind else thing.device}"


def _imported(thing: Any, what: str) -> Any:
    try:
        return _tensor(thing)
    except (RuntimeError, BufferError, TypeError) as error:
        raise TypeError(f"{what} cannot be read by DLPack: {error}; give a CuPy array or a tensor of it") from error


def _tensor(array: Any) -> Any:
    """Return an array as a tensor with its memory, behind what its library has begun with it."""
    import torch
    from torch.utils.dlpack import from_dlpack

    with torch.cuda.device(_device(array)[1]):  # whose streams are meant
        return from_dlpack(array)
