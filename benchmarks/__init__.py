"""Benchmarks: each is a command, ``python -m benchmarks.NAME``. Results are in ``results/``."""
