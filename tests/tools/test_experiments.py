"""Studies and benchmarks.

Arms, tables, variants of a graph, and one study on a real Ray, continued where it stopped.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mocme_dist.config import load_config
from tools.experiments import benchmarks, pages, study
from tools.experiments.arms import STUDIES, Graph
from tools.experiments.graphs import make_variant
from tools.experiments.names import name_vectors
from tools.experiments.trials import Trial

GRAPH = Graph(("structure", "text", "numeric"), {"text": 384, "numeric": 60}, 3, 64)
SMALL = (
    "modalities=[structure,numeric,image]",
    "encoders.image.model=torchvision:squeezenet1_1",
    "encoders.image.random_weights=true",
    "encoders.image.size=32",
    "compile=off",
    "experts.width=8",
    "mine.hidden=4",
    "rotate.gamma=4",
    "negatives.count=16",
    "negatives.chunk_size=16",
    "train.batch_size=64",
    "train.epochs=1",
)


@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_of_a_study_is_a_valid_configuration_of_its_own(name, tmp_path):
    arms = STUDIES[name].arms(GRAPH)
    for arm in arms:
        load_config([], [f"modalities=[{', '.join(GRAPH.modalities)}]", *arm.settings])
    assert len({arm.name for arm in arms}) == len(arms)
    data = ("data.dataset=packed",)
    digests = [Trial(arm.name, (), (*data, *arm.settings), 1, arm.hidden).digest for arm in arms if not arm.dataset]
    assert len(set(digests)) == len(digests)


def test_one_expert_of_as_many_parameters_has_them():
    settings = dict(text.split("=") for text in STUDIES["experts"].arms(GRAPH)[-1].settings)
    M, K, D = 3, GRAPH.num_experts, GRAPH.width
    wider = int(settings["projection.hidden"]) - D
    assert wider * sum(width + D for width in GRAPH.widths.values()) == pytest.approx(2 * M * (K - 1) * D**2, rel=0.02)


def test_a_digest_depends_on_settings_and_seed_but_not_on_names_and_places():
    one = Trial("base", (), ("data.dataset=/a/packed",), 1)
    assert one.digest == Trial("same", (), ("data.dataset=/b/packed", "data.raw=/c"), 1).digest
    assert one.digest != one._replace(seed=2).digest
    assert one.digest != one._replace(overrides=("data.dataset=/a/packed", "experts.num_experts=2")).digest


def test_the_paired_bootstrap_sees_a_difference_that_is_there_and_none_that_is_not():
    generator = np.random.default_rng(1)
    base_SQ = generator.integers(1, 50, size=(3, 400)).astype(float)
    mean, low, high = pages.paired_bootstrap(base_SQ, base_SQ)
    assert mean == low == high == 0.0
    better_SQ = np.maximum(base_SQ - 2, 1)
    mean, low, high = pages.paired_bootstrap(better_SQ, base_SQ)
    assert mean == pytest.approx((1 / better_SQ).mean() - (1 / base_SQ).mean())
    assert 0 < low < mean < high


def test_variants_add_noise_and_drop_a_share(tiny_raw, tmp_path):
    noise = make_variant(tiny_raw, tmp_path, "noise")
    assert np.load(noise / "features" / "video.npy").shape == (60, 64)
    assert len((noise / "features" / "video.ids").read_text().splitlines()) == 60
    described = {line.split("\t")[0] for line in (tiny_raw / "text.tsv").read_text().splitlines()[1:]}
    half = make_variant(tiny_raw, tmp_path, "text:0.5")
    left = {line.split("\t")[0] for line in (half / "text.tsv").read_text().splitlines()[1:]}
    assert left < described and len(left) == len(described) - round(len(described) / 2)
    assert make_variant(tiny_raw, tmp_path, "") == tiny_raw


def test_names_that_share_characters_get_vectors_that_point_alike():
    vectors = name_vectors(["北京大学", "清华大学", "Lake Erie", "Lake Huron", "Ω"])
    cosine = vectors @ vectors.T
    assert cosine[0, 1] > 0.2 > abs(cosine[0, 2]) and cosine[2, 3] > 0.2
    assert not vectors[4].any()


def test_a_page_keeps_what_people_wrote(tmp_path):
    page = tmp_path / "page.md"
    pages.write_page(page, "Title", "Question?", "first table")
    page.write_text(page.read_text().replace("Not written yet.", "It helps."))
    pages.write_page(page, "Title", "Question?", "second table")
    text = page.read_text()
    assert "It helps." in text and "second table" in text and "first table" not in text


def test_benchmark_rows_become_means_and_deviations():
    rows = [
        {"data": "MKG-W", "form": "recommended", "seed": seed, "epochs_done": 40, "valid_mrr": 0.36, "mrr": mrr,
         "hits@1": 0.3, "hits@10": 0.5, "without_frequency": {"mrr": mrr, "hits@1": 0.3, "hits@10": 0.5}}
        for seed, mrr in ((1, 0.37), (2, 0.38), (3, 0.39))
    ]  # fmt: skip
    table = benchmarks.results_table(rows)
    assert "| MKG-W | recommended | 3 | 40 | 0.3600 ± 0.0000 | 0.3800 ± 0.0100 |" in table
    assert "without frequency" in table


@pytest.mark.ray
@pytest.mark.slow
def test_a_study_runs_on_ray_writes_its_page_and_continues_where_it_stopped(tiny_raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("data: {shard_rows: 32}\n")
    out = tmp_path / "out"
    command = ["negatives", "--data", str(tiny_raw), "--out", "out", "--config", "own.yaml", "--seeds", "1", "2"]
    command += ["--set", *SMALL]
    study.main(command)
    folder = out / "pages"
    text = (folder / "negatives.md").read_text()
    assert "one against all" in text and "| base | 2 |" in text and "Failed" not in text
    assert pq.read_table(folder / "negatives.parquet").num_rows == 10
    assert (folder / "negatives.svg").read_text().startswith("<?xml")
    rows = sorted((out / "rows").glob("*.json"))
    assert len(rows) == 10 and all("error" not in json.loads(path.read_text()) for path in rows)
    before = {path: path.stat().st_mtime_ns for path in rows}
    rows[0].unlink()
    study.main(command)
    after = {path: path.stat().st_mtime_ns for path in sorted((out / "rows").glob("*.json"))}
    assert [path for path in after if after[path] != before[path]] == [rows[0]]


def test_arms_with_a_mistake_are_rows_and_not_the_end(tmp_path, tiny_dataset):
    from tools.experiments.trials import run_trial

    row = run_trial(
        Trial("bad", (), (f"data.dataset={json.dumps(str(tiny_dataset))}", "modalities=[video]"), 1), tmp_path
    )
    assert "no video" in row["error"]
    assert Path(tmp_path / "rows" / f"{row['digest']}.json").is_file()
