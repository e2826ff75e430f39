"""What is tried on a machine with a card, by benchmarks/gpu.py: each step in a process of its own."""
