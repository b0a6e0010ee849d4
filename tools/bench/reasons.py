"""How long the reasons for one answer take, beside the question itself.

`python -m tools.bench.reasons BUNDLE [--questions N]`.

Questions are train facts drawn by seed, asked from both sides; the best new answer is explained, with nothing prepared
before but what a bundle keeps. Parity: the contributions of the terms add up to the score of the answer.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.reasons import explain
from tools.bench.common import finish, row, spread


def main() -> None:
    """Ask, explain, print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", metavar="BUNDLE")
    parser.add_argument("--questions", type=int, default=100, metavar="N")
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    facts, gen = bundle.facts_of_train, np.random.default_rng(0)
    asks, whys, parity = [], [], True
    for turn in range(-3, args.questions):  # the first ones warm up
        place = int(gen.integers(2 * bundle.num_relations))
        sources = facts.sources(place)
        if not len(sources):
            continue
        source, (relation, direction) = int(gen.choice(sources)), divmod(place, 2)
        started = time.perf_counter()
        answers = bundle.ask(source, relation, ("tail", "head")[direction], k=10)
        asked = time.perf_counter()
        reasons = explain(bundle, source, relation, direction, int(answers.answer[0]))
        explained = time.perf_counter()
        parity &= abs(sum(term["contribution"] for term in reasons["terms"]) - answers.score[0]) < 1e-3
        if turn >= 0:
            asks.append(1e3 * (asked - started))
            whys.append(1e3 * (explained - asked))
    (ask, ask_p90), (why, why_p90) = spread(asks), spread(whys)
    figures = [row("explain_ms", why, "ms", "<= 100"), row("explain_p90_ms", why_p90, "ms")]
    figures += [row("ask_ms", ask, "ms"), row("ask_p90_ms", ask_p90, "ms")]
    finish("reasons", bool(parity), figures, entities=bundle.num_entities, width=bundle.width)


if __name__ == "__main__":
    main()
