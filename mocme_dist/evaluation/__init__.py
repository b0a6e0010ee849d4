"""Exact filtered ranking over sharded rows, and its report."""
