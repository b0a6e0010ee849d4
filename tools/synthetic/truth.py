"""What the planted graph lets anybody reach: the MRR of ranking by the truth, and the latent factors themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mocme_dist.data.files import atomic_path, write_json
from tools.synthetic.planted import Integers, Planted


def achievable_mrr(graph: Planted, sample: int = 1000) -> dict[str, Any]:
    """Filtered MRR of who knows every group and popularity, on a sample of test triples in both directions.

    The right answer to a query lies in one group; inside it nothing but popularity tells entities apart, so ranking by
    it is the best there is. Known answers of any split do not compete, as in evaluation.
    """
    tests: list[Integers] = []
    for triples_T3, split in graph.chunks():
        tests.append(triples_T3[split == 2])
        if sum(map(len, tests)) >= sample:
            break
    test_T3 = np.unique(np.concatenate(tests)[:sample], axis=0)
    found: dict[str, Any] = {"test_triples": len(test_T3)}
    for name, (source, target) in {"tail": (0, 2), "head": (2, 0)}.items():
        query = test_T3[:, source] * graph.num_relations + test_T3[:, 1]
        ranks = _ranks(query, test_T3[:, target], _known(graph, np.unique(query), source, target), graph.num_groups)
        found[name] = float((1 / ranks).mean())
    return {**found, "mrr": (found["tail"] + found["head"]) / 2}


def _known(graph: Planted, wanted: Integers, source: int, target: int) -> Integers:
    """(n, 2) distinct (query, answer) of the wanted queries, over all splits."""
    found = []
    for triples_T3, _ in graph.chunks():
        query = triples_T3[:, source] * graph.num_relations + triples_T3[:, 1]
        place = np.minimum(np.searchsorted(wanted, query), len(wanted) - 1)
        hit = wanted[place] == query
        found.append(np.stack([query[hit], triples_T3[hit, target]], 1))
    return np.unique(np.concatenate(found), axis=0)


def _ranks(query: Integers, answer: Integers, known: Integers, num_groups: int) -> Integers:
    """1 + how many members of the answer's group are more popular and not themselves known answers."""
    ranks = answer // num_groups + 1
    low, high = np.searchsorted(known[:, 0], query), np.searchsorted(known[:, 0], query, side="right")
    for i in range(len(query)):
        others = known[low[i] : high[i], 1]
        # Known answers of a query are all of one group; a smaller number is more popular.
        ranks[i] -= int((others < answer[i]).sum())
    return ranks


def write_truth(folder: Path, graph: Planted, entity_of_row: Integers) -> dict[str, Any]:
    """truth.json (what is achievable, and how the graph was made) and factors.npy (n, 2) of the entities, in order."""
    with atomic_path(folder / "factors.npy") as temporary, temporary.open("wb") as file:
        np.save(file, graph.codes(entity_of_row).astype(np.int16), allow_pickle=False)
    truth = {
        "achievable": achievable_mrr(graph),
        "entities": graph.num_entities,
        "lines": graph.num_triples,
        "relations": graph.num_relations,
        "factors": list(graph.factors),
        "exponent": graph.exponent,
        "seed": graph.seed,
        "shifts": graph.shifts_R2.tolist(),
        "modalities": {
            m.name: {"shows": "noise" if m.factor is None else f"factor {m.factor}", "share": m.share}
            for m in graph.modalities
        },
    }
    write_json(folder / "truth.json", truth)
    return truth
