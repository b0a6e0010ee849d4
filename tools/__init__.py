"""Generators, benchmarks and checks that are run from a checkout."""
