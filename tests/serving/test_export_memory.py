"""Export never holds the table: memory grows by a part and a block, whatever the number of entities."""

from __future__ import annotations

import importlib.util
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from mocme_dist.config.schema import DataConfig
from mocme_dist.data.packing import pack_folder
from mocme_dist.memory import return_pages
from mocme_dist.parallel.comm import communication
from mocme_dist.runs.checkpoints import Checkpoints
from mocme_dist.runs.saver import Saver
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.export import export_bundle
from mocme_dist.serving.export_formats import export_other
from mocme_dist.serving.rows import RunRows
from mocme_dist.training.build import build_worker, open_dataset

ENTITIES, WIDTH = 100_000, 256
TABLE = ENTITIES * WIDTH * 4


class PeakOfHeap:
    """The largest anonymous memory of this process while the block runs.

    Mapped files, which can be dropped, do not count.
    """

    def __enter__(self) -> PeakOfHeap:
        self.start = self.peak = self._now()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.slow
def test_an_export_grows_by_a_fraction_of_the_table(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    ids = np.arange(ENTITIES)
    for split, part in (("train", ids), ("valid", ids[:50]), ("test", ids[50:60])):
        step = {"train": 1, "valid": 2, "test": 3}[split]
        (raw / f"{split}.txt").write_text("".join(f"e{i}\tnext\te{(i + step) % ENTITIES}\n" for i in part.tolist()))
    dataset = pack_folder(raw, tmp_path / "dataset", DataConfig(shard_rows=50_000))
    overrides = (
        "modalities=[structure]",
        f"experts.width={WIDTH}",
        "projection.structure=identity",
        "evaluation.encode_rows=1024",
    )
    config = tiny_run.tiny_config(dataset.directory, tmp_path / "run", *overrides)
    with communication(60) as comm:
        worker = build_worker(config, open_dataset(config.data), comm)
        manifest = {"identity": json.loads(json.dumps(worker.identity)), "metric": 0.5}
        Saver(Checkpoints(tmp_path / "run"), 2, comm).save(1, worker.table, worker.engine.state(), manifest)
    del worker
    saved = Checkpoints(tmp_path / "run").find("auto", best=True)
    assert saved is not None
    rows = RunRows(config, open_dataset(config.data), saved)
    next(rows.blocks(0, 1024))  # what torch sets up at its first product is not the export's
    return_pages()  # a process that has trained keeps what it frees, and an export would grow into that unseen
    with PeakOfHeap() as heap:
        export_bundle(rows, tmp_path / "bundle", part_bytes=4 << 20)
    assert heap.peak - heap.start < TABLE / 2, (
        f"grew by {(heap.peak - heap.start) / 2**20:.0f} MiB of a table of {TABLE / 2**20:.0f}"
    )
    if importlib.util.find_spec("faiss") is not None:
        return_pages()
        with PeakOfHeap() as heap:
            export_other(rows, tmp_path / "index", "faiss")
        assert heap.peak - heap.start < TABLE / 2
        assert (tmp_path / "index" / "entities.faiss").stat().st_size > TABLE
    bundle = Bundle.open(tmp_path / "bundle")
    assert (
        len(bundle.vector_parts) == -(-ENTITIES // 4096) and sum(len(part) for part in bundle.vector_parts) == ENTITIES
    )
