"""What a run shows: curves, profiles and samples."""
