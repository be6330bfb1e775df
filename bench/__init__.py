"""Benchmarks: every public operator, every backend, its rivals; `python -m bench.report` runs all of it."""
