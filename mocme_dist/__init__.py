"""Completes multi-modal knowledge graphs: pack, extract, train, evaluate."""

__version__ = "0.1.0"
