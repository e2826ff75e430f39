"""The kernels compiled for a card by NVRTC, NVIDIA's compiler, with their own options and no others.

CuPy's `RawModule` would compile them too, but adds `-ftz=true` behind whatever options it is given: then sums take
subnormal numbers for 0, and all of float16's subnormal numbers become 0 when they are widened.
"""

from __future__ import annotations

import functools
from typing import Any

from mpisync.device.kernel import NAMES, OPTIONS, SOURCE


@functools.cache  # it takes a second or two, and each session asks
def compiled(nvrtc: Any, generation: int) -> tuple[bytes, dict[str, str]]:
    """Compile the kernels, for which no card is needed.

    Args:
        nvrtc: CuPy's module of that name.
        generation: The card's compute capability, ten times: 90 for 9.0.

    Returns:
        Code that the driver loads, and by which name it knows each kernel.

    Raises:
        ValueError: The compiler refuses; with its words.
    """
    program = nvrtc.createProgram(SOURCE.read_text(), SOURCE.name, (), ())
    try:
        for name in NAMES:  # before it is compiled, or they are not instantiated
            nvrtc.addNameExpression(program, name)
        known = nvrtc.getSupportedArchs()
        is_known = generation in known
        # of a card that is newer than the compiler the driver compiles the rest
        target = f"sm_{generation}" if is_known else f"compute_{max(one for one in known if one <= generation)}"
        try:
            nvrtc.compileProgram(program, (*OPTIONS, f"--gpu-architecture={target}"))
        except nvrtc.NVRTCError as error:
            raise ValueError(f"{error}: {nvrtc.getProgramLog(program).strip()}") from None
        symbols = {name: nvrtc.getLoweredName(program, name) for name in NAMES}
        return (nvrtc.getCUBIN if is_known else nvrtc.getPTX)(program), symbols
    finally:
        nvrtc.destroyProgram(program)
