"""Memory of the dense parameters for the plan of a run, by engine and ZeRO stage.

The counts are those that `tools.bench.stages` measures: values, gradients, moments and float32 masters for the whole
run, copies of them in a step, and gaps between them.
"""

from __future__ import annotations

from mocme_dist.config.schema import DeepSpeedConfig
from mocme_dist.model.experts import Experts
from mocme_dist.model.mocme import MoCME
from mocme_dist.training.build import LARGE_MODEL_BYTES
from mocme_dist.training.deepspeed_engine import BUCKET, largest_module

# Gaps that values, gradients and copies of them leave in a heap that keeps its pages, as multiples of the values, by
# ZeRO stage; measured with 100 MB of values.
_GAPS = (1.0, 3.5, 3.5, 5.5)


def dense_bytes(deepspeed: DeepSpeedConfig, dense: int, world_size: int) -> dict[str, int]:
    """Return bytes of `dense` parameters for the whole run, by kind; each ZeRO stage shards more of them."""
    gaps = {"dense: gaps in the heap": _gap_bytes(deepspeed, dense)}
    if deepspeed.engine == "torch" or (deepspeed.stage == 0 and not deepspeed.bf16):
        return {"dense: values and gradients": 8 * dense, "dense: moments and masters": 8 * dense, **gaps}
    whole = (2 if deepspeed.bf16 else 4) * dense
    values = whole // world_size if deepspeed.stage == 3 else whole
    gradients = whole // world_size if deepspeed.stage >= 2 else whole
    moments = 12 * (dense // world_size)
    return {"dense: values and gradients": values + gradients, "dense: moments and masters": moments, **gaps}


def _gap_bytes(deepspeed: DeepSpeedConfig, dense: int) -> int:
    if 4 * dense >= LARGE_MODEL_BYTES:  # its tensors are mapped one by one
        return 0
    stage = 0 if deepspeed.engine == "torch" else deepspeed.stage
    return int(4 * dense * _GAPS[stage])


def copied_bytes(deepspeed: DeepSpeedConfig, model: MoCME, world_size: int) -> int:
    """Return bytes of temporary copies of dense values and gradients in a step."""
    dense = sum(p.numel() for p in model.parameters())
    if deepspeed.engine == "torch":
        return 4 * dense * min(world_size, 2)  # gradients as one vector, and its sum over ranks
    if deepspeed.stage < 2:
        return 4 * dense  # gradients as one vector
    if deepspeed.stage == 2:
        return 4 * (dense - dense // world_size)  # values gathered after the update, when gradients are gone
    modules = [module.divided() if isinstance(module, Experts) else module for module in model.children()]
    # A bucket of gradients, and two modules' values and what they are gathered from.
    return 4 * (min(BUCKET, dense) + 4 * max(largest_module(module) for module in modules))
