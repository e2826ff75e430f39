"""The device's kernels on the host: the very `fold.cu`, compiled as C++, its threads one after the other."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from mpisync.device import kernel

SHIM = Path(__file__).with_name("cuda_shim.h")
OPTIONS = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC", "-x", "c++"]
# What both languages say must agree; then the loops that a device would be, and two functions a kernel.
DRIVER = f"""
#include "{kernel.SOURCE}"
static_assert(LINK == {kernel.LINK} && PEAKS == {kernel.PEAKS} && NORM_BLOCK == {kernel.NORM_BLOCK});

template <typename Argument>
unsigned long size_of(void (*)(Argument)) {{ return sizeof(Argument); }}

template <typename Argument>
void run(void (*kernel)(Argument), unsigned blocks, unsigned threads, const void* argument) {{
  gridDim.x = blocks, blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(*static_cast<const Argument*>(argument));
}}
"""
KERNEL = """
extern "C" unsigned long size_{index}() {{ return size_of({name}); }}
extern "C" void launch_{index}(unsigned blocks, unsigned threads, const void* argument) {{
  run({name}, blocks, threads, argument);
}}
"""


def compiled(folder: Path, *flags: str) -> kernel.Launcher:
    """Compile the kernels into a folder, and return what launches them in the host's memory.

    Skips the test where there is no compiler.

    Args:
        folder: Where the library goes.
        flags: For the compiler, after its usual ones.
    """
    return loaded(built(folder, *flags))


def built(folder: Path, *flags: str) -> Path:
    """Compile the kernels into a folder, and return the library."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    source, library = folder / "kernels.cpp", folder / "kernels.so"
    source.write_text(DRIVER + "".join(KERNEL.format(index=i, name=name) for i, name in enumerate(kernel.NAMES)))
    command = [compiler, *OPTIONS, *flags, "-include", SHIM, source, "-o", library]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100)
    assert run.returncode == 0, run.stdout
    return library


def loaded(path: Path) -> kernel.Launcher:
    """Return what launches the kernels of a library."""
    library = ctypes.CDLL(str(path))

    def launch(name: str, blocks: int, threads: int, argument: ctypes.Structure) -> None:
        index = kernel.NAMES.index(name)
        assert library[f"size_{index}"]() == ctypes.sizeof(argument), f"{name}: the argument is another in C++"
        library[f"launch_{index}"](blocks, threads, ctypes.byref(argument))

    return launch
