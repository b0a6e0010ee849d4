"""Exact filtered ranking over sharded rows, and what is reported of it."""
