"""Fused vectors of a checkpoint, range by range: what export streams. One process, no engine, no table.

Rows come from the checkpoint's files, features from their parts, and blocks are those of evaluation, encoded by the
same kernels, so vectors are what evaluation ranked with. Memory is one block and the dense model, whatever E is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mocme_dist.config import Config
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.features import FeatureStore
from mocme_dist.errors import CheckpointError
from mocme_dist.model.mocme import MoCME
from mocme_dist.parallel.comm import pick_device
from mocme_dist.training.checkpoint import Saved, check_identity, load_dense, read_rows
from mocme_dist.training.encode import pad_block
from mocme_dist.training.identity import model_identity
from mocme_dist.training.step import EntityInput
from mocme_dist.training.worker import block_rows, model_settings, resolve_modalities


class Block(NamedTuple):
    """Entities [first, last): fused z (n, D), modality weights (n, M), what each modality alone says (M, n, D); on the CPU."""

    first: int
    last: int
    z_nD: Tensor
    weight_nM: Tensor
    modal_MnD: Tensor


class RunRows:
    """A checkpoint's model with its rows and features behind it.

    Raises:
        CheckpointError: the checkpoint is of another data set or model, or does not fit it.
        DataError: features are missing.
    """

    def __init__(self, config: Config, dataset: Dataset, saved: Saved) -> None:
        self.config, self.dataset, self.saved = config, dataset, saved
        self.modalities = resolve_modalities(config, dataset)
        check_identity(saved, model_identity(config, dataset, self.modalities))
        self.device = pick_device()
        self.block_rows = block_rows(config, dataset.num_entities)
        self.raw_widths = {name: self._store(name, 0, 0).width if name != "structure" else config.experts.width for name in self.modalities}
        self.model = load_model(self.raw_widths, config, dataset.num_relations, model_state(saved)).to(self.device)

    def _store(self, name: str, first: int, last: int) -> FeatureStore:
        self.dataset.bring_features(name, first, last)
        return FeatureStore.open(self.dataset.directory, name, first, last, "mmap", "cpu", self.config.features.on_bad)

    @property
    def phase_RC(self) -> Tensor:
        """(R, C) phases of the relations in radians."""
        return self.model.relations.phase_RC.detach().float().cpu()

    def blocks(self, first: int, last: int, hide: str | None = None) -> Iterator[Block]:
        """Blocks of the entities [first, last), in order.

        Args:
            first: a multiple of `block_rows`.
            last: another one, or the number of entities.
            hide: a modality that is taken from all of them.
        """
        stores = {name: self._store(name, first, last) for name in self.modalities if name != "structure"}
        for start in range(first, last, self.block_rows):
            stop = min(last, start + self.block_rows)
            local = torch.arange(start - first, stop - first)
            raw, present = {}, []
            for name in self.modalities:
                if name == "structure":
                    raw[name], there = read_rows(self.saved, start, stop), torch.ones(stop - start, dtype=torch.bool)
                else:
                    raw[name], there = stores[name].gather(local)
                present.append(there & (name != hide))
            entities = EntityInput(raw, torch.stack(present), torch.zeros(stop - start, dtype=torch.bool))
            padded, present_MV, _ = pad_block(entities, 0, self.block_rows)
            with torch.no_grad():
                fused = self.model.encode({k: v.to(self.device) for k, v in padded.items()}, present_MV.to(self.device))
            n = stop - start
            yield Block(start, stop, fused.z_VD[:n].cpu(), fused.inter_VM[:n].float().cpu(), fused.modal_MVD[:, :n].float().cpu())


def model_state(saved: Saved) -> dict[str, Tensor]:
    """Parameters and buffers of the model in a checkpoint, without the optimizer's, by their name in the module."""
    state = {}
    for name, value in load_dense(saved).items():
        kind, _, path = name.partition("/")
        if kind in ("value", "buffer"):
            state[path.removeprefix("model.")] = value
    return state


def load_model(raw_widths: dict[str, int], config: Config, num_relations: int, state: dict[str, Tensor]) -> MoCME:
    """The model in evaluation mode with these weights.

    Raises:
        CheckpointError: they are not of this model.
    """
    model = MoCME(raw_widths, num_relations, model_settings(config), config.train.seed)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()
        raise CheckpointError(f"the dense weights do not fit this model: {reason[min(1, len(reason) - 1)].strip()}") from None
    return model.eval().requires_grad_(False)


def source_of(rows: RunRows, **extra: Any) -> dict[str, Any]:
    """What an export is made from: equal sources give equal files."""
    files = {name: entry["sha256"] for name, entry in rows.saved.manifest["files"].items()}
    return {"dataset": rows.dataset.fingerprint, "step": rows.saved.step, "checkpoint": files, "modalities": list(rows.modalities), **extra}
