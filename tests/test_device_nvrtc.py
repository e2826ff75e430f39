"""What NVIDIA's compiler makes of the device's kernels, for every generation of cards; no card is needed."""

import ctypes
import importlib.metadata
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from mpisync.device import kernel
from mpisync.device.kernel import LINK, NAMES, OPTIONS, SOURCE

# Turing, Ampere, Hopper, two of Blackwell; the last two take the compiler twice as long.
GENERATIONS = [90, *(pytest.param(sm, marks=pytest.mark.long) for sm in (75, 80, 100, 120))]
FOLDS = [name for name in NAMES if name.startswith(("fold<", "fused_sgd_step<"))]
ARGUMENTS = {"squares": kernel._Squares, "pack": kernel._Pack}
LOCAL, SHARED = r"(LDL|STL)\b", r"(LDS|STS|LDSM|ATOMS)\b"
BARRIERS, WARPS = r"(BAR|WARPSYNC|SYNCS|DEPBAR\.ALL|ELECT)\b", r"(SHFL|VOTE|VOTEU|MATCH|REDUX|CREDUX)\b"


def file_of(package, name):
    """Return the path of a file of a wheel, and skip the test where the wheel is not installed."""
    try:
        files = importlib.metadata.files(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed; extra 'test' brings it on x86-64")
    return next(Path(file.locate()) for file in files if file.name == name)


@pytest.fixture(scope="module")
def nvrtc():
    return ctypes.CDLL(str(file_of("nvidia-cuda-nvrtc", "libnvrtc.so.13")))


class Compiled:
    """What a source became: PTX, and the instructions of each kernel for one generation."""

    def __init__(self, nvrtc, folder, sm, *, source=None, names=NAMES, options=OPTIONS):
        self._nvrtc, self._program = nvrtc, ctypes.c_void_p()
        text = (source or SOURCE.read_text()).encode()
        self._do("CreateProgram", ctypes.byref(self._program), text, b"fold.cu", 0, None, None)
        for name in names:  # before it is compiled, or they are not instantiated
            self._do("AddNameExpression", self._program, name.encode())
        flags = [option.encode() for option in (*options, f"--gpu-architecture=sm_{sm}")]
        result = nvrtc.nvrtcCompileProgram(self._program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
        assert result == 0, self._get("ProgramLog").decode()
        self.symbols = {name: self._symbol(name) for name in names}
        self.ptx = self._get("PTX").decode()
        cubin = folder / f"{sm}.cubin"
        cubin.write_bytes(self._get("CUBIN"))
        disassembler = file_of("nvidia-cuda-nvdisasm", "nvdisasm")
        self._sass = subprocess.run(
            [disassembler, "--print-code", cubin], capture_output=True, text=True, check=True, timeout=60
        ).stdout
        self._do("DestroyProgram", ctypes.byref(self._program))

    def _do(self, name, *arguments):
        assert getattr(self._nvrtc, f"nvrtc{name}")(*arguments) == 0, name

    def _get(self, name):
        size = ctypes.c_size_t()
        self._do(f"Get{name}Size", self._program, ctypes.byref(size))
        memory = ctypes.create_string_buffer(size.value)
        self._do(f"Get{name}", self._program, memory)
        return memory.raw

    def _symbol(self, name):
        symbol = ctypes.c_char_p()
        self._do("GetLoweredName", self._program, name.encode(), ctypes.byref(symbol))
        return symbol.value.decode()

    def instructions(self, name):
        """Return the machine's instructions of a kernel, without predicates and operands."""
        section = re.search(
            rf"\.section\s+\.text\.{re.escape(self.symbols[name])},(.*?)(?=\.section\s|\Z)", self._sass, re.DOTALL
        )
        found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", section[1])
        assert found[-1] in ("NOP", "BRA") and "EXIT" in found
        return found

    def count(self, name, pattern):
        return sum(bool(re.match(pattern, instruction)) for instruction in self.instructions(name))

    def arithmetic(self, name):
        """Return how often each PTX operation on floats stands in a kernel, and the size of its argument."""
        entry = re.search(rf"\.entry {re.escape(self.symbols[name])}\((.*?)\n}}", self.ptx, re.DOTALL)[1]
        operations = re.findall(r"\b((?:add|sub|mul|mad|fma|div|rcp)\.[\w.]*f(?:32|64)(?:x2)?)\b", entry)
        return Counter(operations), int(re.search(r"\.param [^\n]*\[(\d+)\]", entry)[1])


@pytest.fixture(scope="module", params=GENERATIONS)
def card(request, nvrtc, tmp_path_factory):
    return Compiled(nvrtc, tmp_path_factory.mktemp("cubin"), request.param)


def test_nothing_waits_and_nothing_is_spilled(card):
    for name in NAMES:
        for pattern in (LOCAL, SHARED, BARRIERS, WARPS):
            assert card.count(name, pattern) == 0, (name, pattern)


def test_arrays_are_read_and_written_16_bytes_at_a_time(card):
    for name in NAMES:
        assert card.count(name, r"LDG\.E\.128") > 0, name
        assert name.startswith("squares") or card.count(name, r"STG\.E\.128") > 0, name


def test_all_loads_of_a_pass_are_under_way_together(card):
    for name in FOLDS:
        most = under_way = 0
        for instruction in card.instructions(name):
            if instruction.startswith("LDG.E.128"):
                under_way += 1
            elif re.match(r"(FADD|DADD|FFMA|DFMA|STG)", instruction):
                under_way = 0
            most = max(most, under_way)
        assert most >= LINK - 1, name  # with two lanes branches become predicates, and a load or two is moved


def test_every_operation_is_rounded_by_itself_and_only_the_update_is_fused(card):
    for name in NAMES:
        operations, size = card.arithmetic(name)
        assert all(".rn." in operation and ".ftz" not in operation for operation in operations), (name, operations)
        fused = any(operation.startswith("fma") for operation in operations)
        assert fused == name.startswith("fused_sgd_step"), (name, operations)
        real = kernel._Fold64 if "double" in name else kernel._Fold32
        assert size == ctypes.sizeof(ARGUMENTS.get(name.partition("<")[0], real)), name


def test_a_sum_is_not_contracted_whatever_the_compiler_is_told(nvrtc, tmp_path):
    names, options = ["fold<float>"], ["--std=c++17", "--fmad=true"]
    operations, _ = Compiled(nvrtc, tmp_path, 90, names=names, options=options).arithmetic("fold<float>")
    assert not any(operation.startswith("fma") for operation in operations)
    careless = SOURCE.read_text().replace("__fadd_rn(a, b)", "a + b").replace("__fmul_rn(a, b)", "a * b")
    compiled = Compiled(nvrtc, tmp_path, 90, source=careless, names=names, options=options)
    assert any(operation.startswith("fma") for operation in compiled.arithmetic("fold<float>")[0])


def test_what_is_not_wanted_would_be_seen(nvrtc, tmp_path):
    source = """
template <typename T> __global__ void bad(T* x) {
  __shared__ T shared[64];
  T local[64];
  for (int i = 0; i < 64; ++i) local[i] = x[i * x[i]];
  shared[threadIdx.x] = local[x[threadIdx.x] % 64];
  __syncthreads();
  x[threadIdx.x] = __shfl_down_sync(~0u, shared[threadIdx.x ^ 1], 1);
}
"""
    compiled = Compiled(nvrtc, tmp_path, 90, source=source, names=["bad<int>"])
    assert all(compiled.count("bad<int>", pattern) for pattern in (LOCAL, SHARED, BARRIERS, WARPS))
    assert not compiled.count("bad<int>", r"STG\.E\.128")
