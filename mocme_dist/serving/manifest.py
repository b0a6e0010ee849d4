"""Schema of bundle.json.

It is a file of its own because pydantic takes 0.1 s to import, and a verified copy needs no check.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from mocme_dist.data.manifests import Count, FileEntry, FileName, Manifest, ModalityName, Size


class EvidenceManifest(Manifest):
    """Settings of a bundle's evidence of neighbours."""

    spaces: dict[ModalityName, Size]
    betas: dict[ModalityName, float]
    neighbours: Size
    max_holders: Size
    max_answers: Size


class BundleManifest(Manifest):
    """Content of a bundle's bundle.json; see bundle_format.py for the files."""

    format: Literal[2]
    kind: Literal["bundle"]
    num_entities: Size
    num_relations: Size
    width: int = Field(ge=2, multiple_of=2)
    blocks: Size = 1
    gamma: float
    dtype: Literal["float32", "float16"] = "float32"
    part_rows: Size
    modalities: list[ModalityName] = Field(min_length=1)
    views: bool
    raw_widths: dict[ModalityName, Count] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)
    features: dict[ModalityName, dict[str, Any]] = Field(default_factory=dict)
    structure_imputer: dict[str, Any] = Field(default_factory=dict)
    modality_weights: dict[ModalityName, float] = Field(default_factory=dict)
    trained: dict[str, Any] = Field(default_factory=dict)
    metrics: dict[str, Any] = Field(default_factory=dict)
    curves: dict[str, Any] = Field(default_factory=dict)
    leakage: dict[str, Any] = Field(default_factory=dict)
    reflexive: list[Count]
    evidence: EvidenceManifest | None = None
    calibration: dict[str, Any] | None
    files: dict[FileName, FileEntry]

    @model_validator(mode="after")
    def _check_relations(self) -> BundleManifest:
        if self.reflexive and max(self.reflexive) >= self.num_relations:
            raise ValueError(f"reflexive names relation {max(self.reflexive)} of {self.num_relations}")
        return self
