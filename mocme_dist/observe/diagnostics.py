"""Symptoms of a failing run: each is logged when it appears, and marked in a curve while it lasts."""

from __future__ import annotations

from typing import Any

from mocme_dist.model.fusion import Fused, Fusion, PairInformation
from mocme_dist.observe.log import log

# A mixture counts as collapsed if the weight of a modality is this far between the equal share 1 / M and 1.
COLLAPSE = 0.8
# Information above this share of its cap log n counts as capped: more rows per step could show more.
_AT_CAP = 0.98
# Number of evaluations without a better valid MRR, by at least a thousandth, that make a plateau.
PLATEAU, _BETTER = 5, 1.001


class Diagnostics:
    """Detects symptoms and logs each once.

    Args:
        modalities: of the model, in its order.
        contrastive: whether the loss weights negatives by class.
        bounded: whether estimates of information are capped at log n.
    """

    def __init__(self, modalities: tuple[str, ...], contrastive: bool, bounded: bool) -> None:
        self.modalities, self.contrastive, self.bounded = modalities, contrastive, bounded
        self.said: list[str] = []
        self.best_mrr, self.without_better = 0.0, 0

    def state(self) -> dict[str, Any]:
        """Return the fields that a checkpoint keeps, as JSON."""
        return {"said": self.said, "best_mrr": self.best_mrr, "without_better": self.without_better}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue after `state`."""
        self.said = list(state["said"])
        self.best_mrr, self.without_better = state["best_mrr"], state["without_better"]

    def of_interval(self, fused: Fused, fusion: Fusion, hard_share: float) -> dict[str, float]:
        """Return the marks of an interval of steps.

        Args:
            fused: result of fusion in its last step.
            fusion: has the moving averages of information.
            hard_share: share of Hard negatives among those allowed in the interval.
        """
        capped, unsupported, pairs = self._information(fusion)
        return {
            "warnings/modality_collapse": self._collapse(fused),
            "warnings/no_hard_negative": self._mark(
                "no_hard_negative",
                self.contrastive and hard_share < 1e-6,
                "no negative is Hard: entropy weights do nothing now; check rotate.gamma and the learning rates",
            ),
            "warnings/information_at_cap": self._mark(
                "information_at_cap",
                capped > 0,
                f"mutual information of {capped} of {pairs} pairs is at its cap log n: "
                "their weights cannot tell them apart; use more "
                "rows (mine.rows, train.batch_size)",
            ),
            "warnings/information_diverges": self._mark(
                "information_diverges",
                unsupported > 0,
                f"mutual information of {unsupported} of {pairs} pairs is above log n, more than n rows can show: "
                "the networks learn their "
                "rows by heart; set mine.bounded=true or lower mine.learning_rate",
            ),
        }

    def of_evaluation(self, mrr: float) -> dict[str, float]:
        """Return the mark of an evaluation on valid."""
        if mrr > self.best_mrr * _BETTER:
            self.best_mrr, self.without_better = mrr, 0
        else:
            self.without_better += 1
        text = (
            f"valid MRR has not risen above {self.best_mrr:.4f} in {self.without_better} evaluations; "
            "train.patience would stop here, "
            "and train.schedule=linear or another train.learning_rate may go on"
        )
        return {"warnings/mrr_plateau": self._mark("mrr_plateau", self.without_better >= PLATEAU, text)}

    def _collapse(self, fused: Fused) -> float:
        """Return the mark of a collapsed mixture; entities with one modality, whose weight is always 1, do not
        count."""
        M = len(self.modalities)
        share = float(fused.shared_M.max())
        name = self.modalities[int(fused.shared_M.argmax())]
        text = f"modality {name} takes over {100 * share:.0f} % of the weight: the mixture has collapsed"
        return self._mark("modality_collapse", M > 1 and share > 1 / M + COLLAPSE * (1 - 1 / M), text)

    def _information(self, fusion: Fusion) -> tuple[int, int, int]:
        """Return the number of pairs at their cap, of pairs above what their rows can show, and of all pairs."""
        capped = unsupported = pairs = 0
        for found in (getattr(fusion, name, None) for name in ("intra", "inter")):
            if not isinstance(found, PairInformation) or found.settings.estimator != "mine":
                continue
            pairs += found.num_pairs
            seen_P = found.seen_P > 0
            capped += int((seen_P & (found.information_P >= _AT_CAP * found.log_n_P)).sum()) if self.bounded else 0
            unsupported += 0 if self.bounded else int((seen_P & (found.information_P > found.log_n_P)).sum())
        return capped, unsupported, pairs

    def _mark(self, name: str, holds: bool, text: str) -> float:
        if holds and name not in self.said:
            log.warning(text)
            self.said.append(name)
        elif not holds and name in self.said:
            self.said.remove(name)
        return float(holds)
