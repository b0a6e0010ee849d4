"""Everything at s3://: a server of moto's on loopback, asked by s3fs over HTTP, with credentials that are none."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_remote import LINES, run_with
from tiny_run import losses, tiny_config

from mocme_dist import export, query
from mocme_dist.config.schema import DataConfig, EncodersConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.packing import pack_folder
from mocme_dist.data.remote_storage import RemoteStorage
from mocme_dist.encoders.pipeline import extract_features
from mocme_dist.errors import LockedError, StorageError
from mocme_dist.runs import lease as leases
from mocme_dist.runs.checkpoints import Checkpoints
from mocme_dist.runs.directory import RunDirectory
from mocme_dist.train import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    """An empty S3 with one bucket; the environment of its clients."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    moto.stop()


@pytest.fixture
def bucket(
    server: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> str:
    """Address of a bucket of the test's own; this machine's cache is in the test's folder."""
    import boto3

    for name, value in {**server, "MOCME_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(leases, "SETTLE_S", 0.0)
    name = hashlib.sha256(request.node.name.encode()).hexdigest()[:16]
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


def on_s3(comm: Any, variables: dict[str, str], *args: Any) -> dict[str, Any]:
    os.environ.update(variables)
    return run_with(comm, *args)


def test_from_raw_files_to_answers_without_a_shared_disk(bucket, tiny_raw, tmp_path, monkeypatch, capsys):
    def next_machine() -> None:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)

    for place in (f"{bucket}/graph", str(tmp_path / "here")):
        pack_folder(tiny_raw, place, DataConfig(shard_rows=16))
        extract_features(Dataset.open(place), EncodersConfig(), ("label",), ["numeric"], use_ray=False)
        next_machine()
    both = ("modalities=[structure, numeric]", "fusion.estimator=uniform", "train.log_every=1", "train.projector=0")
    whole = train(tiny_config(tmp_path / "here", tmp_path / "run", *both))
    train(tiny_config(f"{bucket}/graph", f"{bucket}/run", *both, "train.epochs=2"))  # type: ignore[arg-type]
    next_machine()
    report = train(tiny_config(f"{bucket}/graph", f"{bucket}/run", *both))  # type: ignore[arg-type]
    assert (report["mrr"], report["step"]) == (whole["mrr"], whole["step"])
    RemoteStorage(f"{bucket}/run").pull("metrics.jsonl")
    assert losses(RemoteStorage(f"{bucket}/run").path) == losses(tmp_path / "run")
    next_machine()
    monkeypatch.setattr("sys.argv", ["export", f"{bucket}/run", f"{bucket}/bundle"])
    export.main()
    next_machine()
    monkeypatch.setattr("sys.argv", ["query", f"{bucket}/bundle", "--head", "item 05", "--relation", "near", "--json"])
    query.main()
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["answers"]) == 10


def test_a_kill_before_a_manifest_loses_no_checkpoint(bucket, server, run_ranks, tiny_dataset, tmp_path):
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(
            1,
            on_s3,
            server,
            tiny_dataset,
            f"{bucket}/run",
            [str(tmp_path / "cache-a")],
            ("train.epochs=4",),
            "put /MANIFEST.json 3",
        )
    assert sorted(saved.step for saved in Checkpoints(f"{bucket}/run").whole()[0]) == [9, 18]
    whole = train(tiny_config(tiny_dataset, tmp_path / "run", *LINES, "train.epochs=4"))
    report = train(tiny_config(tiny_dataset, f"{bucket}/run", *LINES, "train.epochs=4"))  # type: ignore[arg-type]
    assert (report["mrr"], report["step"]) == (whole["mrr"], whole["step"])
    RemoteStorage(f"{bucket}/run").pull("metrics.jsonl")
    assert losses(RemoteStorage(f"{bucket}/run").path) == losses(tmp_path / "run")


def test_a_store_that_is_not_there_is_told(bucket, monkeypatch):
    mirror = RemoteStorage(f"{bucket}/run")
    mirror.files.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # the client tries again for nine seconds, which shows nothing of ours
    with pytest.raises(
        StorageError, match=r"could not be listed: Could not connect to the endpoint URL: .*; check the address"
    ):
        RemoteStorage(f"{bucket}/run").list()
    mirror.files.clear_instance_cache()


def test_the_store_itself_makes_an_object_once_and_one_of_two_has_the_run(bucket, monkeypatch):
    import boto3

    monkeypatch.setattr(leases, "BEAT_S", 0.1)
    monkeypatch.setattr(leases, "WATCH_S", 60.0)  # the first beat that is seen ends it
    mirror = RemoteStorage(f"{bucket}/run")
    for folder in ("run/", "run/checkpoints/"):  # as a console makes them
        boto3.client("s3").put_object(Bucket=bucket.removeprefix("s3://"), Key=folder, Body=b"")
    assert mirror.list() == {} and mirror.pull() == []
    assert mirror.put_if_absent("lease/once", b"mine") and not mirror.put_if_absent("lease/once", b"theirs")
    assert mirror.get("lease/once") == b"mine"
    with RunDirectory(f"{bucket}/run").lock(), pytest.raises(LockedError, match="is active there"):
        leases.Lease(mirror)
