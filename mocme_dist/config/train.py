"""Settings of the training loop."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mocme_dist.config.section import Section


class TrainConfig(Section):
    """The training loop."""

    loss: Literal["contrastive", "one_vs_all"] = Field(
        "contrastive", description="Weighted contrastive loss (paper), or softmax over all entities."
    )
    epochs: int = Field(
        60, ge=1, le=10**9, description="Passes over all queries: each triple is two queries (paper: 1000)."
    )
    batch_size: int = Field(
        1024,
        ge=1,
        le=2**24,
        description="Queries per step, over all ranks; a triple is two queries (paper: 1024 triples, so 2048).",
    )
    learning_rate: float = Field(3e-3, gt=0, le=1e30, description="Learning rate of the dense parameters.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="Schedule of the learning rates of dense parameters, relations and rows; linear and cosine end at "
        "zero. A run resumed with more epochs follows the longer schedule from there on.",
    )
    warmup_steps: int = Field(
        0, ge=0, le=10**9, description="Number of first steps, in which those rates grow linearly from zero."
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type of the inputs of matrix products in projections and experts during training; parameters, "
        "distances, estimates and evaluation stay float32. Whether bfloat16 is faster depends on the machine: measure "
        "a step with each.",
    )
    one_graph: Literal["auto"] | bool = Field(
        "auto",
        description="Compile forward and backward of a step as one graph of fixed shapes. auto: on a GPU, where it "
        "holds: one rank, compile, one micro-batch per step, float32 rows beside the engine, and "
        "deepspeed.engine=torch or stage 0. true works on a CPU, too.",
    )
    cuda_graphs: Literal["auto"] | bool = Field(
        "auto",
        description="Record kernels once and launch them together on a GPU: the whole step where train.one_graph "
        "holds, else the loss. auto: wherever compile is on. Not run on a GPU yet in this form.",
    )
    structure_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of a step's entities whose structure is hidden if they have another modality, because "
        "unseen entities have none.",
    )
    gradient_clipping: float = Field(
        0.0,
        ge=0,
        le=1e9,
        description="Largest global gradient norm, of dense parameters and rows together; 0 is off.",
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Seed of the weights, the batches and the negatives.")
    log_every: int = Field(50, ge=1, le=10**9, description="Steps between two lines of metrics.jsonl.")
    eval_every: int = Field(10, ge=1, le=10**9, description="Epochs between two evaluations on valid.")
    eval_queries: int = Field(
        0,
        ge=0,
        le=2**31 - 1,
        description="Size of the fixed sample of valid queries for evaluation during training; 0 takes all.",
    )
    checkpoint_every: int = Field(10, ge=1, le=10**9, description="Epochs between two checkpoints.")
    checkpoint_steps: int = Field(
        0, ge=0, le=10**9, description="Steps between two additional checkpoints, for long epochs; 0 is off."
    )
    num_to_keep: int = Field(2, ge=2, le=10**6, description="Checkpoints kept besides the best one.")
    patience: int = Field(
        0, ge=0, le=10**9, description="Evaluations without a better valid MRR after which training stops; 0 is off."
    )
    projector: int = Field(
        500, ge=0, le=4096, description="Entities in TensorBoard's projector at the end of a run; 0 is off."
    )
    max_nonfinite: int = Field(
        10,
        ge=1,
        le=10**9,
        description="Consecutive steps with a non-finite loss or gradient, or a loss a thousand times that of the "
        "first step, after which a run has diverged; noticed at the end of a log interval, and before the run "
        "evaluates or saves.",
    )
