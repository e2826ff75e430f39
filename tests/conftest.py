"""Parallel tests: `parallel.py` starts them; `launch.py` starts users' scripts."""

from launch import launch_arguments
from parallel import comm, pytest_configure

__all__ = ["comm", "launch_arguments", "pytest_configure"]
