"""Imported once by the fork server.

Ranks start with torch in memory, and with what is slow the first time behind them.
"""

import pyarrow.parquet
import pytest  # noqa: F401
import torch
import torch.distributed
import torch.utils.tensorboard

import mocme_dist.training.loop  # noqa: F401

# Its first table imports pandas, where there is one.
pyarrow.table({"name": pyarrow.array([b"a"])})
torch.set_num_threads(1)
torch.testing.assert_close(torch.ones(2), torch.ones(2))
# The first step of an optimizer imports torch's compiler, which takes seconds.
parameter = torch.nn.Parameter(torch.ones(2))
parameter.sum().backward()
torch.optim.Adam([parameter]).step()
