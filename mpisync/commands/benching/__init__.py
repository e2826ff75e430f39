"""Measuring: what `mpisync bench` compares, and what the scripts under benchmarks/ share with it."""
