"""The six studies: their questions, and the arms that answer them as settings on top of one base configuration.

Every arm differs from the base in what its name says and in nothing else. Arms that claim anything about mutual
information need three modalities and three experts at least: with two of either, both weights are one half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

SHARES = (0.25, 0.5, 0.75, 1.0)


class Arm(NamedTuple):
    """One arm.

    Attributes:
        name: as the table shows it.
        settings: `KEY.PATH=VALUE` on top of the base.
        dataset: "" for the graph itself, "noise" for the graph with a modality of random numbers, "MODALITY:SHARE" for
            the graph without a modality for a share of the entities.
        hidden: what is hidden at test, see `Trial.hidden`.
    """

    name: str
    settings: tuple[str, ...] = ()
    dataset: str = ""
    hidden: tuple[str, ...] = ()


class Graph(NamedTuple):
    """What arms depend on.

    Modalities of the base, structure first, widths of the features of the others, and K and D.
    """

    modalities: tuple[str, ...]
    widths: dict[str, int]
    num_experts: int
    width: int

    @property
    def features(self) -> tuple[str, ...]:
        """Modalities but structure."""
        return tuple(name for name in self.modalities if name != "structure")


class Study(NamedTuple):
    """A study: title, question, arms of a graph (the first is the base), and columns of the table besides MRR."""

    title: str
    question: str
    arms: Callable[[Graph], list[Arm]]
    columns: tuple[str, ...] = ()


BASE = Arm("base")


def _listed(modalities: tuple[str, ...]) -> str:
    return f"modalities=[{', '.join(modalities)}]"


def ablation(graph: Graph) -> list[Arm]:
    """Parts of the model left out, and single modalities."""
    without_experts = ("experts.kind=identity", "experts.num_experts=1")
    return [
        BASE,
        Arm("without CMKF (uniform weights of modalities and experts)", ("fusion.estimator=uniform",)),
        Arm("without EGNS (uniform weights of negatives)", ("negatives.weighting=uniform",)),
        Arm("without experts", without_experts),
        Arm("structure only", (_listed(("structure",)), *without_experts)),
        *(Arm(f"{name} only", (_listed((name,)),)) for name in graph.features),
    ]


def experts(graph: Graph) -> list[Arm]:
    """K from 1 to 6, and K 1 with as many parameters as the base."""
    numbers = [k for k in range(1, 7) if k != graph.num_experts]
    per_unit = sum(graph.widths[name] + graph.width for name in graph.features)
    missing = 2 * len(graph.modalities) * (graph.num_experts - 1) * graph.width**2
    hidden = graph.width + round(missing / max(per_unit, 1))
    equal = Arm("K 1, parameters as base", ("experts.num_experts=1", f"projection.hidden={hidden}"))
    return [BASE, *(Arm(f"K {k}", (f"experts.num_experts={k}",)) for k in numbers), equal]


def thresholds(graph: Graph) -> list[Arm]:
    """delta 1 and delta 2 of the classes of entropy, with the paper's weights."""
    entropy = "negatives.weighting=entropy"
    pairs = [(low, high) for low in (0.1, 0.2, 0.3) for high in (0.7, 0.8, 0.9) if (low, high) != (0.2, 0.8)]
    arms = [Arm("entropy weights, 0.2 and 0.8", (entropy,))]
    settings = [(entropy, f"negatives.easy_below={low}", f"negatives.hard_from={high}") for low, high in pairs]
    arms += [Arm(f"{low} and {high}", chosen) for (low, high), chosen in zip(pairs, settings, strict=True)]
    return arms


def estimators(graph: Graph) -> list[Arm]:
    """Where the weights of modalities and experts come from; and what a modality of noise does to them."""
    nats = ("fusion.normalize=false", "mine.bounded=false", "mine.every=1")
    flow = "fusion.weight_gradient=flow"
    noisy = _listed((*graph.modalities, "video"))
    return [
        BASE,
        Arm("MINE in nats, without cap (paper)", nats),
        *(Arm(name, (f"fusion.estimator={name}",)) for name in ("cosine", "uniform", "attention")),
        Arm("MINE, weights pass gradients", (flow,)),
        Arm("MINE, and a modality of noise", (noisy,), "noise"),
        Arm("uniform, and a modality of noise", (noisy, "fusion.estimator=uniform"), "noise"),
        Arm("MINE in nats, and a modality of noise", (noisy, *nats), "noise"),
    ]


def negatives(graph: Graph) -> list[Arm]:
    """Weights of negatives, and no sampling at all."""
    kinds = ("entropy", "self_adversarial", "uniform")
    return [
        BASE,
        *(Arm(name.replace("_", "-"), (f"negatives.weighting={name}",)) for name in kinds),
        Arm("one against all (softmax)", ("train.loss=one_vs_all",)),
    ]


def missing(graph: Graph) -> list[Arm]:
    """Modalities hidden at test from the same trained model; and modalities that training lacks as well."""
    hidden = tuple(f"{name}:{share}" for name in graph.modalities for share in SHARES)
    uniform = Arm("uniform weights, complete", ("fusion.estimator=uniform",), hidden=hidden)
    complete = Arm("base", hidden=hidden)
    half = "train.structure_dropout=0.5"
    arms = [complete, uniform, Arm("structure dropout 0.5", (half,), hidden=hidden)]
    return arms + [Arm(f"train and test lack {name} of half", dataset=f"{name}:0.5") for name in graph.features]


STUDIES = {
    "ablation": Study(
        "Ablation", "What does each part of the model contribute, and what does a modality alone reach?", ablation
    ),
    "experts": Study("Experts", "How many experts per modality help, at equal parameters too?", experts),
    "thresholds": Study(
        "Thresholds of entropy classes",
        "Where should Easy end (the first number) and Hard begin (the second), and how many negatives fall into each"
        " class?",
        thresholds,
        ("share/easy", "share/ambiguous", "share/hard"),
    ),
    "estimators": Study(
        "Estimators of the fusion weights",
        "Do weights by mutual information beat simpler ones, and do they keep a modality of pure noise out?",
        estimators,
        ("fusion/modality/structure", "fusion/modality/video"),
    ),
    "negatives": Study(
        "Negatives",
        "How should negatives be weighted, and in which class of entropy do false negatives lie?",
        negatives,
        ("share/hard", "false/easy", "false/ambiguous", "false/hard"),
    ),
    "missing": Study(
        "Missing modalities",
        "What remains when a modality is missing at test, or in training as well, and does the weighting compensate?",
        missing,
    ),
}
