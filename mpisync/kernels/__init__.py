"""Fused reductions on the CPU: arrays in, arrays out.

`dtypes` is the one table of gradient dtypes and imports no numba; `fold` sums, averages and copies;
`atomics` are for words that processes share. Everything is compiled on first use and cached.
"""
