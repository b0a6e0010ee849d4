"""The training run: engine, step, loop, checkpoints, logs and who launches them."""
