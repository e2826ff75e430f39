#!/usr/bin/env bash
# cupy-cuda13x 14.2.0 with NVRTC 13.0.88, no driver: nvrtc.getCUBIN returns one byte less than NVRTC's own
# nvrtcGetCUBINSize says and nvrtcGetCUBIN writes. It is cut off as the zero at the end of a text would be, and a cubin is
# no text. Loaders do not mind, for it is padding there; what checks the ELF file's length, as a disassembler, may.
# Expected output:  NVRTC: 3696 bytes, CuPy: 3695 bytes, the same but for the last: True
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet cupy-cuda13x==14.2.0 nvidia-cuda-nvrtc==13.0.88
libraries=$("$folder/venv/bin/python" -c 'import nvidia; print(list(nvidia.__path__)[0] + "/cu13/lib")')
LD_LIBRARY_PATH=$libraries "$folder/venv/bin/python" - "$libraries/libnvrtc.so.13" <<'PYTHON'
import ctypes
import sys

own = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
from cupy_backends.cuda.libs import nvrtc

source = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2; }'
program = nvrtc.createProgram(source, "twice.cu", (), ())
nvrtc.compileProgram(program, ("--gpu-architecture=sm_90",))
size = ctypes.c_size_t()
assert own.nvrtcGetCUBINSize(ctypes.c_void_p(program), ctypes.byref(size)) == 0
whole = ctypes.create_string_buffer(size.value)
assert own.nvrtcGetCUBIN(ctypes.c_void_p(program), whole) == 0
cubin = nvrtc.getCUBIN(program)
same = whole.raw[: len(cubin)] == cubin
print(f"NVRTC: {size.value} bytes, CuPy: {len(cubin)} bytes, the same but for the last: {same}")
assert len(cubin) == size.value - 1 and same, "this has changed"
PYTHON
