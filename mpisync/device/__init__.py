"""Gradients that stay on a device: what it computes, and how that is started.

`fold.cu` is all that runs there; `kernel` plans its launches for whoever can make them, without CuPy and torch.
"""
