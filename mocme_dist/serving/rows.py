"""Fused vectors of a checkpoint, range by range, for export; one process, without engine and table.

Rows are read from the checkpoint's files and features from their parts. Blocks are those of evaluation and encoded by
the same kernels, so the vectors are those that evaluation ranked with. Memory is one block and the dense model,
whatever E is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mocme_dist.config import Config
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.features import FeatureStore
from mocme_dist.errors import CheckpointError
from mocme_dist.model.mocme import MoCME, ModelSettings
from mocme_dist.parallel.comm import pick_device
from mocme_dist.training.build import block_rows, model_blocks, model_settings, resolve_modalities
from mocme_dist.training.checkpoint import Saved, check_compatible, load_dense, read_rows
from mocme_dist.training.compatibility import model_identity
from mocme_dist.training.encode import pad_block
from mocme_dist.training.step import EntityInput


class Block(NamedTuple):
    """Entities [first, last): fused z (n, D), modality weights (n, M), each modality's own vector (M, n, D).

    On the CPU.
    """

    first: int
    last: int
    z_nD: Tensor
    weight_nM: Tensor
    modal_MnD: Tensor


class RunRows:
    """A checkpoint's model with its rows and features.

    Raises:
        CheckpointError: the checkpoint is of another data set or model, or does not fit it.
        DataError: features are missing.
    """

    def __init__(self, config: Config, dataset: Dataset, saved: Saved) -> None:
        # The text of an unseen entity is made of the same columns, so the bundle's configuration names them.
        columns = {"text_columns": dataset.text_columns(config.data.text_columns) or None}
        config = config.model_copy(update={"data": config.data.model_copy(update=columns)})
        self.config, self.dataset, self.saved = config, dataset, saved
        self.modalities = resolve_modalities(config.modalities, dataset)
        check_compatible(saved, model_identity(config, dataset, self.modalities))
        self.device = pick_device(0 if config.launch.gpus_per_worker == 0 else "auto")
        width = model_blocks(config.fusion, config.experts, self.modalities).width
        self.block_rows = block_rows(config.evaluation, dataset.num_entities)
        self.raw_widths = {
            name: self.store(name, 0, 0).width if name != "structure" else width for name in self.modalities
        }
        settings = model_settings(config, len(self.modalities))
        self.model = load_model(self.raw_widths, dataset.num_relations, settings, model_state(saved)).to(self.device)

    def store(self, name: str, first: int, last: int) -> FeatureStore:
        """Return the features of the entities [first, last) in a modality, mapped from disk."""
        self.dataset.bring_features(name, first, last)
        return FeatureStore.open(self.dataset.directory, name, first, last, "mmap", "cpu", self.config.features.on_bad)

    @property
    def phase_RC(self) -> Tensor:
        """Phases (R, C) of the relations in radians."""
        return self.model.relations.phase_RC.detach().float().cpu()

    def blocks(self, first: int, last: int, hide: str | None = None) -> Iterator[Block]:
        """Yield blocks of the entities [first, last), in order.

        Args:
            first: a multiple of `block_rows`.
            last: a multiple of `block_rows`, or the number of entities.
            hide: a modality that is treated as absent.
        """
        stores = {name: self.store(name, first, last) for name in self.modalities if name != "structure"}
        for start in range(first, last, self.block_rows):
            stop = min(last, start + self.block_rows)
            local = torch.arange(start - first, stop - first)
            raw, present = {}, []
            for name in self.modalities:
                if name == "structure":
                    raw[name] = read_rows(self.saved, start, stop)
                    there = torch.from_numpy(self.dataset.seen(np.arange(start, stop)))
                else:
                    raw[name], there = stores[name].gather(local)
                present.append(there & (name != hide))
            entities = EntityInput(raw, torch.stack(present))
            padded, present_MV = pad_block(entities, 0, self.block_rows)
            with torch.no_grad():
                fused = self.model.encode({k: v.to(self.device) for k, v in padded.items()}, present_MV.to(self.device))
            n = stop - start
            yield Block(
                start,
                stop,
                fused.z_VD[:n].cpu(),
                fused.inter_VM[:n].float().cpu(),
                fused.modal_MVD[:, :n].float().cpu(),
            )


def model_state(saved: Saved) -> dict[str, Tensor]:
    """Return the parameters and buffers of the model in a checkpoint, by name in the module."""
    state = {}
    for name, value in load_dense(saved).items():
        kind, _, path = name.partition("/")
        if kind in ("value", "buffer"):
            state[path.removeprefix("model.")] = value
    return state


def load_model(
    raw_widths: dict[str, int], num_relations: int, settings: ModelSettings, state: dict[str, Tensor]
) -> MoCME:
    """Return the model in evaluation mode with these weights.

    Raises:
        CheckpointError: the weights are of another model.
    """
    model = MoCME(raw_widths, num_relations, settings)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()
        raise CheckpointError(
            f"the dense weights do not fit this model: {reason[min(1, len(reason) - 1)].strip()}"
        ) from None
    return model.eval().requires_grad_(False)


def source_of(rows: RunRows, **extra: Any) -> dict[str, Any]:
    """Return what identifies the input of an export: equal inputs give equal files."""
    files = {name: entry["sha256"] for name, entry in rows.saved.manifest["files"].items()}
    return {
        "dataset": rows.dataset.fingerprint,
        "step": rows.saved.step,
        "checkpoint": files,
        "modalities": list(rows.modalities),
        **extra,
    }
