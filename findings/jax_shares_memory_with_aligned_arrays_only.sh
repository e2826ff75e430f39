#!/usr/bin/env bash
# jax 0.10.2 on the CPU: jax.device_put(array) of a NumPy array copies it, or shares its memory, as the array's address
# happens to be aligned to 64 bytes or not. Who writes to the NumPy array afterwards, as a loop does that receives
# parameters in place, changes "immutable" JAX arrays in one run and not in the next. jnp.array(array) copies always.
# Expected output:  aligned: [5. 5.]   8 bytes further: [0. 0.]   jnp.array, aligned: [0. 0.]
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 numpy
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np


def seen(take, offset):
    """What a JAX array of two zeros at this offset shows when fives are written to the NumPy array."""
    raw = np.zeros(256, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    array = raw[start : start + 8].view(np.float32)
    taken = take(array).block_until_ready()
    array[:] = 5
    return str(np.asarray(taken))


aligned, further, copied = seen(jax.device_put, 0), seen(jax.device_put, 8), seen(jnp.array, 0)
print(f"aligned: {aligned}   8 bytes further: {further}   jnp.array, aligned: {copied}")
assert (aligned, further, copied) == ("[5. 5.]", "[0. 0.]", "[0. 0.]"), "this has changed"
PYTHON
