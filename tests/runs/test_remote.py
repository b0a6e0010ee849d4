"""Runs at URLs: what another machine goes on from, who may write, and what failing stores and kills leave behind."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
from tiny_run import losses, tiny_config

from mocme_dist import evaluate, export
from mocme_dist.data.remote_storage import RemoteStorage
from mocme_dist.errors import CheckpointError, ConfigError, LockedError, Preempted, StorageError
from mocme_dist.runs import checkpoints
from mocme_dist.runs import lease as leases
from mocme_dist.runs.checkpoints import Checkpoints
from mocme_dist.runs.directory import RunDirectory
from mocme_dist.runs.task import run_training
from mocme_dist.train import config_of_run, train

LINES = ("modalities=[structure]", "fusion.estimator=uniform", "train.log_every=1", "train.projector=0")


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("MOCME_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(leases, "SETTLE_S", 0.0)
    monkeypatch.setattr(checkpoints, "RETRY_S", (0.0, 0.0))


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path):
    yield f"file://{tmp_path}/bucket/run" if request.param == "file" else f"memory://{tmp_path.name}/run"
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()


@pytest.fixture
def memory(tmp_path):
    yield f"memory://{tmp_path.name}/run"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """`machine(name)`: from now on this is another machine, with a cache of its own."""
    return lambda name: monkeypatch.setenv("MOCME_CACHE", str(tmp_path / f"cache-{name}"))


def contents(url: str) -> dict[str, str]:
    files, root = fsspec.core.url_to_fs(url)
    files.invalidate_cache()
    return {
        name.removeprefix(root).lstrip("/"): hashlib.sha256(files.cat_file(name)).hexdigest()
        for name in files.find(root)
    }


def steps(url: str) -> list[int]:
    """Of the checkpoints that count."""
    return sorted(saved.step for saved in Checkpoints(url).whole()[0])


def remote_losses(url: str, tmp_path: Path) -> dict[int, float]:
    files, root = fsspec.core.url_to_fs(url)
    (tmp_path / "fetched").mkdir(exist_ok=True)
    files.get_file(f"{root}/metrics.jsonl", str(tmp_path / "fetched" / "metrics.jsonl"))
    return losses(tmp_path / "fetched")


def test_another_machine_goes_on_and_the_curve_does_not_show_it(url, machine, tiny_dataset, tmp_path):
    whole = train(tiny_config(tiny_dataset, tmp_path / "here", *LINES))
    machine("a")
    train(tiny_config(tiny_dataset, url, *LINES, "train.epochs=2"))
    machine("b")
    report = train(tiny_config(tiny_dataset, url, *LINES))
    assert {key: report[key] for key in ("mrr", "step")} == {key: whole[key] for key in ("mrr", "step")}
    assert remote_losses(url, tmp_path) == losses(tmp_path / "here")
    there = contents(url)
    assert {"config.yaml", "metrics.json", "metrics.jsonl", "run_status.json"} <= there.keys()
    assert any(name.startswith("tensorboard/") for name in there)
    assert not [name for name in there if name.split("/")[0] in ("lock", "stop", "unsent", "ray", "dataset")]
    assert steps(url) == [int(p.name[5:]) for p in sorted((tmp_path / "here" / "checkpoints").iterdir())]
    assert json.loads(RemoteStorage(url).get("run_status.json"))["state"] == "done"


def run_with(
    comm: Any, dataset: Path, url: str, caches: list[str], overrides: tuple[str, ...], kill: str | None = None
) -> dict[str, Any]:
    """Body of one rank: a training whose ranks have a cache each.

    `kill` names the write before which rank 0 is killed.
    """
    os.environ["MOCME_CACHE"] = caches[comm.rank]
    leases.SETTLE_S, checkpoints.RETRY_S = 0.0, (0.0,)
    if kill and comm.rank == 0:
        _kill_before(*kill.split(" "))
    config = tiny_config(dataset, url, *LINES, *overrides)
    if comm.rank:
        return run_training(config)
    with RunDirectory(url).lock() as lease:
        assert lease is not None
        Checkpoints(url).inherit(lease, lambda: None)
        return run_training(config, held=lease.held)


def _kill_before(what: str, pattern: str, count: str) -> None:
    """Die at the so-manyth call of a RemoteStorage method whose name argument has the pattern in it."""
    original, left = getattr(RemoteStorage, what), [int(count)]

    def method(self: RemoteStorage, *args: Any, **kwargs: Any) -> Any:
        if any(pattern in str(arg) for arg in args):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **kwargs)

    setattr(RemoteStorage, what, method)


@pytest.fixture(scope="module")
def undisturbed(
    tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[int, float], float, dict[str, str]]:
    """Curve, test MRR and last tensors of a run on a disk, of five epochs."""
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    report = train(tiny_config(tiny_dataset, path, *LINES, "train.epochs=5"))
    last = max((path / "checkpoints").iterdir())
    return (
        losses(path),
        report["mrr"],
        {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in last.glob("*.safetensors")},
    )


# Checkpoints are of the steps 9, 18, 27, ...; two stay and the best. Each is sent as rows, dense, curve, manifest.
KILLS = {
    "between-parts": ("put dense 3", [9, 18]),
    "before-the-curve": ("put metrics.jsonl 5", [9, 18]),
    "before-the-manifest": ("put /MANIFEST.json 3", [9, 18]),
    "in-the-purge-after-a-manifest": ("remove step_0000000009 2", [18, 27]),
}


@pytest.mark.parametrize("kill, left", KILLS.values(), ids=KILLS)
def test_a_kill_between_two_writes_loses_no_checkpoint(
    run_ranks, tiny_dataset, undisturbed, machine, tmp_path, kill, left
):
    url = f"file://{tmp_path}/bucket/run"
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(1, run_with, tiny_dataset, url, [str(tmp_path / "cache-a")], ("train.epochs=5",), kill)
    machine("b")
    assert steps(url) == left
    config = tiny_config(tiny_dataset, url, *LINES, "train.epochs=5")
    report = train(config)
    curve, mrr, hashes = undisturbed
    assert (remote_losses(url, tmp_path), report["mrr"]) == (curve, mrr)
    last = Checkpoints(url).whole()[0][0]
    assert {name: entry["sha256"] for name, entry in last.manifest["files"].items()} == hashes
    orphans = {name.split("/")[1] for name in contents(url) if name.startswith("checkpoints/")} - {
        s.path.name for s in Checkpoints(url).whole()[0]
    }
    assert not orphans


def test_ranks_on_machines_of_their_own_write_one_checkpoint_and_each_fetches_its_part(
    run_ranks, tiny_dataset, undisturbed, tmp_path
):
    url, caches = f"file://{tmp_path}/bucket/run", [str(tmp_path / f"cache-{name}") for name in "abcde"]
    run_ranks(2, run_with, tiny_dataset, url, caches[:2], ("train.epochs=3",))
    for cache, files in zip(
        caches, ({"rows-00000", "dense", "MANIFEST"}, {"rows-00001", "MANIFEST", "dense"}), strict=False
    ):
        kept = {path.name.split(".")[0] for path in Path(cache).rglob("checkpoints/step_*/*")}
        assert kept == files  # the second fetched the dense part, which it had not written, for the report
    # Now on three machines, none of which has seen the run.
    reports = run_ranks(3, run_with, tiny_dataset, url, caches[2:], ("train.epochs=5",))
    curve, mrr, _ = undisturbed
    assert remote_losses(url, tmp_path) == pytest.approx(curve, rel=1e-4)
    assert [report["mrr"] for report in reports] == pytest.approx([mrr] * 3, abs=1e-3)
    resumed = [
        {path.name for path in Path(cache).rglob("checkpoints/step_0000000027-1-*/rows-*")} for cache in caches[2:]
    ]
    assert resumed == [set()] * 3 or [len(names) for names in resumed] == [1, 2, 1]


def test_a_living_run_is_not_disturbed_and_a_silent_one_is_taken_over(url, monkeypatch, machine, tiny_dataset, caplog):
    monkeypatch.setattr(leases, "BEAT_S", 0.05)
    monkeypatch.setattr(leases, "WATCH_S", 60.0)  # the first beat that is seen ends it
    machine("a")
    with RunDirectory(url).lock() as lease:
        assert lease is not None
        machine("b")
        with pytest.raises(
            LockedError,
            match=rf"a run of process {os.getpid()} on {socket.gethostname()} since 20\d\d-.* is active there",
        ) as error:
            train(tiny_config(tiny_dataset, url, *LINES))
        assert error.value.exit_code == 6
        # Its machine loses the network, and comes back after another one has gone on.
        monkeypatch.setattr(lease, "_mine", {**lease._mine, "host": "elsewhere"})
        deadline = time.monotonic() + 60
        while b"elsewhere" not in (lease.storage.get("lease/0000000001.json") or b"") and time.monotonic() < deadline:
            time.sleep(0.01)
        lease._over.set()
        lease._thread.join()
        monkeypatch.setattr(leases, "WATCH_S", 0.5)
        with RunDirectory(url).lock() as second:
            assert second is not None and second.held.number == lease.held.number + 1
            assert "on elsewhere since" in caplog.text and "is taken over" in caplog.text
            with pytest.raises(LockedError, match="commits nothing there any more"):
                lease.held.check(RemoteStorage(url))
            second.held.check(RemoteStorage(url))
    with RunDirectory(url).lock() as third:  # at once: the second has let go
        assert third is not None and third.held.number == 3
    assert len(RemoteStorage(url).list("lease/*")) == 1


def test_a_holder_that_wakes_up_late_stops_its_process(memory, monkeypatch):
    monkeypatch.setattr(leases, "BEAT_S", 0.05)
    signals: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    try:
        with RunDirectory(memory).lock():
            RemoteStorage(memory).put_if_absent("lease/0000000002.json", b"{}")
            deadline = time.monotonic() + 60
            while not signals and time.monotonic() < deadline:
                time.sleep(0.02)
        assert signals == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert RemoteStorage(memory).get("lease/0000000002.json") == b"{}"


def test_an_object_is_made_once(url):
    assert RemoteStorage(url).put_if_absent("lease/1", b"mine")
    assert not RemoteStorage(url).put_if_absent("lease/1", b"theirs")
    assert RemoteStorage(url).get("lease/1") == b"mine" and RemoteStorage(url).get("lease/2") is None
    assert RemoteStorage(url).put("lease/1", b"again") is None and RemoteStorage(url).get("lease/1") == b"again"
    assert list(RemoteStorage(url).list()) == ["lease/1"]


def test_what_a_run_commits_after_it_was_taken_over_neither_counts_nor_harms(
    memory, machine, tiny_dataset, undisturbed, monkeypatch, tmp_path
):
    machine("a")
    config, successors = tiny_config(tiny_dataset, memory, *LINES, "train.epochs=5"), []
    check, looks = leases.Held.check, []

    def overtaken(self, storage):
        """A look at the lease, after which another machine takes over: before the manifest of step 18."""
        check(self, storage)
        looks.append(any(name.startswith("checkpoints/step_0000000018-1-") for name in storage.list()))
        if sum(looks) == 2:  # the first is for the curve
            monkeypatch.setattr(leases.Held, "check", check)
            storage.put("lease/0000000001.json", json.dumps({"ended": True}).encode())
            machine("b")
            successors.append(RunDirectory(memory).lock())
            Checkpoints(memory).inherit(successors[0].__enter__(), lambda: None)
            machine("a")

    monkeypatch.setattr(leases.Held, "check", overtaken)
    with pytest.raises(LockedError, match=r"taken over by process \d+ on") as error:
        train(config)
    assert error.value.exit_code == 6 and str(tmp_path / "cache-a") in str(error.value)
    successors[0].__exit__(None, None, None)
    late = {name for name in contents(memory) if name.startswith("checkpoints/step_0000000018-1-")}
    assert {name.split("/")[2] for name in late} == {"MANIFEST.json", "rows-00000.safetensors", "dense.safetensors"}
    assert steps(memory) == [9] and evaluate_there(memory)["step"] == 9
    machine("b")
    assert train(config)["mrr"] == undisturbed[1]
    assert remote_losses(memory, tmp_path) == undisturbed[0] and late <= contents(memory).keys()


def evaluate_there(url: str, *overrides: str) -> dict[str, Any]:
    from mocme_dist.runs.task import run_evaluation

    return run_evaluation(config_of_run(url, overrides=["launch.mode=local", *overrides]), "test", "auto")


def test_who_reads_leaves_everything_as_it_is(url, machine, tiny_dataset, monkeypatch, capsys, tmp_path):
    machine("a")
    report = train(tiny_config(tiny_dataset, url, *LINES))
    with RunDirectory(url).lock():  # the next run of it is being prepared
        before = contents(url)
        machine("b")
        assert evaluate_there(url)["mrr"] == report["mrr"]
        monkeypatch.setattr("sys.argv", ["evaluate", url, "--step", "18", "--set", "launch.mode=local"])
        evaluate.main()
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == 18
        monkeypatch.setattr("sys.argv", ["export", url, str(tmp_path / "bundle")])
        export.main()
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_entities"] == 60
        assert contents(url) == before
    with pytest.raises(CheckpointError, match="no checkpoint of step 8; it has 27, 18"):
        monkeypatch.setattr("sys.argv", ["evaluate", url, "--step", "8", "--set", "launch.mode=local"])
        evaluate.main()


def test_who_reads_beside_a_purge_takes_the_checkpoint_that_is_there_now(
    memory, machine, tiny_dataset, undisturbed, monkeypatch
):
    machine("a")
    train(tiny_config(tiny_dataset, memory, *LINES, "train.epochs=2"))
    machine("b")
    fetch, gone = RemoteStorage.fetch, []

    def slow(self: RemoteStorage, name: str, size: int) -> Path:
        """Before the first tensors come, the run goes on and removes their checkpoint."""
        if not gone and name.endswith("safetensors"):
            gone.append(name)
            here = os.environ["MOCME_CACHE"]
            machine("a")
            train(tiny_config(tiny_dataset, memory, *LINES, "train.epochs=5"))
            os.environ["MOCME_CACHE"] = here
        return fetch(self, name, size)

    monkeypatch.setattr(RemoteStorage, "fetch", slow)
    assert evaluate_there(memory)["mrr"] == undisturbed[1]
    assert not RemoteStorage(memory).list(gone[0])


@pytest.mark.parametrize("failures", [1, 9])
def test_the_end_of_a_run_outlasts_a_moment_without_the_store(memory, tiny_dataset, monkeypatch, failures):
    put, calls = RemoteStorage.put, []

    def failing(self: RemoteStorage, name: str, local: Path) -> None:
        if name == "run_status.json" and json.loads(local.read_text())["state"] == "done":
            calls.append(name)
            if len(calls) <= failures:
                raise StorageError("no answer")
        put(self, name, local)

    monkeypatch.setattr(RemoteStorage, "put", failing)
    config = tiny_config(tiny_dataset, memory, *LINES, "train.epochs=1")
    if failures == 1:
        train(config)
        assert json.loads(RemoteStorage(memory).get("run_status.json") or b"")["state"] == "done"
        return
    with pytest.raises(
        StorageError, match=r"no answer; files that were not sent are in .*; run the same command on this machine"
    ):
        train(config)


class Outage(Exception):
    """As the libraries of stores raise them: no OSError."""


def break_store(monkeypatch: pytest.MonkeyPatch, url: str, first: int, last: float) -> None:
    """From now on the sending of checkpoints' files fails from the `first` to before the `last` time."""
    calls: list[str] = []
    store = type(RemoteStorage(url).files)
    put = store.put_file

    def failing(self: Any, local: str, name: str, **kwargs: Any) -> None:
        if "/checkpoints/" in name:
            calls.append(name)
            if first <= len(calls) < last:
                raise Outage("no answer")
        put(self, local, name, **kwargs)

    monkeypatch.setattr(store, "put_file", failing)


def test_a_store_that_fails_for_a_while_costs_warnings(
    memory, tiny_dataset, undisturbed, monkeypatch, caplog, tmp_path
):
    break_store(monkeypatch, memory, 4, 9)  # the whole second checkpoint, and what follows
    report = train(tiny_config(tiny_dataset, memory, *LINES, "train.epochs=5"))
    assert "is saved here and not sent yet" in caplog.text
    assert (remote_losses(memory, tmp_path), report["mrr"]) == undisturbed[:2]
    assert len(steps(memory)) >= 2 and not list((RemoteStorage(memory).path / "unsent").iterdir())


def test_a_store_that_fails_to_the_end_costs_an_error_and_the_same_command_sends_all(
    url, machine, tiny_dataset, undisturbed, monkeypatch, tmp_path
):
    machine("a")
    config = tiny_config(tiny_dataset, url, *LINES, "train.epochs=5")
    with monkeypatch.context() as patch:
        break_store(patch, url, 4, float("inf"))
        with pytest.raises(
            StorageError,
            match=r"does not take checkpoint step_0000000045-1-.*; it is in .*cache-a/.*/unsent; run the same",
        ) as error:
            train(config)
    assert error.value.exit_code == 7 and steps(url) == [9]
    assert json.loads(RemoteStorage(url).get("run_status.json"))["state"] == "failed"
    report = train(config)
    assert report["step"] in steps(url) and 45 in steps(url)
    assert (remote_losses(url, tmp_path), report["mrr"]) == undisturbed[:2]
    assert not list((RemoteStorage(url).path / "unsent").iterdir())


def test_unsent_checkpoints_stay_where_another_machine_went_on(
    machine, tiny_dataset, undisturbed, monkeypatch, caplog, tmp_path
):
    url = f"file://{tmp_path}/bucket/run"
    machine("a")
    config = tiny_config(tiny_dataset, url, *LINES, "train.epochs=5")
    with monkeypatch.context() as patch, pytest.raises(StorageError):
        break_store(patch, url, 4, float("inf"))
        train(config)
    machine("b")
    assert train(config)["mrr"] == undisturbed[1]
    before = contents(url)
    machine("a")
    waiting = sorted((RemoteStorage(url).path / "unsent").iterdir())
    assert train(config)["mrr"] == undisturbed[1]
    assert "another run has continued from an earlier one meanwhile" in caplog.text
    assert waiting == sorted((RemoteStorage(url).path / "unsent").iterdir()) != []

    def same(found):
        return {name: digest for name, digest in found.items() if name.startswith("checkpoints/")}

    assert same(contents(url)) == same(before)


def test_parts_that_arrived_from_other_machines_are_committed_by_the_next_run(
    run_ranks, tiny_dataset, undisturbed, machine, tmp_path
):
    url, caches = f"file://{tmp_path}/bucket/run", [str(tmp_path / "cache-a"), str(tmp_path / "cache-b")]
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(2, run_with, tiny_dataset, url, caches, ("train.epochs=3",), "put /MANIFEST.json 2")
    assert steps(url) == [9]
    machine("a")
    report = train(tiny_config(tiny_dataset, url, *LINES, "train.epochs=5", "train.num_to_keep=9"))
    assert any(name.startswith("checkpoints/step_0000000018-1-") for name in contents(url))
    assert report["mrr"] == pytest.approx(undisturbed[1], abs=1e-3)
    assert remote_losses(url, tmp_path) == pytest.approx(undisturbed[0], rel=1e-4)


def test_going_back_sets_later_checkpoints_aside_and_deletes_none(memory, machine, tiny_dataset, undisturbed, tmp_path):
    machine("a")
    train(tiny_config(tiny_dataset, memory, *LINES, "train.num_to_keep=9"))
    assert steps(memory) == [9, 18, 27]
    machine("b")
    with pytest.raises(CheckpointError, match="no checkpoint of step 10"):
        train(tiny_config(tiny_dataset, memory, *LINES, "run.resume='10'"))
    assert steps(memory) == [9, 18, 27]
    old = {name for name in contents(memory) if "-1-" in name}
    report = train(tiny_config(tiny_dataset, memory, *LINES, "train.num_to_keep=9", "train.epochs=5", "run.resume='9'"))
    assert steps(memory) == [9, 18, 27, 36, 45] and report["mrr"] == undisturbed[1]
    assert old <= contents(memory).keys()
    train(tiny_config(tiny_dataset, memory, *LINES, "train.num_to_keep=9", "train.epochs=1", "run.resume=none"))
    assert steps(memory) == [9] and list(remote_losses(memory, tmp_path)) == list(range(1, 10))
    assert old <= contents(memory).keys()


@pytest.mark.parametrize("damage", [b"cut", None])
def test_a_checkpoint_that_is_damaged_there_has_the_one_before_it_as_stand_in(
    memory, machine, tiny_dataset, undisturbed, caplog, tmp_path, damage
):
    machine("a")
    train(tiny_config(tiny_dataset, memory, *LINES))
    files, root = fsspec.core.url_to_fs(memory)
    (name,) = files.glob(f"{root}/checkpoints/step_0000000027-*/rows-00000.safetensors")
    content = files.cat_file(name)
    files.pipe_file(name, damage or content[:-1] + bytes([content[-1] ^ 1]))
    machine("b")
    assert train(tiny_config(tiny_dataset, memory, *LINES, "train.epochs=5"))["mrr"] == undisturbed[1]
    assert (
        "step_0000000027" in caplog.text
        and "is left out" in caplog.text
        and remote_losses(memory, tmp_path) == undisturbed[0]
    )


def test_a_stopped_run_is_there_before_its_command_ends(memory, machine, tiny_dataset, undisturbed, tmp_path):
    machine("a")
    config = tiny_config(tiny_dataset, memory, *LINES, "train.epochs=5")
    asked = iter(range(1, 100))
    with RunDirectory(memory).lock() as lease, pytest.raises(Preempted, match="stopped at step 5"):
        assert lease is not None
        run_training(config, lambda: next(asked) >= 5, held=lease.held)
    assert steps(memory) == [5]
    machine("b")
    assert train(config)["mrr"] == undisturbed[1] and remote_losses(memory, tmp_path) == undisturbed[0]


def test_other_folders_are_refused_and_what_was_deleted_there_does_not_come_back(
    memory, tiny_dataset, undisturbed, tmp_path
):
    files, root = fsspec.core.url_to_fs(memory)
    RemoteStorage(memory).put("theirs.txt", b"x")
    config = tiny_config(tiny_dataset, memory, *LINES, "train.epochs=5")
    with pytest.raises(ConfigError, match="not empty and not a run directory"):
        train(config)
    assert list(contents(memory)) == ["theirs.txt"]
    files.rm(root, recursive=True)
    train(tiny_config(tiny_dataset, memory, *LINES))
    before = {name for name in contents(memory) if "tfevents" in name}
    files.rm(root, recursive=True)
    train(config)
    assert remote_losses(memory, tmp_path) == undisturbed[0]
    assert before and not before & contents(memory).keys()


def test_a_run_directory_that_was_copied_there_goes_on(memory, tiny_dataset, undisturbed, tmp_path):
    train(tiny_config(tiny_dataset, tmp_path / "run", *LINES))
    files, root = fsspec.core.url_to_fs(memory)
    files.put(str(tmp_path / "run"), root, recursive=True)
    assert train(tiny_config(tiny_dataset, memory, *LINES, "train.epochs=5"))["mrr"] == undisturbed[1]
    assert remote_losses(memory, tmp_path) == undisturbed[0]


def test_a_worker_that_has_no_lease_does_not_train(memory, tiny_dataset):
    with pytest.raises(ConfigError, match="which takes its lease"):
        run_training(tiny_config(tiny_dataset, memory, *LINES))


@pytest.mark.parametrize(
    "lie",
    [
        {"files": {"../../../../escaped": {"bytes": -1, "sha256": hashlib.sha256(b"evil").hexdigest()}}},
        {"files": {"/tmp/escaped": {"bytes": 4, "sha256": hashlib.sha256(b"evil").hexdigest()}}},
        {"step": 9},
        {"num_rows": 61},
    ],
)
def test_a_strangers_checkpoint_reaches_nothing_outside_the_mirror_and_an_older_one_counts(
    tmp_path, tiny_dataset, machine, lie
):
    url = f"file://{tmp_path}/bucket/run"
    train(tiny_config(tiny_dataset, url, *LINES))
    assert steps(url) == [18, 27]
    newest = next((tmp_path / "bucket/run/checkpoints").glob("step_0000000027-*"))
    manifest = json.loads((newest / "MANIFEST.json").read_text())
    lie = {**lie, "files": manifest["files"] | lie.get("files", {})}
    (newest / "MANIFEST.json").write_text(json.dumps({**manifest, **lie}))
    # a file: URL is a path, so a name that climbs reaches what lies beside the run
    (tmp_path / "escaped").write_bytes(b"evil")
    before = set(tmp_path.rglob("escaped"))
    machine("b")
    saved = Checkpoints(url).find()
    assert saved is not None and saved.step == 18
    assert set(tmp_path.rglob("escaped")) == before
