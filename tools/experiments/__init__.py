"""Studies of quality; each prints and keeps its rows as they come."""
