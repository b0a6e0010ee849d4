"""Schemas of manifests: types, ranges, and names that stay inside their folder.

A manifest may come from a stranger, so it is checked before any file that it names is opened. `checked` reports the
first mistake in one line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mocme_dist.errors import DataError, MocmeError

# Without separators and a leading dot a name cannot lead out of its folder, and is not a temporary or hidden file.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,199}$")]
ModalityName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**62)]
Size = Annotated[int, Field(ge=1, le=2**62)]

Model = TypeVar("Model", bound=BaseModel)


class Manifest(BaseModel):
    """Base class: types are not converted; unknown keys are accepted, because later versions may add some."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)


class FileEntry(Manifest):
    """Size and hash of a file."""

    bytes: Count
    sha256: Sha256


class ShardManifest(FileEntry):
    """A shard of a data set."""

    model_config = ConfigDict(extra="forbid")

    name: FileName
    samples: Count


class SplitSizes(Manifest):
    """Triples in each split."""

    train: Count
    valid: Count
    test: Count


class VectorFacts(Manifest):
    """Vectors computed elsewhere: the file they came from, its hash and their width."""

    file: str
    sha256: Sha256
    width: Size


class ModalityFacts(Manifest):
    """A modality of a data set; which optional key it has depends on the modality."""

    entities: Count
    columns: list[str] = Field(default_factory=list)
    attributes: Count = 0
    files: Count = 0
    vectors: VectorFacts | None = None


class ShareFacts(Manifest):
    """A number of triples or entities, and of how many."""

    of: Count
    triples: Count = 0
    entities: Count = 0
    relations: Count = 0


class UnseenFacts(Manifest):
    """Triples whose entities or relations are not in train."""

    rule: str
    valid: ShareFacts
    test: ShareFacts


class FileCount(Manifest):
    """A number of files."""

    files: Count


class VectorCounts(Manifest):
    """A file of vectors computed elsewhere, and what became of its rows."""

    file: str
    rows: Count
    named_by: str
    outside_graph: Count
    all_zero: Count
    instead_of: str | None = None


class TwinGroups(Manifest):
    """Names that look the same."""

    groups: Count


class TwinFacts(Manifest):
    """Names that look the same, of entities and of relations."""

    rule: str
    entities: TwinGroups
    relations: TwinGroups


class PackReport(Manifest):
    """Findings of packing that the commands show."""

    duplicates: dict[str, Count]
    self_loops: dict[str, Count]
    leakage: dict[str, ShareFacts]
    missing: ShareFacts
    unseen: UnseenFacts
    ignored_rows: dict[str, Count]
    cleaned: dict[str, Count]
    undecodable: dict[str, FileCount] = Field(default_factory=dict)
    vectors: dict[str, VectorCounts] = Field(default_factory=dict)
    twins: TwinFacts | None = None
    development_set: dict[str, Count] | None = None


class PackSource(Manifest):
    """Source of a data set: hash and settings."""

    sha256: str
    settings: dict[str, Any]
    media: str | None = None


class DatasetManifest(Manifest):
    """manifest.json of a packed data set."""

    format: Literal[1]
    num_entities: Annotated[int, Field(ge=1, le=2**62)]
    num_relations: Annotated[int, Field(ge=1, le=2**62)]
    shard_rows: Annotated[int, Field(ge=1, le=2**62)]
    seed: int
    dev: str
    splits: SplitSizes
    modalities: dict[ModalityName, ModalityFacts]
    shards: list[ShardManifest]
    report: dict[str, Any]
    source: PackSource | None = None
    fingerprint: Sha256
    graph: dict[FileName, FileEntry] = Field(
        default_factory=dict, description="Files of graph/; empty in data sets of earlier versions."
    )


class PartRecord(FileEntry):
    """part-N.json of features/MODALITY."""

    shard: Count
    rows: Count
    present: Count
    input_sha256: str
    encoder_hash: str
    failed: dict[str, Count]
    examples: list[dict[str, Any]]
    width: Count = 0
    present_bits: str = ""
    bad_shard: str = ""
    constant_bits: str = ""
    constant_values: str = ""


class AttributeRecord(Manifest):
    """Statistics of one numeric attribute."""

    name: str
    count: Count
    log: bool
    centre: float
    scale: float
    low: float
    high: float


class NumericRecord(Manifest):
    """features/numeric/statistics.json."""

    attributes: list[AttributeRecord]
    left_out: Count


class FeaturesManifest(Manifest):
    """features/MODALITY/manifest.json."""

    format: Literal[1]
    width: Count
    encoder_hash: str
    num_rows: Size
    shard_rows: Size
    dtype: Literal["float16", "float32"] | None = None
    present: Count = 0
    encoder: dict[str, Any] = Field(default_factory=dict)
    failed: dict[str, Count] = Field(default_factory=dict)
    skipped_shards: list[Count] = Field(default_factory=list)


def checked(model: type[Model], value: Any, path: Path, advice: str, kind: type[MocmeError] = DataError) -> Model:
    """Return `value`, read from the manifest at `path`, as a `model`.

    Raises:
        kind: the message has the first wrong key, what was expected and found, and `advice`.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise kind(f"{path.absolute()}: {_first(error)}; {advice}") from None


def _first(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_context=False)
    missing = [".".join(map(str, each["loc"])) for each in found if each["type"] == "missing"]
    if missing:
        return f"lacks {', '.join(missing)}"
    where = ".".join(map(str, found[0]["loc"])) or "the whole"
    return f"{where}: {found[0]['msg'].removeprefix('Value error, ')}, found {repr(found[0]['input'])[:80]}"
