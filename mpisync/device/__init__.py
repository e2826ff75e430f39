"""Memory in which gradients, their sums and versions of the parameters lie, and what works on it: the host's, a card's.

`base` says what memory must do; `host` and `cuda` do it. Only memory differs between them: headers, verdicts and
versions are the host's affair everywhere. `fold.cu` is all that runs on a card, and `kernel` plans its launches for
whoever can make them. Nothing here imports CuPy or torch before a card is asked for.
"""
