"""Writes a planted graph as a raw folder, a piece at a time."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np

from mocme_dist.data.files import atomic_path
from tools.synthetic.planted import SPLITS, Integers, Modality, Planted
from tools.synthetic.truth import write_truth

BLOCK = 1 << 16


def entity_names(entity: Integers) -> np.ndarray:
    """Arrow strings e0, e1, ..."""
    return _names("e", entity)


def _names(letter: str, number: Integers) -> np.ndarray:
    import pyarrow
    import pyarrow.compute

    return pyarrow.compute.binary_join_element_wise(
        letter, pyarrow.compute.cast(pyarrow.array(number), pyarrow.string()), ""
    )


def write_raw(folder: Path, graph: Planted) -> None:
    """train.txt, valid.txt, test.txt, features/MODALITY.npy with MODALITY.ids, and truth/."""
    import pyarrow
    import pyarrow.csv

    folder.mkdir(parents=True, exist_ok=True)
    schema = pyarrow.schema([(name, pyarrow.string()) for name in ("head", "relation", "tail")])
    plain = pyarrow.csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    with ExitStack() as stack:
        paths = [stack.enter_context(atomic_path(folder / f"{split}.txt")) for split in SPLITS]
        writers = [stack.enter_context(pyarrow.csv.CSVWriter(path, schema, write_options=plain)) for path in paths]
        for triples_T3, split in graph.chunks():
            for number, writer in enumerate(writers):
                head, relation, tail = triples_T3[split == number].T
                writer.write_table(
                    pyarrow.table([entity_names(head), _names("r", relation), entity_names(tail)], schema=schema)
                )
    for modality in graph.modalities:
        _write_features(folder / "features", graph, modality)
    write_truth(folder / "truth", graph, np.arange(graph.num_entities))


def _write_features(folder: Path, graph: Planted, modality: Modality) -> None:
    """Vectors of those who have the modality, and their names beside them, one a line."""
    count = sum(int(graph.present(modality, entity).sum()) for entity in _blocks(graph.num_entities))
    with (
        atomic_path(folder / f"{modality.name}.npy") as values,
        atomic_path(folder / f"{modality.name}.ids") as ids,
        values.open("wb") as value_file,
        ids.open("w", encoding="utf8") as id_file,
    ):
        header = {"descr": "<f2", "fortran_order": False, "shape": (count, modality.width)}
        np.lib.format.write_array_header_1_0(value_file, header)
        for block, entity in enumerate(_blocks(graph.num_entities)):
            entity = entity[graph.present(modality, entity)]
            value_file.write(np.ascontiguousarray(graph.features(modality, entity, block)).tobytes())
            id_file.writelines(f"e{number}\n" for number in entity.tolist())


def _blocks(count: int) -> list[Integers]:
    return [np.arange(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
