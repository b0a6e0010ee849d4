"""Makes torchvision, and with it transformers, importable with a CPU-only torch.

The published torchvision wheel is built for CUDA: with a CPU-only torch its C++ library does not load, its import fails
with "operator torchvision::nms does not exist", and every transformers model fails with it. Defining the schemas of the
two operators that the import needs fixes both. Models and transforms then work; `ops.nms` and `io.read_image` do not,
and are not used here.

Our own code calls `prepare_torchvision` first. For other programs (pykeen, a notebook) tools/torchvision.pth calls
`watch` when Python starts: `make env` installs that file into the environment.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

_libraries: list[Any] = []  # a Library takes its operators along when it is collected


def prepare_torchvision() -> bool:
    """Define missing operator schemas; call before importing torchvision or transformers.

    Returns:
        True if this call defined the schemas; False if nothing was needed: no torchvision, a torch with CUDA or ROCm,
        or a torchvision whose own operators load.
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


class _Loader(SourceFileLoader):
    """Loads torchvision after its operator schemas are defined."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        prepare_torchvision()
        return None  # Python makes the module


class _Finder:
    """Finds torchvision as Python would, and gives it `_Loader`; a mere search for it imports nothing."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def watch() -> None:
    """Call `prepare_torchvision` at the first import of torchvision in this process; costs nothing before."""
    sys.meta_path.insert(0, _Finder)
