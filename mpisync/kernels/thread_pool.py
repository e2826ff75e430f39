"""A small pool of threads for kernels that release the GIL and share out chunks by themselves.

Plain Python threads and no threading layer of numba's, so that a fork is harmless: they start with
the first work, belong to one process, and end with `close`.
"""

import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from mpisync.kernels.atomics import load_acquire
from mpisync.kernels.chunks import DONE, State


@dataclass(frozen=True, slots=True)
class _Job:
    kernel: Callable[..., None]
    arguments: tuple[Any, ...]
    returned: "SimpleQueue[BaseException | None]"


class ThreadPool:
    """Runs a kernel of `chunks` on several threads, the caller's among them."""

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        self.threads = threads
        self._renew()

    def _renew(self) -> None:
        self._process = os.getpid()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._helpers: list[threading.Thread] = []
        self._finalizer = weakref.finalize(self, _stop, self._jobs, self._helpers)
        self._finalizer.atexit = False  # at the interpreter's exit daemon threads need no farewell

    def run(self, kernel: Callable[..., None], state: State, arguments: tuple[Any, ...], chunks: int) -> None:
        """Call kernel(state, *arguments) until all chunks are done."""
        helpers = min(self.threads, chunks) - 1
        if helpers > 0:
            helpers = self._start(helpers)
        if helpers <= 0:
            kernel(state, *arguments)
            return
        job = _Job(kernel, (state, *arguments), SimpleQueue())
        for _ in range(helpers):
            self._jobs.put(job)
        kernel(*job.arguments)
        # A helper that never got a core has claimed nothing and is not waited for.
        while load_acquire(state, DONE) < chunks:  # pairs with the release in chunks._finish
            error = job.returned.get()
            if error is not None:
                raise error

    def _start(self, wanted: int) -> int:
        """Have helpers running in this process, and return how many of those wanted there are."""
        if self._process != os.getpid():  # forked: the threads stayed behind
            self.close()
        try:
            while len(self._helpers) < wanted:
                name = f"mpisync-kernels-{len(self._helpers) + 1}"
                helper = threading.Thread(target=_help, args=(self._jobs,), name=name, daemon=True)
                helper.start()
                self._helpers.append(helper)
        except RuntimeError:  # the limit of threads is reached: make do
            pass
        return min(wanted, len(self._helpers))

    def close(self) -> None:
        """End the threads; they start again when there is work again."""
        if self._process == os.getpid():
            self._finalizer()
        self._finalizer.detach()
        self._renew()


def _help(jobs: "SimpleQueue[_Job | None]") -> None:
    while (job := jobs.get()) is not None:
        try:
            job.kernel(*job.arguments)
            job.returned.put(None)
        except BaseException as error:  # whoever waits for the chunk raises it
            job.returned.put(error)


def _stop(jobs: "SimpleQueue[_Job | None]", helpers: list[threading.Thread]) -> None:
    for _ in helpers:
        jobs.put(None)
    for helper in helpers:
        if helper is not threading.current_thread():  # where the garbage collector may have run
            helper.join()
