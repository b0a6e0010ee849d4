"""Benchmarks: one subject a file, parity first, one JSON line last; figures in RESULTS.md."""

import mocme_dist  # noqa: F401  # before torch: sets how its threads wait, as in the commands
