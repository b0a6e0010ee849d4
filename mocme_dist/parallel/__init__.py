"""The only package that knows torch.distributed: ranks, the exchange of rows, the sharded table and its optimizers."""
