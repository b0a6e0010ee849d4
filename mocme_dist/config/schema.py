"""Every setting there is, with its default, its range and one sentence on what it does.

Defaults live here, those of encoders in `config.encoders`, and nowhere else; a file in configs/ holds differences only.
Code takes the section it needs.
Where a value is the paper's it says so; the others are ours.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from mocme_dist.config.encoders import (
    AudioEncoderConfig,
    EncodersConfig,
    ImageEncoderConfig,
    NumericEncoderConfig,
    TextEncoderConfig,
    VideoEncoderConfig,
)
from mocme_dist.config.section import Section

__all__ = [
    "AudioEncoderConfig",
    "EncodersConfig",
    "ImageEncoderConfig",
    "NumericEncoderConfig",
    "TextEncoderConfig",
    "VideoEncoderConfig",
]

MODALITIES = ("structure", "text", "image", "numeric", "audio", "video")
Modality = Literal["structure", "text", "image", "numeric", "audio", "video"]
Precision = Literal["float32", "bfloat16x3", "bfloat16"]


def _check_dev(value: str) -> str:
    if value == "file":
        return value
    kind, _, share = value.partition(":")
    try:
        fraction = float(share)
    except ValueError:
        fraction = -1.0
    if kind != "cut" or not 0 < fraction < 1:
        raise ValueError("expected 'file' or 'cut:F' with 0 < F < 1, as in cut:0.1")
    return value


class DataConfig(Section):
    """Where the graph comes from and how strict its reading is."""

    raw: str | None = Field(None, description="Raw folder; train packs and extracts whatever is missing from it.")
    dataset: str | None = Field(None, description="Packed data set directory; with data.raw the default is RUN_DIR/dataset.")
    shard_rows: int = Field(4096, ge=1, description="Entities per WebDataset shard.")
    seed: int = Field(0, ge=0, description="Seed of the permutation that gives entities their ids, and of the dev cut.")
    dev: Annotated[str, AfterValidator(_check_dev)] = Field(
        "file", description="Development set: 'file' is valid.txt; 'cut:F' holds the share F of train out instead (for leaked valid files)."
    )
    text_columns: tuple[str, ...] = Field(
        ("label", "description", "aliases"), min_length=1, description="Columns of text.tsv that make an entity's text, in this order."
    )
    unseen: Literal["error", "skip", "keep"] = Field(
        "error",
        description="Valid and test triples whose entity or relation train never shows: stop, leave out, or rank them all the same.",
    )
    allow_leakage: bool = Field(False, description="Accept test triples that also stand in train.")
    max_missing: float = Field(1.0, ge=0, le=1, description="Largest share of entities without any modality that is accepted.")


class FeaturesConfig(Section):
    """How a rank holds the features of its entities while training."""

    residency: Literal["host", "device", "mmap"] = Field("host", description="Host memory, device memory, or mapped from disk.")
    on_bad: Literal["error", "mask"] = Field(
        "error", description="Stored values that are not finite stop the run, or make their entities absent with a warning."
    )


class EntitiesConfig(Section):
    """The table of structural embeddings."""

    sharding: Literal["rows", "zero"] = Field(
        "rows",
        description="rows: each rank holds a range, outside the engine, and a step moves the rows it touched. zero: an ordinary "
        "parameter of the engine under deepspeed.stage and its Adam; every step moves all rows (small graphs, and as a control).",
    )
    optimizer: Literal["auto", "adam", "adagrad"] = Field(
        "auto",
        description="Row-wise optimizer on touched rows: adam keeps two moments of D numbers a row, adagrad one number; "
        "auto is adam up to 1,000,000 entities and adagrad above.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of the rows; bfloat16 halves the table, and rounds updates at random so that small ones count on average."
    )
    learning_rate: float | None = Field(None, gt=0, description="Of the rows; None takes train.learning_rate.")
    init_range: float = Field(1.0, gt=0, description="Rows start uniform in [-r, r]; fused vectors are scaled by RotatE's (gamma + 2) / D.")
    row_weight_decay: float = Field(0.0, ge=0, description="L2 penalty on touched rows, added to their gradient.")

    @model_validator(mode="after")
    def _in_engine(self) -> EntitiesConfig:
        if self.sharding == "zero" and self.optimizer == "adagrad":
            raise ValueError("optimizer adagrad with sharding zero; expected auto or adam, the engine's")
        if self.sharding == "zero" and self.dtype == "bfloat16":
            raise ValueError("dtype bfloat16 with sharding zero; set deepspeed.bf16 instead")
        return self


class ProjectionConfig(Section):
    """Linear-ReLU-Linear from a modality's raw width to D, one a modality."""

    hidden: int | None = Field(None, ge=1, description="Width of the hidden layer; None is D.")
    dropout: float = Field(0.0, ge=0, lt=1, description="On projected features.")
    structure: Literal["mlp", "identity"] = Field(
        "mlp", description="Whether the structure row passes the projection (paper: mlp) or skips it."
    )


class ExpertsConfig(Section):
    """Mixture of K experts inside each modality, no gate."""

    num_experts: int = Field(
        3, ge=1, description="K; equal for all modalities so that they run as one batched product (paper: number of modalities)."
    )
    width: int = Field(
        256, ge=2, multiple_of=2, description="D, width in real numbers; read as D / 2 complex numbers when scoring (paper: 256)."
    )
    kind: Literal["mlp", "identity"] = Field(
        "mlp", description="identity: the one view of a modality is its projection; with structure alone the model is plain RotatE."
    )
    residual: bool = Field(False, description="Expert k gives x + f_k(x) instead of f_k(x).")
    dropout: float = Field(0.0, ge=0, lt=1, description="On the experts' hidden layer.")
    recompute: bool = Field(
        False, description="Backward computes the hidden layers again instead of keeping them: less memory, more time, equal gradients."
    )


class MineConfig(Section):
    """Mutual information by Donsker-Varadhan statistics networks, one a pair."""

    hidden: int = Field(64, ge=1, description="Width of the statistics networks.")
    learning_rate: float = Field(1e-3, gt=0, description="Of the statistics networks; they ascend the bound on detached views.")
    ema: float = Field(0.95, ge=0, lt=1, description="Decay of the moving average of the estimates that the fusion uses.")
    bounded: bool = Field(
        True,
        description="Estimate on held-out entities, clip T and cap at log n. False: the paper's raw estimate from the rows it trained on.",
    )
    clip: float = Field(10.0, gt=0, description="With bounded: |T| is clipped to this inside the exponential (SMILE).")
    every: int = Field(1, ge=1, description="Estimate and train the networks at every n-th step.")
    rows: int = Field(0, ge=0, description="Use at most this many rows of a rank's batch for the estimate; 0 uses all.")
    precision: Precision = Field(
        "float32",
        description="Of what the networks' products multiply in training; sums and parameters stay float32. See train.precision.",
    )


class FusionConfig(Section):
    """Complementarity weights: intra-modal over experts, then inter-modal over modalities."""

    estimator: Literal["mine", "cosine", "uniform", "attention"] = Field(
        "mine", description="What the weights come from; the others are controls."
    )
    scope: Literal["global", "entity"] = Field(
        "global", description="One weight a pair for all entities, or the pointwise term of each entity."
    )
    weight_gradient: Literal["stop", "flow"] = Field(
        "stop", description="Whether the completion loss reaches the views through the weights."
    )
    temperature: float = Field(1.0, gt=0, description="Divides mutual information before the softmax.")
    normalize: bool = Field(True, description="Divide mutual information by log n before the softmax (paper: false).")


class RotateConfig(Section):
    """RotatE scores: gamma minus the distance."""

    gamma: float = Field(12.0, gt=0, description="Margin; a score is gamma minus the sum of complex moduli.")


class NegativesConfig(Section):
    """Negatives are drawn uniformly and shared by the queries of a chunk."""

    count: int = Field(128, ge=1, description="N, negatives of each query.")
    chunk_size: int = Field(128, ge=1, description="Queries that share one pool of N negatives.")
    weighting: Literal["entropy", "self_adversarial", "uniform", "entropy_adversarial"] = Field(
        "entropy", description="Weights of negatives in the loss (paper: entropy)."
    )
    easy_below: float = Field(0.2, ge=0, le=1, description="delta 1: binary entropy in bits under which a negative is Easy (paper: 0.2).")
    hard_from: float = Field(0.8, ge=0, le=1, description="delta 2: entropy in bits from which a negative is Hard (paper: 0.8).")
    weight_easy: float = Field(0.5, ge=0, description="lambda of Easy negatives.")
    weight_ambiguous: float = Field(1.0, ge=0, description="lambda of Ambiguous negatives.")
    weight_hard: float = Field(2.0, ge=0, description="lambda of Hard negatives.")
    temperature: float = Field(1.0, gt=0, description="alpha of self-adversarial weights.")

    @model_validator(mode="after")
    def _ordered(self) -> NegativesConfig:
        if self.easy_below > self.hard_from:
            raise ValueError(f"easy_below {self.easy_below} lies above hard_from {self.hard_from}; expected easy_below <= hard_from")
        return self


class TrainConfig(Section):
    """The loop."""

    loss: Literal["contrastive", "one_vs_all"] = Field(
        "contrastive", description="Weighted contrastive loss (paper), or softmax over all entities."
    )
    epochs: int = Field(1000, ge=1, description="Passes over all queries: each triple is two queries (paper: 1000).")
    batch_size: int = Field(1024, ge=1, description="Queries per step, over all ranks (paper: 1024).")
    learning_rate: float = Field(1e-3, gt=0, description="Of the dense parameters.")
    precision: Precision = Field(
        "float32",
        description="Of what products of projections and experts multiply in training; sums, parameters, distances and evaluation stay "
        "float32. bfloat16 is fast where the hardware has it (GPUs, CPUs with AMX or AVX512-BF16) and slow on other CPUs. bfloat16x3 "
        "multiplies numbers of 16 bits in three products of bfloat16: experts and statistics networks on CPUs with AMX, float32 elsewhere.",
    )
    cuda_graphs: bool = Field(False, description="Launch the loss's kernels together on a GPU, recorded once. Needs compile.")
    structure_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of a step's entities whose structure is hidden if they have another modality: new entities have none.",
    )
    gradient_clipping: float = Field(
        0.0, ge=0, description="Largest global gradient norm, of the dense part and the rows together; 0 is off."
    )
    seed: int = Field(0, ge=0, description="Seed of the weights, the batches and the negatives.")
    log_every: int = Field(50, ge=1, description="Steps between two lines of metrics.jsonl.")
    eval_every: int = Field(10, ge=1, description="Epochs between two evaluations on valid.")
    eval_queries: int = Field(0, ge=0, description="Evaluate on a fixed sample of so many valid queries while training; 0 takes all.")
    checkpoint_every: int = Field(10, ge=1, description="Epochs between two checkpoints.")
    checkpoint_steps: int = Field(0, ge=0, description="Steps between two checkpoints beside those; for long epochs. 0 never.")
    num_to_keep: int = Field(2, ge=2, description="Checkpoints kept besides the best one.")
    patience: int = Field(0, ge=0, description="Stop after so many evaluations without a better valid MRR; 0 never.")
    projector: int = Field(500, ge=0, le=4096, description="Entities that TensorBoard's projector shows when a run ends; 0 is none.")
    max_nonfinite: int = Field(
        10, ge=1, description="Consecutive steps with a non-finite loss or gradient before the run is called diverged."
    )


class DeepSpeedConfig(Section):
    """The engine of the dense part."""

    engine: Literal["auto", "deepspeed", "torch"] = Field(
        "auto", description="auto takes DeepSpeed where it is installed; torch is the plain twin."
    )
    stage: Literal[0, 1, 2, 3] = Field(1, description="ZeRO stage.")
    bf16: bool = Field(False, description="Dense parameters and activations in bfloat16, rows stay float32; stage 0 runs as 1 then.")
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Parts that a rank's share of train.batch_size is cut into; gradients add up, rows and weights move once."
    )
    offload_optimizer: Literal["none", "cpu"] = Field(
        "none", description="cpu: masters and moments of the dense part in host memory; needs stage 1, 2 or 3."
    )

    @model_validator(mode="after")
    def _offloads(self) -> DeepSpeedConfig:
        if self.offload_optimizer == "cpu" and self.stage == 0 and not self.bf16:
            raise ValueError("offload_optimizer cpu with stage 0; expected stage 1, 2 or 3")
        return self


class EvaluationConfig(Section):
    """Exact filtered ranking."""

    query_block: int = Field(256, ge=1, description="Queries scored at once.")
    tile_rows: int = Field(1024, ge=16, description="Entities scored at once; with query_block it bounds the memory.")
    encode_rows: int = Field(4096, ge=1, description="Entities fused at once.")
    vectors_mb: int = Field(
        512, ge=1, description="A rank whose fused vectors need more than this makes them piece by piece, twice, instead of keeping them."
    )


def _check_workers(value: Any) -> Any:
    numbers = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(numbers) != 2 or any(type(number) is not int for number in numbers) or not 1 <= numbers[0] <= numbers[1]:
        raise ValueError("expected a number of at least 1, or [MIN, MAX] with 1 <= MIN <= MAX")
    return value


class LaunchConfig(Section):
    """Who runs the workers."""

    mode: Literal["ray", "local"] = Field(
        "ray", description="Ray Train, or this one process (or torchrun) where Ray is absent or in the way."
    )
    workers: Annotated[int | tuple[int, int], BeforeValidator(_check_workers)] = Field(
        2, description="Ranks under Ray; [MIN, MAX] starts with what fits, goes on with fewer when nodes are lost and grows back."
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPUs (and torch threads) of a rank.")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of a rank.")
    max_failures: int = Field(3, ge=0, description="Restarts from the last checkpoint before the run gives up.")
    wait_s: float = Field(300, ge=0, description="On a cluster: seconds to wait until (MIN) workers fit, at the start and after a loss.")
    resize_s: float = Field(60, ge=0, description="With [MIN, MAX]: seconds before a run looks for room to grow; growing saves first.")
    grace_s: float = Field(300, gt=0, description="Under Ray, seconds from SIGTERM to the end of the run, whether it could save or not.")
    timeout_s: int = Field(600, ge=5, description="A collective that waits longer fails the rank.")

    @property
    def min_workers(self) -> int:
        """Fewest ranks."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """Most ranks."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class RunConfig(Section):
    """The run directory."""

    dir: str = Field(
        "runs/default", description="Where config.yaml, metrics, checkpoints and TensorBoard events go: a path or an fsspec URL."
    )
    resume: str = Field(
        "auto", pattern=r"^(auto|none|\d+)$", description="auto: from the newest valid checkpoint; STEP: from that one; none: start anew."
    )
    profile: int = Field(0, ge=0, description="Trace so many steps after the first five, to RUN_DIR/profile; 0 is off.")


class Config(Section):
    """All of it."""

    modalities: tuple[Modality, ...] | Literal["auto"] = Field(
        "auto", description="Modalities to fuse; auto is structure and all the data set has."
    )
    compile: Literal["auto", "on", "off"] = Field("auto", description="torch.compile of the hot path; auto where a compiler is found.")
    data: DataConfig = DataConfig()
    encoders: EncodersConfig = EncodersConfig()
    features: FeaturesConfig = FeaturesConfig()
    entities: EntitiesConfig = EntitiesConfig()
    projection: ProjectionConfig = ProjectionConfig()
    experts: ExpertsConfig = ExpertsConfig()
    mine: MineConfig = MineConfig()
    fusion: FusionConfig = FusionConfig()
    rotate: RotateConfig = RotateConfig()
    negatives: NegativesConfig = NegativesConfig()
    train: TrainConfig = TrainConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    launch: LaunchConfig = LaunchConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.modalities != "auto" and len(set(self.modalities)) != len(self.modalities):
            raise ValueError(f"modalities names one twice: {', '.join(self.modalities)}")
        if self.modalities == ():
            raise ValueError("modalities is empty; expected at least one of " + ", ".join(MODALITIES))
        if self.experts.kind == "identity" and self.experts.num_experts != 1:
            raise ValueError(f"experts.num_experts is {self.experts.num_experts}, but views of kind identity would be equal; set it to 1")
        if self.deepspeed.bf16 and {self.train.precision, self.mine.precision} != {"float32"}:
            raise ValueError(
                "deepspeed.bf16 makes parameters bfloat16, train.precision and mine.precision keep them float32; set one or the other"
            )
        if self.train.batch_size % self.negatives.chunk_size:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} is not a multiple of negatives.chunk_size {self.negatives.chunk_size}; "
                "chunks are the unit that ranks share"
            )
        return self
