"""Makes torchvision importable beside a CPU-only torch, and transformers with it.

The registries' torchvision wheel is built for CUDA: beside a CPU-only torch its C++ library does not load, its
import ends in "operator torchvision::nms does not exist", and every transformers model fails with it. Defining the
schemas of the two operators that the import asks for cures both. The models and transforms work then; `ops.nms` and
`io.read_image` do not, and nothing here calls them.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

_libraries: list[Any] = []  # a Library takes its operators along when it is collected


def prepare_torchvision() -> bool:
    """Define the operator schemas where they are missing; call before importing torchvision or transformers.

    Returns:
        True when the schemas were defined by this call; False where nothing was needed: no torchvision, a torch
        with CUDA or ROCm, or a torchvision whose own operators load.
    """
    if _libraries or "torchvision" in sys.modules:
        return False
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return False
    for file in sorted(Path(spec.origin).parent.glob("_C*")):
        try:
            torch.ops.load_library(str(file))  # type: ignore[no-untyped-call]
            return False  # built for this torch: torchvision will find it loaded
        except OSError:
            continue
    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    return True
