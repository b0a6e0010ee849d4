"""Makes a planted multi-modal graph of any size: `python -m tools.make_synthetic OUT --entities N --triples T`.

A raw folder that `python -m mocme_dist.pack` takes, or with --packed a data set with its features, as pack and extract
would leave it. Memory is bounded: a raw folder needs a few hundred MB at any size, --packed the triples as integers.
truth/truth.json says which MRR is achievable; truth/factors.npy holds the latent factors of every entity.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from tools.synthetic.planted import MODALITIES, Planted


def main() -> None:
    """Parse, write, say what was made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder")
    parser.add_argument("--entities", type=int, default=10_000, metavar="N")
    parser.add_argument("--triples", type=int, default=40_000, metavar="T", help="lines over all splits; some repeat")
    parser.add_argument("--relations", type=int, default=16, metavar="R")
    parser.add_argument(
        "--factors", type=int, nargs=2, default=(8, 8), metavar=("A", "B"), help="sizes of the two latent factors"
    )
    parser.add_argument("--exponent", type=float, default=0.8, help="of the Zipf popularities, not 1")
    parser.add_argument(
        "--modalities", nargs="*", choices=[m.name for m in MODALITIES], default=[m.name for m in MODALITIES]
    )
    parser.add_argument("--width", type=int, default=32, help="numbers of a feature vector")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--packed", action="store_true", help="a packed data set with features, in place of a raw folder"
    )
    parser.add_argument("--shard-rows", type=int, default=4096, help="with --packed: entities per shard")
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        sys.exit(f"{args.out}: not empty; choose a new folder")
    modalities = tuple(replace(m, width=args.width) for m in MODALITIES if m.name in args.modalities)
    graph = Planted(
        args.entities,
        args.triples,
        args.relations,
        tuple(args.factors),
        args.exponent,
        seed=args.seed,
        modalities=modalities,
    )
    if args.packed:
        from tools.synthetic.packed import write_packed

        write_packed(args.out, graph, args.shard_rows)
    else:
        from tools.synthetic.raw import write_raw

        write_raw(args.out, graph)
    print(json.dumps(json.loads((args.out / "truth" / "truth.json").read_text())["achievable"]))


if __name__ == "__main__":
    main()
