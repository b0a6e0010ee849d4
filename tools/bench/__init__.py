"""Benchmarks: one subject a file, parity first, one JSON line last; figures in RESULTS.md."""
