"""Card of a bundle in Markdown: what it is, data, licences, metrics with their protocol, limits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_METRICS = ("mrr", "hits@1", "hits@3", "hits@10", "mr")
_SIDES = {
    "both directions": (),
    "heads": ("head",),
    "tails": ("tail",),
    "model without evidence": ("model",),
    "without frequency": ("without_frequency",),
}
_CURVES: dict[str, dict[str, str] | str] = {
    "Loss": {"train/loss": "loss"},
    "MRR on valid, the model alone": {"valid/mrr": "both", "valid/head_mrr": "heads", "valid/tail_mrr": "tails"},
    "Weights of the modalities": "fusion/modality/",
    "Classes of negatives": "entropy/",
}
_POINTS = 120


def learning_curves(path: Path) -> dict[str, dict[str, list[list[float]]]]:
    """Return curves of a run's metrics.jsonl: by title and name, [step, value] of at most 120 points.

    Empty without the file.
    """
    series: dict[str, list[list[float]]] = {}
    lines = path.read_text(encoding="utf8").splitlines() if path.is_file() else []
    for line in lines:
        values = json.loads(line)
        for key, value in values.items():
            if isinstance(value, int | float):
                series.setdefault(key, []).append([values["step"], round(value, 5)])
    found: dict[str, dict[str, list[list[float]]]] = {}
    for title, wanted in _CURVES.items():
        names = (
            {key: key.removeprefix(wanted) for key in series if key.startswith(wanted)}
            if isinstance(wanted, str)
            else wanted
        )
        curves = {name: _thinned(series[key]) for key, name in names.items() if len(series.get(key, [])) > 1}
        if curves:
            found[title] = curves
    return found


def _thinned(points: list[list[float]]) -> list[list[float]]:
    """Return at most 120 points, the last one among them."""
    every = -(-len(points) // _POINTS)
    return points[::-1][::every][::-1]


def card(manifest: Mapping[str, Any], dataset: Mapping[str, Any]) -> str:
    """Return the card of a bundle.

    Args:
        manifest: the bundle's manifest.
        dataset: the data set's manifest.
    """
    config = manifest["config"]
    data = config["data"]
    name = data.get("title") or "a knowledge graph"
    parts = [
        f"# Link prediction on {name}",
        _what(manifest),
        "## Data",
        _data(manifest, dataset),
        "## Licences",
        _licences(manifest),
        "## Metrics",
        _metrics(manifest),
        "## Limits",
        _limits(manifest),
    ]
    return "\n\n".join(parts) + "\n"


def _what(manifest: Mapping[str, Any]) -> str:
    answers = "MoCME (mixture of experts per modality, RotatE score)"
    if manifest["evidence"]:
        spaces = ", ".join([*manifest["evidence"]["spaces"], "shared facts"])
        answers += f", blended with evidence of neighbours ({spaces}) by weights fitted on the development set"
    trained = manifest["trained"]
    return (
        f"A bundle of mocme_dist {manifest['mocme_dist']}: it completes facts (head, relation, ?) and (?, relation,"
        " tail) of the graph it was trained on, and takes entities that the graph does not have, described by their"
        f" features.\n\n- answers by: {answers}\n- modalities: {', '.join(manifest['modalities'])}\n- width:"
        f" {manifest['width']}, {manifest['config']['experts']['num_experts']} experts per modality\n- checkpoint: step"
        f" {trained['step']:,}, seed {manifest['config']['train']['seed']}"
    )


def _data(manifest: Mapping[str, Any], dataset: Mapping[str, Any]) -> str:
    data, splits = manifest["config"]["data"], dataset["splits"]
    lines = [
        f"- source: {data.get('source') or 'not stated (data.source)'}",
        f"- {manifest['num_entities']:,} entities, {manifest['num_relations']:,} relations",
        (
            f"- facts: {splits['train']:,} train, {splits['valid']:,} valid, {splits['test']:,} test; "
            f"fingerprint {dataset['fingerprint'][:16]}"
        ),
    ]
    for modality, found in dataset["modalities"].items():
        lines.append(f"- {modality}: {found['entities']:,} entities")
    leaked = dataset["report"].get("leakage", {}).get("test_inverse_pairs_in_train")
    if leaked and leaked["of"]:
        lines.append(
            f"- leakage: {leaked['triples']:,} of {leaked['of']:,} test facts have their entities linked the other way "
            "round in train"
        )
    return "\n".join(lines)


def _licences(manifest: Mapping[str, Any]) -> str:
    data = manifest["config"]["data"]
    lines = [
        f"- data: {data.get('license') or 'not stated (data.license)'}",
        "- this bundle: derived from the data; its licence follows from theirs",
    ]
    for modality in manifest["features"]:
        imported = manifest["features"][modality].get("imported")
        encoder = manifest["config"]["encoders"].get(modality, {}).get("model")
        if imported or encoder:
            lines.append(f"- {modality} features: {imported or encoder}, under the licence of its authors")
    return "\n".join(lines)


def _metrics(manifest: Mapping[str, Any]) -> str:
    metrics = manifest["metrics"]
    if not metrics:
        return "Not evaluated: the run has no report of this checkpoint."
    rows = ["| test | MRR | Hits@1 | Hits@3 | Hits@10 | mean rank |", "| --- | --- | --- | --- | --- | --- |"]
    for side, path in _SIDES.items():
        values = metrics
        for key in path:
            values = values.get(key) or {}
        if "mrr" in values:
            cells = [f"{values[name]:.1f}" if name == "mr" else f"{values[name]:.4f}" for name in _METRICS]
            rows.append(f"| {side} | " + " | ".join(cells) + " |")
    lines = [
        "\n".join(rows),
        (
            f"Protocol: {metrics['num_queries']:,} queries, two per test fact; every entity is a candidate; answers"
            " known from any split are filtered; ties take their mean rank; the checkpoint and the blend were selected"
            " on the development set, and the test set was read once."
        ),
    ]
    reliability = (manifest["calibration"] or {}).get("reliability")
    if reliability:
        lines.append(
            f"Probabilities: expected calibration error {reliability['ece']:.4f} over"
            f" {manifest['calibration']['candidates']} answers per question, {reliability['ece_top_10']:.4f} over ten"
            f" ({reliability['protocol']}, development set)."
        )
    return "\n\n".join(lines)


def _limits(manifest: Mapping[str, Any]) -> str:
    lines = [
        "- Answers are entities of the graph; what lies outside it is never proposed.",
        (
            "- A high probability is not a proof. Facts that are true but missing from the data count as wrong in the"
            " fit, so probabilities are rather too low than too high."
        ),
        "- Errors and biases of the data and of the encoders appear in the answers.",
    ]
    if len(manifest["modalities"]) == 1:
        lines.append("- The model knows no modality but the structure, so it cannot answer about unseen entities.")
    else:
        lines.append(
            "- About unseen entities the model knows only their features; expect lower quality than in the table."
        )
    return "\n".join(lines)
