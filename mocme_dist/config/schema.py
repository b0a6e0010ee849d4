"""Every setting with its default, its range and a sentence on what it does.

Defaults are defined here, in `config.encoders`, `config.evaluation`, `config.model` and `config.train`, and nowhere
else; a file in configs/ holds differences only. They are the values that measured best; where the paper has another
value the description gives it, and configs/paper.yaml is the paper's form as a whole. Code takes the section it needs.
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
from mocme_dist.config.evaluation import BlendConfig, EvaluationConfig, EvidenceConfig
from mocme_dist.config.model import (
    ExpertsConfig,
    FusionConfig,
    MineConfig,
    ProjectionConfig,
    RelationsConfig,
    RotateConfig,
)
from mocme_dist.config.section import Section
from mocme_dist.config.train import TrainConfig

__all__ = [
    "AudioEncoderConfig",
    "BlendConfig",
    "EncodersConfig",
    "EvaluationConfig",
    "EvidenceConfig",
    "ImageEncoderConfig",
    "NumericEncoderConfig",
    "TextEncoderConfig",
    "TrainConfig",
    "VideoEncoderConfig",
]

MODALITIES = ("structure", "text", "image", "numeric", "audio", "video")
Modality = Literal["structure", "text", "image", "numeric", "audio", "video"]


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


def _split_names(value: Any) -> Any:
    """A list of names from text, as `--set modalities=structure,text` gives it."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) and value != "auto" else value


class DataConfig(Section):
    """Location of the graph, and how strictly it is read."""

    raw: str | None = Field(None, description="Raw folder; train packs it and extracts features as needed.")
    dataset: str | None = Field(
        None, description="Directory of the packed data set; with data.raw the default is RUN_DIR/dataset."
    )
    shard_rows: int = Field(4096, ge=1, le=2**24, description="Entities per WebDataset shard.")
    seed: int = Field(
        0, ge=0, le=2**63 - 1, description="Seed of the permutation that gives entities their ids, and of the dev cut."
    )
    dev: Annotated[str, AfterValidator(_check_dev)] = Field(
        "file",
        description="Development set: 'file' is valid.txt; 'cut:F' holds out the share F of train instead (for valid "
        "files with leakage).",
    )
    text_columns: Annotated[tuple[str, ...] | None, BeforeValidator(_split_names)] = Field(
        None,
        min_length=1,
        description="Columns of text.tsv that form an entity's text, in this order; None takes all of them, label "
        "first.",
    )
    label_column: str | None = Field(
        None,
        min_length=1,
        description="Column of text.tsv that holds the labels people read; unset takes the first one that is named "
        "label, name or title. A column aliases (separated by |) is read as well, and relations.tsv for relations.",
    )
    unseen: Literal["error", "skip", "keep"] = Field(
        "error",
        description="What to do with valid and test triples whose entity or relation is not in train: stop, leave them "
        "out, or rank them.",
    )
    title: str | None = Field(None, description="Name of the graph, for the card of a bundle.")
    source: str | None = Field(None, description="Where the data came from, for the card of a bundle.")
    license: str | None = Field(None, description="Licence of the data, for the card of a bundle.")
    allow_leakage: bool = Field(False, description="Accept test triples that are in train, too.")
    twins: Literal["report", "join"] = Field(
        "report",
        description="Entity names that differ in Unicode form or in invisible characters alone: pack reports them, or "
        "makes one entity of them.",
    )
    max_missing: float = Field(1.0, ge=0, le=1, description="Largest accepted share of entities without any modality.")


class FeaturesConfig(Section):
    """How a rank holds the features of its entities during training."""

    residency: Literal["host", "device", "mmap"] = Field(
        "host", description="Features in host memory, in device memory, or memory-mapped from disk."
    )
    on_bad: Literal["error", "mask"] = Field(
        "error",
        description="What stored values that are not finite do: error stops the run; mask makes their entities absent, "
        "with a warning.",
    )


class EntitiesConfig(Section):
    """The table of structural embeddings."""

    sharding: Literal["rows", "zero"] = Field(
        "rows",
        description="rows: each rank holds a range of rows outside the engine, and a step updates the rows it touched. "
        "zero: an ordinary parameter of the engine under deepspeed.stage with its Adam; every step updates all rows "
        "(for small graphs, and as a control).",
    )
    optimizer: Literal["auto", "adam", "adagrad"] = Field(
        "auto",
        description="Row-wise optimizer on touched rows: adam keeps two moments of D numbers per row, adagrad one "
        "number; auto is adam up to 1,000,000 entities and adagrad above.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type of the rows; bfloat16 halves the table and rounds updates stochastically, so that small ones "
        "count on average.",
    )
    learning_rate: float | None = Field(
        0.05, gt=0, le=1e30, description="Learning rate of the rows; None takes train.learning_rate."
    )
    init_range: float = Field(
        1.0,
        gt=0,
        le=1e6,
        description="Rows start uniform in [-r, r]; fused vectors are scaled by RotatE's (gamma + 2) / D.",
    )
    row_weight_decay: float = Field(
        0.0, ge=0, le=1e6, description="L2 penalty on touched rows, added to their gradient."
    )

    @model_validator(mode="after")
    def _in_engine(self) -> EntitiesConfig:
        if self.sharding == "zero" and self.optimizer == "adagrad":
            raise ValueError("optimizer adagrad with sharding zero; expected auto or adam")
        if self.sharding == "zero" and self.dtype == "bfloat16":
            raise ValueError("dtype bfloat16 with sharding zero; set deepspeed.bf16 instead")
        return self


class NegativesConfig(Section):
    """Negatives, drawn uniformly and shared by the queries of a chunk."""

    count: int = Field(128, ge=1, le=2**24, description="N, negatives per query.")
    chunk_size: int = Field(128, ge=1, le=2**24, description="Queries that share one pool of N negatives.")
    weighting: Literal["entropy", "self_adversarial", "uniform", "entropy_adversarial"] = Field(
        "entropy_adversarial", description="Weights of negatives in the loss (paper: entropy)."
    )
    easy_below: float = Field(
        0.2, ge=0, le=1, description="delta 1: binary entropy in bits below which a negative is Easy (paper: 0.2)."
    )
    hard_from: float = Field(
        0.8, ge=0, le=1, description="delta 2: entropy in bits from which a negative is Hard (paper: 0.8)."
    )
    weight_easy: float = Field(0.5, ge=0, le=1e6, description="lambda of Easy negatives.")
    weight_ambiguous: float = Field(1.0, ge=0, le=1e6, description="lambda of Ambiguous negatives.")
    weight_hard: float = Field(2.0, ge=0, le=1e6, description="lambda of Hard negatives.")
    temperature: float = Field(1.0, gt=0, le=1e6, description="alpha of self-adversarial weights.")

    @model_validator(mode="after")
    def _ordered(self) -> NegativesConfig:
        if self.easy_below > self.hard_from:
            raise ValueError(
                f"easy_below {self.easy_below} is above hard_from {self.hard_from}; expected easy_below <= hard_from"
            )
        if not self.weight_easy < self.weight_ambiguous < self.weight_hard:
            raise ValueError(
                f"weight_easy {self.weight_easy}, weight_ambiguous {self.weight_ambiguous} and weight_hard "
                f"{self.weight_hard} do not increase; expected weight_easy < weight_ambiguous < weight_hard (weighting "
                "uniform ignores them)"
            )
        return self


class DeepSpeedConfig(Section):
    """The engine of the dense parameters."""

    engine: Literal["auto", "deepspeed", "torch"] = Field(
        "auto",
        description="auto takes DeepSpeed if it is installed, except for one rank on a GPU, which has nothing to share "
        "and whose step is then recorded; torch is the plain implementation.",
    )
    stage: Literal[0, 1, 2, 3] = Field(1, description="ZeRO stage.")
    bf16: bool = Field(
        False,
        description="Dense parameters and activations in bfloat16; rows stay float32. Stage 0 then runs as stage 1.",
    )
    gradient_accumulation_steps: int = Field(
        1,
        ge=1,
        le=2**20,
        description="Micro-batches per step: a rank's share of train.batch_size is cut into as many, whose gradients "
        "add up.",
    )
    offload_optimizer: Literal["none", "cpu"] = Field(
        "none",
        description="cpu: master weights and moments of the dense parameters in host memory; needs stage 1, 2 or 3.",
    )

    @model_validator(mode="after")
    def _offloads(self) -> DeepSpeedConfig:
        if self.offload_optimizer == "cpu" and self.stage == 0 and not self.bf16:
            raise ValueError("offload_optimizer cpu with stage 0; expected stage 1, 2 or 3")
        return self


def _check_workers(value: Any) -> Any:
    numbers = list(value) if isinstance(value, list | tuple) else [value, value]
    if (
        len(numbers) != 2
        or any(type(number) is not int for number in numbers)
        or not 1 <= numbers[0] <= numbers[1] <= 65_536
    ):
        raise ValueError("expected a number from 1 to 65536, or [MIN, MAX] with 1 <= MIN <= MAX <= 65536")
    return value


def _check_gpus(value: Any) -> Any:
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 64):
        raise ValueError("expected auto or a number from 0 to 64")
    return value


class LaunchConfig(Section):
    """How and where the ranks run."""

    mode: Literal["ray", "local"] = Field(
        "ray", description="ray: Ray Train; local: this one process, or the processes of torchrun."
    )
    workers: Annotated[int | tuple[int, int], BeforeValidator(_check_workers)] = Field(
        2,
        description="Ranks under Ray; [MIN, MAX] starts with as many as fit, continues with fewer when nodes are lost, "
        "and grows again.",
    )
    cpus_per_worker: float = Field(1, gt=0, le=4096, description="CPUs (and torch threads) per rank.")
    gpus_per_worker: Annotated[float | Literal["auto"], BeforeValidator(_check_gpus)] = Field(
        "auto",
        description="GPUs per rank: auto is one if the cluster has one for each of (MIN) workers, else none; 0 is the "
        "CPU.",
    )
    max_failures: int = Field(3, ge=0, le=10**6, description="Restarts from the last checkpoint before the run fails.")
    wait_s: float = Field(
        300,
        ge=0,
        le=1e8,
        description="On a cluster: seconds to wait until (MIN) workers fit, at the start and after a loss.",
    )
    resize_s: float = Field(
        60,
        ge=0,
        le=1e8,
        description="With [MIN, MAX]: seconds between two attempts to grow; a checkpoint is saved first.",
    )
    grace_s: float = Field(
        300,
        gt=0,
        le=1e8,
        description="Under Ray, seconds from SIGTERM to the end of the run, whether or not it could save.",
    )
    timeout_s: int = Field(600, ge=5, le=10**7, description="Seconds after which a waiting collective fails its rank.")

    @property
    def gpus(self) -> float:
        """Return the GPUs per rank; 0 while auto has not been decided (see `runs.gpus`)."""
        return 0.0 if self.gpus_per_worker == "auto" else self.gpus_per_worker

    @property
    def min_workers(self) -> int:
        """Return the smallest number of ranks."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """Return the largest number of ranks."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


def _check_resume(value: str) -> str:
    if value not in ("auto", "none") and not value.isdecimal():
        raise ValueError("expected auto, none, or the step of a checkpoint as in 4000")
    return value


class RunConfig(Section):
    """The run directory."""

    dir: str = Field(
        "runs/default",
        description="Directory of config.yaml, metrics, checkpoints and TensorBoard events: a path or an fsspec URL.",
    )
    resume: Annotated[str, AfterValidator(_check_resume)] = Field(
        "auto",
        description="Checkpoint to start from. auto: the newest valid one, if any; STEP: that one; none: start anew.",
    )
    profile: int = Field(
        0, ge=0, le=10**6, description="Steps traced to RUN_DIR/profile, after the first five; 0 is off."
    )


class Config(Section):
    """The whole configuration."""

    modalities: Annotated[tuple[Modality, ...] | Literal["auto"], BeforeValidator(_split_names)] = Field(
        "auto",
        description="Modalities to fuse, a list or comma-separated names; auto is structure and all that the data set "
        "has.",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="torch.compile of the hot path; auto uses it if a compiler is found."
    )
    data: DataConfig = DataConfig()
    encoders: EncodersConfig = EncodersConfig()
    features: FeaturesConfig = FeaturesConfig()
    entities: EntitiesConfig = EntitiesConfig()
    projection: ProjectionConfig = ProjectionConfig()
    experts: ExpertsConfig = ExpertsConfig()
    mine: MineConfig = MineConfig()
    fusion: FusionConfig = FusionConfig()
    rotate: RotateConfig = RotateConfig()
    relations: RelationsConfig = RelationsConfig()
    negatives: NegativesConfig = NegativesConfig()
    train: TrainConfig = TrainConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    evidence: EvidenceConfig = EvidenceConfig()
    blend: BlendConfig = BlendConfig()
    launch: LaunchConfig = LaunchConfig()
    run: RunConfig = RunConfig()

    @property
    def num_negatives(self) -> int:
        """Return N, the negatives per query; 0 if the loss compares all entities."""
        return 0 if self.train.loss == "one_vs_all" else self.negatives.count

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.modalities != "auto" and len(set(self.modalities)) != len(self.modalities):
            raise ValueError(f"modalities names one twice: {', '.join(self.modalities)}")
        if self.modalities == ():
            raise ValueError("modalities is empty; expected at least one of " + ", ".join(MODALITIES))
        if self.experts.kind == "identity" and self.experts.num_experts not in (1, "auto"):
            raise ValueError(
                f"experts.num_experts is {self.experts.num_experts}, but views of kind identity would be equal; set it "
                "to 1"
            )
        if self.deepspeed.bf16 and self.train.precision != "float32":
            raise ValueError(
                "deepspeed.bf16 makes parameters bfloat16, train.precision keeps them float32; set one or the other"
            )
        if self.train.batch_size % self.negatives.chunk_size:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} is not a multiple of negatives.chunk_size "
                f"{self.negatives.chunk_size}; chunks are the unit that ranks share"
            )
        return self
