"""Settings of ranking, of the evidence of neighbours, and of its blend with the model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mocme_dist.config.section import Section

SpaceName = Literal["text", "image", "audio", "video", "numeric", "coordinates", "model", "facts"]


class EvaluationConfig(Section):
    """Exact filtered ranking."""

    query_block: int = Field(256, ge=1, le=2**24, description="Queries scored at a time.")
    tile_rows: int = Field(
        1024, ge=16, le=2**24, description="Entities scored at a time; with query_block it bounds the memory."
    )
    encode_rows: int = Field(4096, ge=1, le=2**24, description="Entities fused at a time.")
    vectors_mb: int = Field(
        512,
        ge=1,
        le=2**24,
        description="Largest size of a rank's fused vectors that is kept in memory (MiB); larger ones are computed "
        "tile by tile, twice.",
    )


class EvidenceConfig(Section):
    """Evidence from similar entities and from known answers; it uses train and frozen features alone."""

    spaces: tuple[SpaceName, ...] | Literal["auto", "all"] = Field(
        "auto",
        description="Spaces in which neighbours are searched: the features of a modality, coordinates (two numbers "
        "named latitude and longitude), the model's vectors, shared facts. auto takes those of the fused modalities, "
        "or none if that would take more than max_minutes; all and lists also take modalities of the data set that are "
        "not fused; [] ranks by the model alone.",
    )
    neighbours: int = Field(20, ge=1, le=100_000, description="Nearest entities with the relation that vote.")
    beta: float = Field(15.0, ge=0, le=1e6, description="Votes are weighted by exp(beta cosine).")
    beta_coordinates: float = Field(
        400.0, ge=0, le=1e9, description="The same for points on the sphere: 400 corresponds to some 300 km."
    )
    max_holders: int = Field(
        2000,
        ge=1,
        le=2**31 - 1,
        description="Facts shared by more entities are not columns of the space of shared facts.",
    )
    max_answers: int = Field(
        32,
        ge=1,
        le=2**20,
        description="Known answers of a query that shared facts are compared with; the first by id.",
    )
    max_minutes: float = Field(
        30.0,
        gt=0,
        le=1e6,
        description="Longest estimated time of the search for valid and test with which auto uses evidence: the search "
        "is exact, and its time grows with queries times entities.",
    )


class BlendConfig(Section):
    """Weights of the model and of the evidence per relation and direction, fitted on valid after training."""

    frequency: bool = Field(
        True,
        description="Use the frequency of an entity as an answer of a relation in train as a term. The report also has "
        "the figures without it: benchmark splits reward it more than use does.",
    )
    queries: int = Field(
        10_000, ge=2, le=2**31 - 1, description="Largest number of held-out queries for the fit; a fixed sample."
    )
    steps: int = Field(250, ge=1, le=10**7, description="Steps of Adam.")
    batch_queries: int = Field(512, ge=1, le=2**24, description="Queries per step.")
    learning_rate: float = Field(
        0.1, gt=0, le=1e30, description="Learning rate of the weights, each in units of its term's spread."
    )
    tau_first: float = Field(
        1.5, gt=0, le=1e9, description="Width of a rank's smoothed steps at the first step of the fit."
    )
    tau_last: float = Field(0.3, gt=0, le=1e9, description="The same at the last step.")
    penalty: float = Field(
        0.5, ge=0, le=1e9, description="Penalty on the squares of a relation's own weights, over the number of queries."
    )
    prune_below: float = Field(
        0.05,
        ge=0,
        le=1,
        description="A term with less than this share of the largest weight at a relation and direction is dropped "
        "there, late in the fit: it costs time and adds little.",
    )
