"""The step protocol: the root, the workers, and who is in which state."""
