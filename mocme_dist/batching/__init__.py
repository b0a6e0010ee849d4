"""From (seed, step) to the tensors of a batch; the same global batches at any world size."""
