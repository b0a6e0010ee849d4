"""torch.compile as this package uses it: one graph without breaks per purpose, compiled once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor


def one_graph(
    function: Callable[..., Any], replayed: bool = False, backend: str = "inductor", **fixed: Any
) -> Callable[..., Any]:
    """Return `function` as one compiled graph; a graph break is an error.

    Args:
        function: a plain function of tensors.
        replayed: on CUDA its kernels are recorded once and launched together. Shapes must not vary, and results are
            overwritten by the call that follows the next `torch.compiler.cudagraph_mark_step_begin`.
        backend: of the compiler.
        fixed: keyword arguments that are constants of the graph.
    """
    # A user cannot act on the compiler's warnings about its own choices (TF32 not used, a softmax split).
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\._inductor\.")
    # A separate code object: the compiler counts the graphs per code object and gives up after a few.
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    own.__kwdefaults__ = {**(function.__kwdefaults__ or {}), **fixed}
    mode = "reduce-overhead" if replayed else None
    return torch.compile(own, dynamic=False, fullgraph=True, backend=backend, mode=mode)


def vary(values: Sequence[Tensor], dim: int) -> bool:
    """Mark a dimension as varying from step to step, so that one graph serves all steps; return whether it can.

    The compiler specialises sizes 0 and 1; they are rare, and such a step runs without it.
    """
    if any(value.shape[dim] < 2 for value in values):
        return False
    for value in values:
        torch._dynamo.mark_dynamic(value, dim)
    return True
