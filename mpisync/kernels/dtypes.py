"""The table of the dtypes that gradients may have; every dtype rule of the package is here.

Neither NumPy nor the kernels compute in 16-bit floats, so their elements are held as uint16 and
are widened, exactly, to float32 when they are accumulated.
"""

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Dtype:
    """How elements of one dtype are stored and accumulated.

    Attributes:
        name: as torch and NumPy call it.
        itemsize: bytes of one element.
        storage: what arrays of such elements are for NumPy: uint16 for the 16-bit floats.
        accumulator: the dtype of sums and means.
        infinity: the bits of +inf; larger ones, without the sign, are NaN.
    """

    name: str
    itemsize: int
    storage: np.dtype[Any]
    accumulator: np.dtype[Any]
    infinity: int

    def magnitude(self, bits: int) -> float:
        """Return the number that a magnitude's bits mean; inf for NaN too."""
        if bits >= self.infinity:
            return math.inf
        wide = bits << 16 if self.name == "bfloat16" else bits
        code = {"float64": "d", "float16": "e"}.get(self.name, "f")
        return float(struct.unpack(f"<{code}", wide.to_bytes(struct.calcsize(code), "little"))[0])

    def stored(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return a view of an array of this dtype as its storage (ml_dtypes' bfloat16, too)."""
        return array if array.dtype is self.storage else array.view(self.storage)


_FLOAT32, _FLOAT64, _UINT16 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.uint16)

DTYPES: dict[str, Dtype] = {
    dtype.name: dtype
    for dtype in (
        Dtype("float64", 8, _FLOAT64, _FLOAT64, 0x7FF0_0000_0000_0000),
        Dtype("float32", 4, _FLOAT32, _FLOAT32, 0x7F80_0000),
        Dtype("float16", 2, _UINT16, _FLOAT32, 0x7C00),
        Dtype("bfloat16", 2, _UINT16, _FLOAT32, 0x7F80),
    )
}


def dtype_of(thing: object) -> Dtype:
    """Return the entry of an array, a tensor, a NumPy or torch dtype, or a dtype's name.

    Raises:
        TypeError: gradients of that dtype cannot be aggregated.
    """
    dtype = np.dtype(thing) if isinstance(thing, type) else getattr(thing, "dtype", thing)
    name = str(dtype).removeprefix("torch.")  # a dtype of foreign byte order is called ">f4"
    if name not in DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(DTYPES)}, not {name}; convert the gradient")
    return DTYPES[name]
