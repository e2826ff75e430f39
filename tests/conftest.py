"""Parallel tests: `parallel.py` starts them; `launch.py` starts users' scripts."""

from parallel import comm, pytest_configure

__all__ = ["comm", "pytest_configure"]
