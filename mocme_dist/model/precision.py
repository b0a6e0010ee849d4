"""What products multiply in training, by name: train.precision and mine.precision. Sums are float32 in all of them.

bfloat16x3 takes each number as the sum of two of bfloat16, 16 bits in all, and a product as three of theirs, as torch's
float32_matmul_precision "high" does. It is there for the C++ kernels on CPUs with AMX; where they do not run, products are float32.
"""

from __future__ import annotations

import torch

# The instruction set that kernels of each are built for; None is what the CPU has.
INSTRUCTIONS = {"float32": None, "bfloat16x3": "AMX, in two parts", "bfloat16": "AMX"}


def torch_type(precision: str) -> torch.dtype:
    """What torch's products multiply."""
    return torch.bfloat16 if precision == "bfloat16" else torch.float32
