"""The error that a rank raises when another one failed."""


class PeerFailed(RuntimeError):
    """An exception on another rank ended the training.

    Where it began, that exception is raised itself, with its traceback; the others say whose it was.

    Example:
        >>> try:  # session.step, session.batches, reduction.push, ...
        ...     raise PeerFailed("worker 2 failed: ZeroDivisionError: division by zero")
        ... except RuntimeError as error:
        ...     print(error)
        worker 2 failed: ZeroDivisionError: division by zero
    """

    is_echo = True  # the traceback of the rank where it began says more than one from here
