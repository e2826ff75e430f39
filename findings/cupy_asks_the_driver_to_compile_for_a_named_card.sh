#!/usr/bin/env bash
# cupy-cuda13x 14.2.0 with NVRTC 13.0.88 on a machine without a driver: compiler.compile_using_nvrtc(source, arch="90")
# raises CUDARuntimeError, although the architecture is named and NVRTC itself needs no driver: the same program
# compiles by the functions below it. So that function compiles nothing ahead, on a login node or in CI.
# Expected output:  compile_using_nvrtc: CUDARuntimeError cudaErrorInsufficientDriver; compileProgram: compiled
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet cupy-cuda13x==14.2.0 nvidia-cuda-nvrtc==13.0.88
libraries=$("$folder/venv/bin/python" -c 'import nvidia; print(list(nvidia.__path__)[0] + "/cu13/lib")')
LD_LIBRARY_PATH=$libraries "$folder/venv/bin/python" - "$libraries/libnvrtc.so.13" <<'PYTHON'
import ctypes
import sys

ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
from cupy.cuda import compiler, runtime
from cupy_backends.cuda.libs import nvrtc

source = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2; }'
try:
    compiler.compile_using_nvrtc(source, options=(), arch="90")
    outcome = "compiled"
except runtime.CUDARuntimeError as error:
    outcome = f"CUDARuntimeError {str(error).partition(':')[0]}"
program = nvrtc.createProgram(source, "twice.cu", (), ())
nvrtc.compileProgram(program, ("--gpu-architecture=sm_90",))
assert nvrtc.getCUBIN(program)
print(f"compile_using_nvrtc: {outcome}; compileProgram: compiled")
assert outcome == "CUDARuntimeError cudaErrorInsufficientDriver", "this has changed"
PYTHON
