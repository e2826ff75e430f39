"""The step protocol: root, workers, and who is in which state."""
