"""A data set and a bundle at a URL: packed, extracted, trained on, exported and asked as those on this disk are."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import fsspec
import pytest

from mocme_dist.config import load_config
from mocme_dist.config.schema import DataConfig, EncodersConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.packing import pack_folder
from mocme_dist.encoders.pipeline import extract_features
from mocme_dist.errors import ConfigError, DataError, ShardError
from mocme_dist.train import resolve_paths, train

TINY = (
    "launch.mode=local",
    "deepspeed.engine=torch",
    "compile=off",
    "experts.width=8",
    "experts.num_experts=2",
    "mine.hidden=4",
)
SHORT = (
    *TINY,
    "negatives.count=16",
    "negatives.chunk_size=16",
    "train.batch_size=64",
    "train.epochs=1",
    "train.eval_every=1",
    "train.projector=0",
)


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path, monkeypatch):
    monkeypatch.setenv("MOCME_CACHE", str(tmp_path / "cache"))
    yield f"file://{tmp_path}/bucket/graph" if request.param == "file" else f"memory://{tmp_path.name}/graph"
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()


def contents(place: str) -> dict[str, str]:
    """SHA-256 of every file at a path or URL, by relative name."""
    files, root = fsspec.core.url_to_fs(place)
    found = files.find(root)
    return {name.removeprefix(root).lstrip("/"): hashlib.sha256(files.cat_file(name)).hexdigest() for name in found}


def forget(tmp_path: Path) -> None:
    """What another machine has: no mirror."""
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)


def extract(place: str, use_ray: bool = False) -> dict:
    dataset = Dataset.open(place)
    return extract_features(dataset, EncodersConfig(actors=2), ("label",), ["numeric"], use_ray)


def test_packed_and_extracted_there_it_holds_the_bytes_of_one_on_disk(url, tiny_raw, tmp_path):
    settings = DataConfig(shard_rows=16)
    pack_folder(tiny_raw, tmp_path / "here", settings)
    extract(str(tmp_path / "here"))
    pack_folder(tiny_raw, url, settings)
    forget(tmp_path)
    report = extract(url)
    assert report["modalities"]["numeric"]["parts"] == {"done": 4, "skipped": 0}
    assert contents(url).keys() == contents(str(tmp_path / "here")).keys()
    different = {name for name, digest in contents(url).items() if digest != contents(str(tmp_path / "here"))[name]}
    assert different <= {"extract_report.json"}  # rates
    forget(tmp_path)
    assert extract(url)["modalities"]["numeric"]["parts"] == {"done": 0, "skipped": 4}
    assert not list((tmp_path / "cache").rglob("*.tar"))  # nothing to do, no shard fetched
    assert not list((tmp_path / "cache").rglob("part-*.safetensors"))  # who is present stands in the JSON of each part


def test_parts_of_before_whose_json_says_less_are_counted_from_their_values(url, tiny_raw, tmp_path):
    pack_folder(tiny_raw, url, DataConfig(shard_rows=16))
    report = extract(url)
    files, root = fsspec.core.url_to_fs(url)
    for shard in (0, 2):
        name = f"{root}/features/numeric/part-{shard:06d}.json"
        record = json.loads(files.cat_file(name))
        assert record.pop("width") == report["modalities"]["numeric"]["width"] and record.pop("present_bits")
        files.pipe_file(name, json.dumps(record).encode())
    forget(tmp_path)
    again = extract(url)
    assert again["missing"] == report["missing"] and again["modalities"]["numeric"]["parts"] == {
        "done": 0,
        "skipped": 4,
    }
    assert sorted(path.stem for path in (tmp_path / "cache").rglob("part-*.safetensors")) == [
        "part-000000",
        "part-000002",
    ]


def test_packing_again_sends_nothing_and_other_content_is_refused(url, tiny_raw, raw_copy, tmp_path):
    pack_folder(tiny_raw, url, DataConfig(shard_rows=16))
    before = contents(url)
    forget(tmp_path)
    assert pack_folder(tiny_raw, url, DataConfig(shard_rows=16)).place == url
    assert contents(url) == before
    with (raw_copy / "train.txt").open("a") as file:
        file.write("item 00\tnear\titem 30\n")
    with pytest.raises(ConfigError, match="packed here before with other raw files"):
        pack_folder(raw_copy, url, DataConfig(shard_rows=16))


def test_a_part_that_is_lost_or_cut_there_is_made_again(url, tiny_raw, tmp_path):
    pack_folder(tiny_raw, url, DataConfig(shard_rows=16))
    extract(url)
    before = contents(url)
    files, root = fsspec.core.url_to_fs(url)
    files.rm(f"{root}/features/numeric/part-000001.safetensors")
    files.pipe_file(f"{root}/features/numeric/part-000002.safetensors", b"cut")
    forget(tmp_path)
    assert extract(url)["modalities"]["numeric"]["parts"] == {"done": 2, "skipped": 2}
    after = contents(url)
    assert {name for name in before if before[name] != after[name]} <= {"extract_report.json"}


def test_a_rank_fetches_the_parts_of_its_rows_only(url, tiny_raw, tmp_path):
    pack_folder(tiny_raw, url, DataConfig(shard_rows=16))
    extract(url)
    forget(tmp_path)
    dataset = Dataset.open(url)
    dataset.bring_features("numeric", 20, 33)
    parts = sorted(path.name for path in dataset.directory.rglob("part-*.safetensors"))
    assert parts == ["part-000001.safetensors", "part-000002.safetensors"]


def test_a_run_on_it_equals_one_on_disk_and_its_bundle_answers_from_there(url, tiny_raw, tmp_path, monkeypatch, capsys):
    from mocme_dist import export, query
    from mocme_dist.serving.bundle import Bundle

    pack_folder(tiny_raw, url, DataConfig(shard_rows=16))
    extract(url)
    pack_folder(tiny_raw, tmp_path / "here", DataConfig(shard_rows=16))
    extract(str(tmp_path / "here"))
    forget(tmp_path)
    reports = []
    for name, place in (("there", url), ("here", str(tmp_path / "here"))):
        paths = (f"data.dataset={json.dumps(place)}", f"run.dir={json.dumps(str(tmp_path / name / 'run'))}")
        reports.append(train(resolve_paths(load_config([], [*SHORT, *paths, "modalities=[structure, numeric]"]))))
    assert reports[0]["mrr"] == reports[1]["mrr"]
    bundle = f"{url}-bundle"
    monkeypatch.setattr("sys.argv", ["export", str(tmp_path / "there" / "run"), bundle])
    export.main()
    forget(tmp_path)
    answers = Bundle.open(bundle).predict("item 05", "near", k=3)
    assert len(answers) == 3 and answers["score"].is_monotonic_decreasing
    forget(tmp_path)
    monkeypatch.setattr("sys.argv", ["query", bundle, "--head", "item 05", "--relation", "near", "--json"])
    query.main()
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["answers"]) == 10
    files, root = fsspec.core.url_to_fs(f"{url}-foreign")
    files.makedirs(root, exist_ok=True)
    files.pipe_file(f"{root}/mine.txt", b"x")
    monkeypatch.setattr("sys.argv", ["export", str(tmp_path / "there" / "run"), f"{url}-foreign"])
    with pytest.raises(ConfigError, match="no export"):
        export.main()


def test_what_is_not_there_or_is_cut_is_told_with_its_url(url, tiny_raw, tmp_path):
    with pytest.raises(DataError, match=r"graph: no manifest.json; not a packed data set"):
        Dataset.open(url)
    pack_folder(tiny_raw, url, DataConfig(shard_rows=16))
    files, root = fsspec.core.url_to_fs(url)
    files.pipe_file(f"{root}/shards/entities-000002.tar", b"x" * 700)
    forget(tmp_path)
    with pytest.raises(ShardError, match=r"entities-000002\.tar"):
        extract(url)


@pytest.mark.ray
def test_actors_fetch_shards_and_send_parts(ray_session, tiny_raw, tmp_path, monkeypatch):
    monkeypatch.setenv("MOCME_CACHE", str(tmp_path / "cache"))
    url = f"file://{tmp_path}/bucket/graph"
    pack_folder(tiny_raw, url, DataConfig(shard_rows=16))
    pack_folder(tiny_raw, tmp_path / "here", DataConfig(shard_rows=16))
    extract(str(tmp_path / "here"))
    assert extract(url, use_ray=True)["modalities"]["numeric"]["parts"]["done"] == 4

    def parts(place):
        return {name: digest for name, digest in contents(place).items() if name.startswith("features/")}

    assert parts(url) == parts(str(tmp_path / "here"))


def test_a_folder_without_a_run_is_told(url):
    from mocme_dist.train import config_of_run

    with pytest.raises(ConfigError, match="not a run directory"):
        config_of_run(url)
