"""torch.compile as this package uses it: one graph without breaks, for one purpose, compiled once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor


def one_graph(function: Callable[..., Any], replayed: bool = False, **fixed: Any) -> Callable[..., Any]:
    """`function` as one compiled graph; a break is an error.

    Args:
        function: a plain function of tensors.
        replayed: on CUDA its kernels are recorded once and launched together; shapes must not vary, and what a call gives is
            overwritten by the call after the next `torch.compiler.cudagraph_mark_step_begin`.
        fixed: its keyword arguments that are constants of the graph.
    """
    # What the compiler says of its own choices (TF32 left off, a softmax split) is nothing that a user can act on.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\._inductor\.")
    # A code object of its own: the compiler counts the graphs of a code object and gives up at a few.
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    own.__kwdefaults__ = {**(function.__kwdefaults__ or {}), **fixed}
    return torch.compile(own, dynamic=False, fullgraph=True, mode="reduce-overhead" if replayed else None)


def vary(values: Sequence[Tensor], dim: int) -> bool:
    """Tell the compiler that a dimension differs from step to step, so that one graph serves all; whether it can.

    Sizes 0 and 1 are special to it, and rare: such a step runs without it.
    """
    if any(value.shape[dim] < 2 for value in values):
        return False
    for value in values:
        torch._dynamo.mark_dynamic(value, dim)
    return True
