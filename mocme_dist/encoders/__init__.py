"""Frozen encoders, one file a modality, and the pipeline that runs them over shards."""
