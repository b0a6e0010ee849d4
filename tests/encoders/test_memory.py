"""An actor's memory does not follow the size of its shards: nothing reads far ahead, nothing holds a whole shard."""

from __future__ import annotations

import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mocme_dist.config.schema import DataConfig, EncodersConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.packing import pack_folder
from mocme_dist.encoders.encoder import Decoded
from mocme_dist.encoders.shard import extract_shard

FILES, FILE_BYTES = 48, 1 << 20


class Sizes:
    """An encoder whose features are the lengths of the files; `gate` holds it up."""

    modality, width, chunk, settings = "image", 1, 4, {}

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.decoded = 0

    def decode(self, members):
        self.decoded += 1
        return Decoded([len(content) for content in members.values()])

    def collate(self, pieces):
        return np.array(pieces, dtype=np.float32)[:, None]

    def encode(self, batch):
        self.gate.wait(10)
        return batch / FILE_BYTES


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """One shard of 48 MiB: two entities with 24 files of 1 MiB each."""
    raw = tmp_path_factory.mktemp("big") / "raw"
    raw.mkdir()
    for split, line in (("train", "a\tnext\tb\n"), ("valid", "b\tnext\ta\n"), ("test", "a\tnext\ta\n")):
        (raw / f"{split}.txt").write_text(line)
    (raw / "images").mkdir()
    rows = []
    for number in range(FILES):
        (raw / "images" / f"{number}.png").write_bytes(np.random.default_rng(number).bytes(FILE_BYTES))
        rows.append(f"{'ab'[number % 2]}\timages/{number}.png\n")
    (raw / "images.tsv").write_text("entity\tfile\n" + "".join(rows))
    return pack_folder(raw, raw.parent / "packed", DataConfig())


@pytest.mark.parametrize("threads", [1, 3])
def test_reading_stops_when_the_encoder_does(big, threads):
    encoder = Sizes()
    config = EncodersConfig(cpus_per_actor=threads)
    work = threading.Thread(target=extract_shard, args=(encoder, big, 0, config, "hash"))
    work.start()
    try:
        seen = -1
        while encoder.decoded != seen:  # until nothing moves any more
            seen = encoder.decoded
            work.join(0.3)
        # one chunk in the encoder, two waiting, one refused by the full queue, and what the threads hold
        assert seen <= 4 * encoder.chunk + 2 * threads + 1 < FILES
    finally:
        encoder.gate.set()
        work.join()
    assert encoder.decoded == FILES


@pytest.mark.parametrize("threads", [1, 3])
def test_memory_is_that_of_a_few_files(big, threads):
    encoder = Sizes()
    encoder.gate.set()
    tracemalloc.start()
    try:
        extract_shard(encoder, big, 0, EncodersConfig(cpus_per_actor=threads), "hash")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (4 + 3 * threads) * FILE_BYTES < FILES * FILE_BYTES / 2
    assert (big.directory / "features" / "image" / "part-000000.json").is_file()
    assert Path(big.shard_path(0)).stat().st_size > FILES * FILE_BYTES
