"""The life of a run: its directory, lock, lease, launch, supervision and status."""
