"""Settings of the model: one section per part, in the order in which a vector passes them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mocme_dist.config.section import Section


class ProjectionConfig(Section):
    """Linear-ReLU-Linear from a modality's raw width to D, one per modality."""

    hidden: int | None = Field(None, ge=1, le=2**20, description="Width of the hidden layer; None is D.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on projected features.")
    structure: Literal["mlp", "identity"] = Field(
        "identity", description="Whether the structure row passes the projection (paper: mlp) or skips it."
    )


class ExpertsConfig(Section):
    """Mixture of K experts inside each modality, without a gate."""

    num_experts: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = Field(
        3,
        description="K; equal for all modalities, so that they run as one batched product. auto is the number of "
        "modalities (paper).",
    )
    width: int = Field(
        256,
        ge=2,
        le=65_536,
        multiple_of=2,
        description="D, width in real numbers; read as D / 2 complex numbers for scores (paper: 256).",
    )
    kind: Literal["mlp", "identity"] = Field(
        "mlp",
        description="identity: the only view of a modality is its projection; with structure alone the model is plain "
        "RotatE.",
    )
    residual: bool = Field(True, description="Expert k gives x + f_k(x) instead of f_k(x) (paper: false).")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the experts' hidden layer.")
    recompute: bool = Field(
        False,
        description="Compute the hidden layers again in the backward pass instead of keeping them: less memory, more "
        "time, equal gradients.",
    )

    def count_for(self, num_modalities: int) -> int:
        """Return K for a model of `num_modalities` modalities."""
        if self.num_experts == "auto":
            return num_modalities if self.kind == "mlp" else 1
        return self.num_experts


class MineConfig(Section):
    """Mutual information by Donsker-Varadhan statistics networks, one per pair."""

    hidden: int = Field(64, ge=1, le=2**20, description="Width of the statistics networks.")
    learning_rate: float = Field(
        1e-3,
        gt=0,
        le=1e30,
        description="Learning rate of the statistics networks; they ascend the bound on detached views.",
    )
    ema: float = Field(
        0.95, ge=0, lt=1, description="Decay of the moving average of the estimates that the fusion uses."
    )
    bounded: bool = Field(
        True,
        description="Estimate on held-out entities, clip T and cap at log n. False: the paper's raw estimate on the "
        "rows that the networks were trained on.",
    )
    clip: float = Field(
        10.0, gt=0, le=80, description="With bounded: |T| is clipped to this inside the exponential (SMILE)."
    )
    every: int = Field(
        4, ge=1, le=10**9, description="Steps between two estimates, at which the networks are trained too (paper: 1)."
    )
    rows: int = Field(
        0, ge=0, le=2**31 - 1, description="Largest number of rows of a rank's batch for the estimate; 0 uses all."
    )


class FusionConfig(Section):
    """Complementarity weights: first over the experts of a modality, then over modalities."""

    form: Literal["sum", "blocks"] = Field(
        "sum",
        description="Content of a vector. sum: the fused vector (paper). blocks: [each modality's vector | the fused "
        "vector], D / (M + 1) numbers each, with separate phases, distances and losses; for blend weights per "
        "relation.",
    )
    estimator: Literal["mine", "cosine", "uniform", "attention"] = Field(
        "mine", description="Source of the weights; all but mine are controls."
    )
    scope: Literal["global", "entity"] = Field(
        "global", description="One weight per pair for all entities, or the pointwise term of each entity."
    )
    weight_gradient: Literal["stop", "flow"] = Field(
        "stop", description="Whether the completion loss reaches the views through the weights."
    )
    temperature: float = Field(1.0, gt=0, le=1e9, description="Divisor of the mutual information before the softmax.")
    normalize: bool = Field(True, description="Divide mutual information by log n before the softmax (paper: false).")


class RotateConfig(Section):
    """RotatE scores: gamma minus the distance."""

    gamma: float = Field(6.0, gt=0, le=1e6, description="Margin; a score is gamma minus the sum of complex moduli.")


class RelationsConfig(Section):
    """Phases of the relations."""

    learning_rate: float | None = Field(
        None, gt=0, le=1e30, description="Learning rate of the phases, in radians; None takes train.learning_rate."
    )
