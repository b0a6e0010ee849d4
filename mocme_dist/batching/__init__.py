"""Makes the tensors of a batch from (seed, step); global batches are the same at any world size."""
