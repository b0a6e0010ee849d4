"""Frozen encoders, one per modality, and the pipeline that runs them over shards."""
