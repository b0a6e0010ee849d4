"""Training: plan, construction of a worker, engines, step, loop and the format of checkpoints."""
