"""Memory of extraction actors on shards of more than 5 GB: `python -m tools.bench.extract --memory [--quick]`.

The shards hold incompressible pictures (BMP noise of 4 MB each). What a plain process needs that has built the same
encoder and encoded one batch of such pictures is the measure; an actor may have 512 MB more.
"""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path

import numpy as np

from mocme_dist.config.schema import DataConfig, EncodersConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.packing import pack_folder
from tools.bench.common import finish, row

SIDE = 1180  # 4.2 MB as BMP
ACTORS = 2
CONFIG = EncodersConfig.model_validate({"image": {"model": "mocme_dist.encoders.efficientnet_lite:lite0", "size": 64}, "actors": ACTORS})


def noise(seed: int) -> bytes:
    """A BMP file of random pixels."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(buffer, "BMP")
    return buffer.getvalue()


def make_shards(work: Path, pictures: int, shards: int) -> Dataset:
    """A packed graph, a ring, with one picture for each entity; twenty different ones, so that making them is quick."""
    raw = work / "raw"
    (raw / "images").mkdir(parents=True)
    names = [f"e{i}" for i in range(pictures)]
    (raw / "train.txt").write_text("".join(f"{name}\tnext\t{names[(i + 1) % pictures]}\n" for i, name in enumerate(names)))
    (raw / "valid.txt").write_text(f"{names[0]}\tnext\t{names[2]}\n")
    (raw / "test.txt").write_text(f"{names[0]}\tnext\t{names[3]}\n")
    for seed in range(20):
        (raw / "images" / f"{seed}.bmp").write_bytes(noise(seed))
    (raw / "images.tsv").write_text("entity\tfile\n" + "".join(f"{name}\timages/{i % 20}.bmp\n" for i, name in enumerate(names)))
    return pack_folder(raw, work / "packed", DataConfig(shard_rows=-(-pictures // shards)))


def encoder_mb() -> float:
    """RSS of this process after building the encoder and encoding one batch."""
    import psutil  # type: ignore[import-untyped]

    from mocme_dist.encoders.build import build_encoder

    encoder = build_encoder("image", CONFIG, (), None)
    pieces = encoder.decode({f"image.{i}.bmp": noise(i) for i in range(4)}).pieces * 4
    encoder.encode(encoder.collate(pieces))
    return float(psutil.Process().memory_info().rss) / 2**20


def watch(work: Path, quick: bool) -> None:
    """Extract on actors while their RSS is sampled twenty times a second."""
    import multiprocessing

    import psutil  # type: ignore[import-untyped]

    from mocme_dist.cluster import connect_ray
    from mocme_dist.encoders.pipeline import extract_features

    dataset = make_shards(work, 160 if quick else 1300, 4 if quick else 10)
    total = sum(entry.bytes for entry in dataset.entries) / 2**20
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        alone = pool.apply(encoder_mb)
    peaks: dict[int, float] = {}
    over = threading.Event()

    def sample() -> None:
        while not over.wait(0.05):
            for child in psutil.Process().children(recursive=True):
                try:
                    if "MapWorker" in child.cmdline()[0]:
                        peaks[child.pid] = max(peaks.get(child.pid, 0.0), child.memory_info().rss / 2**20)
                except (psutil.Error, IndexError):
                    continue

    connect_ray(ACTORS, trains=False)
    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    started = time.perf_counter()
    report = extract_features(dataset, CONFIG, (), ("image",), use_ray=True)
    seconds = time.perf_counter() - started
    over.set()
    watcher.join()
    complete = report["modalities"]["image"]["present"] == dataset.num_entities
    rows = [
        row("actor_above_encoder", max(peaks.values()) - alone, "MiB", "<= 512"),
        row("actor_peak", max(peaks.values()), "MiB"),
        row("encoder_alone", alone, "MiB"),
        row("shards", total, "MiB", "" if quick else ">= 5120"),
        row("pictures_per_s", dataset.num_entities / seconds, "1/s"),
    ]
    finish("extract_memory", complete, rows, actors=len(peaks))
