"""Delay laws, order statistics, simulation and advice. Needs policies only: no MPI, no torch."""
