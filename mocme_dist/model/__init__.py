"""MoCME in tensors: one device, no ranks, torch alone."""
