"""Imported once by the fork server: ranks start with torch in memory, and with what is slow the first time behind them."""

import pytest  # noqa: F401
import torch
import torch.distributed

import mocme_dist.training.step  # noqa: F401

torch.set_num_threads(1)
torch.testing.assert_close(torch.ones(2), torch.ones(2))
# The first step of an optimizer imports torch's compiler, which takes seconds.
parameter = torch.nn.Parameter(torch.ones(2))
parameter.sum().backward()
torch.optim.Adam([parameter]).step()
