"""Parallel tests: `parallel.py` starts them; `launch.py` starts users' scripts; `stand_in.py` is no device."""

import os

from launch import launch_arguments
from parallel import comm, pytest_configure

__all__ = ["comm", "launch_arguments", "pytest_configure"]

if os.environ.get("MPITEST_DEVICE") == "stand-in":  # every session's model is on a device
    import stand_in

    from mpisync.session import distributed_model

    distributed_model.memory_of = lambda model: stand_in.StandIn()
