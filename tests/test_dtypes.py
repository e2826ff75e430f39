"""The one table of dtypes."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from mpisync.kernels.dtypes import DTYPES, dtype_of


@pytest.mark.parametrize("name", DTYPES)
def test_a_dtype_is_known_by_its_tensor_and_its_name(name):
    tensor = torch.zeros(2, dtype=getattr(torch, name))
    entry = DTYPES[name]
    assert dtype_of(tensor) is dtype_of(tensor.dtype) is dtype_of(name) is entry
    assert entry.itemsize == entry.storage.itemsize == tensor.element_size()
    infinite = torch.full((1,), torch.inf, dtype=tensor.dtype).view(torch.uint8).numpy()
    assert infinite.view(f"u{entry.itemsize}") == entry.infinity


def test_a_dtype_is_known_by_its_array():
    assert dtype_of(np.zeros(2)) is dtype_of(np.float64) is dtype_of(float) is DTYPES["float64"]
    assert dtype_of(np.zeros(2, np.float16)).stored(np.ones(2, np.float16)).tolist() == [0x3C00] * 2


@pytest.mark.parametrize("thing", [torch.int64, np.zeros(2, np.uint16), np.dtype(">f4"), int, None])
def test_other_dtypes_are_refused_by_name(thing):
    with pytest.raises(TypeError, match="dtype must be one of float64, float32, float16, bfloat16"):
        dtype_of(thing)


def test_the_table_does_not_wait_for_numba():
    program = "import sys, mpisync.kernels.dtypes; assert 'numba' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
