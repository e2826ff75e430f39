"""numba's decorators, with a cache that works wherever the package is installed.

numba's own cache sits beside the source or in the home directory, and refuses to compile where it
can write to neither. It trusts a cached kernel while that kernel's own file is unchanged, though
its code may come from others. And of two processes that compile two signatures of one function at
the same time, one may find the other's code under its own name. Hence a cache of our own.
"""

import functools
import hashlib
import os
import stat
import tempfile
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from numba import extending, njit
from numba.core import caching, config

F = TypeVar("F", bound=Callable[..., Any])

# Code generators. numba's types vary with its version, so here they are none.
intrinsic: Callable[[Callable[..., Any]], Any] = extending.intrinsic


def check_jit() -> None:
    """Raise ValueError where numba is told not to compile: then nothing here works among processes."""
    if config.DISABLE_JIT:
        value = os.environ.get("NUMBA_DISABLE_JIT", "")
        raise ValueError(f"NUMBA_DISABLE_JIT={value} turns off the compiler of what sums gradients: unset it")


def compiled(function: F) -> F:
    """Compile a function when it is first called: cached, without the GIL or fast-math."""
    dispatcher: Any = njit(nogil=True, error_model="numpy", boundscheck=False)(function)
    if directory() is not None:
        dispatcher._cache = _Cache(function)
    return cast(F, dispatcher)


def inlined(function: F) -> F:
    """Compile a function into each of its callers, which are `compiled`."""
    decorate = njit(nogil=True, error_model="numpy", boundscheck=False, forceinline=True)
    return cast(F, decorate(function))


@functools.cache
def directory() -> Path | None:
    """Return where compiled kernels are kept; None where nothing can be written."""
    for candidate in (_asked_for, _users, _temporary):
        with suppress(OSError, RuntimeError):
            path = candidate() / f"kernels-{_digest()[:16]}"
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
            return path
    return None


def _asked_for() -> Path:
    path = os.environ.get("NUMBA_CACHE_DIR")
    if not path:
        raise FileNotFoundError
    return Path(path, "mpisync")


def _users() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mpisync")


def _temporary() -> Path:
    """Return a directory that is ours alone: what is in it will be executed."""
    path = Path(tempfile.gettempdir(), f"mpisync-{os.getuid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    if not private or status.st_mode & 0o077:
        raise PermissionError(f"{path} is not a directory of this user's alone")
    return path


@functools.cache
def _digest() -> str:
    """Return a hash of this subpackage's sources: a kernel is made of several files."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


class _Locator(caching._CacheLocator):
    """Tells numba where a function's cached code is, and when it is stale."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._line = function.__code__.co_firstlineno

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> "_Locator":
        return cls(function)

    def get_cache_path(self) -> str:
        return str(directory())

    def get_source_stamp(self) -> str:
        return _digest()

    def get_disambiguator(self) -> str:
        return str(self._line)


class _Implementation(caching.CompileResultCacheImpl):
    _locator_classes = [_Locator]


class _Cache(caching.FunctionCache):
    _impl_class = _Implementation

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        # Processes that compile at the same time must not take each other's file names.
        file = self._cache_file
        file._data_name_pattern = f"{self._impl.filename_base}.{uuid.uuid4().hex[:12]}.{{number:d}}.nbc"

    def load_overload(self, signature: Any, context: Any) -> Any:
        try:
            return super().load_overload(signature, context)
        except Exception:  # a torn file may raise nearly anything: forget it, and compile anew
            with suppress(OSError):
                self._cache_file.flush()
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        with suppress(OSError):  # the disk or the quota is full: do without
            super().save_overload(signature, data)
