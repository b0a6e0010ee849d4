"""Targets of `tools.fuzz` that need a run and its bundle: files of both, questions, requests and uploads, RDF.

Files that a manifest pins are edited together with the manifest's size and hash, because the author of a hostile bundle
writes both. A request may be refused with any status but 500.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np

from mocme_dist.config import load_config
from mocme_dist.config.schema import DataConfig
from mocme_dist.data.dataset import Dataset
from mocme_dist.data.packing import pack_folder
from mocme_dist.encoders.pipeline import extract_features
from mocme_dist.errors import MocmeError
from mocme_dist.evidence.blend import load_blend
from mocme_dist.importers.rdf import import_rdf
from mocme_dist.observe.log import truncate_curve
from mocme_dist.runs.checkpoints import Checkpoints
from mocme_dist.runs.directory import RunDirectory
from mocme_dist.runs.lock import describe, parse
from mocme_dist.runs.status import State
from mocme_dist.serving.batch import check_names, read_candidates, read_questions
from mocme_dist.serving.bundle import Bundle
from mocme_dist.serving.bundle_format import MANIFEST
from mocme_dist.serving.export import export_bundle
from mocme_dist.serving.report import read_report
from mocme_dist.serving.rows import RunRows
from mocme_dist.serving.service import ServiceSettings, make_app
from mocme_dist.train import resolve_paths, train
from mocme_dist.training import checkpoint
from mocme_dist.training.build import open_dataset

SETTINGS = (
    "launch.mode=local",
    "deepspeed.engine=torch",
    "compile=off",
    "experts.width=8",
    "experts.num_experts=2",
    "mine.hidden=4",
    "negatives.count=8",
    "negatives.chunk_size=8",
    "train.batch_size=16",
    "train.epochs=2",
    "train.eval_every=1",
    "train.checkpoint_every=1",
    "evidence.spaces=all",
    "encoders.text.model=tiny-random",
    "encoders.text.random_weights=true",
    "encoders.image.model=torchvision:mobilenet_v3_small",
    "encoders.image.random_weights=true",
    "encoders.image.size=32",
    "encoders.max_pixels=10000",
)
RELATION = "near"
BOUNDARY = "0123456789abcdef"


def make_run(folder: Path) -> tuple[Path, Path]:
    """Train a run on a ring of twelve entities with text, numbers and pictures; return it and its bundle."""
    from PIL import Image

    raw = folder / "ring"
    (raw / "images").mkdir(parents=True)
    names = [f"item {number:02d}" for number in range(12)]
    facts = [f"{name}\t{RELATION}\t{names[(place + step) % 12]}" for step in (1, 2) for place, name in enumerate(names)]
    for split, lines in (("train", facts[:18]), ("valid", facts[18:21]), ("test", facts[21:])):
        (raw / f"{split}.txt").write_text("\n".join(lines) + "\n")
    (raw / "text.tsv").write_text("entity\tlabel\n" + "".join(f"{name}\tlabel of {name}\n" for name in names))
    numbers = "".join(f"{name}\tsize\t{place}\n" for place, name in enumerate(names))
    (raw / "numeric.tsv").write_text(f"entity\tattribute\tvalue\n{numbers}")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    rows = []
    for name, picture in zip(names, pixels, strict=True):
        file = f"images/{name.replace(' ', '_')}.png"
        Image.fromarray(picture).save(raw / file)
        rows.append(f"{name}\t{file}\n")
    (raw / "images.tsv").write_text("entity\tfile\n" + "".join(rows))
    dataset = pack_folder(raw, folder / "ring.packed", DataConfig(allow_leakage=True)).directory
    run, bundle = folder / "ring.run", folder / "ring.bundle"
    config = resolve_paths(load_config([], [*SETTINGS, f"data.dataset={dataset}", f"run.dir={run}"]))
    extract_features(Dataset.open(dataset), config.encoders, ("label",), ["text", "image", "numeric"], use_ray=False)
    train(config)
    saved = Checkpoints(run).find("auto", best=True)
    assert saved is not None
    export_bundle(RunRows(config, open_dataset(config.data), saved), bundle)
    return run, bundle


@contextmanager
def _edited(path: Path, content: bytes, manifest: Path | None = None) -> Iterator[None]:
    """Hold `content` in a file, with its entry in a manifest, and put both back."""
    before = {place: place.read_bytes() for place in (path, manifest) if place is not None}
    path.write_bytes(content)
    if manifest is not None:
        value = json.loads(before[manifest])
        value["files"][path.name] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest.write_text(json.dumps(value))
    try:
        yield
    finally:
        for place, kept in before.items():
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(kept)


def _in(path: Path, read: Callable[[], Any], manifest: Path | None = None) -> Callable[[bytes, Path], Any]:
    """Return a parser that edits a file of a folder while `read` reads the folder."""

    def parse_file(content: bytes, _: Path) -> Any:
        with _edited(path, content, manifest):
            return read()

    return parse_file


def _run_parsers(run: Path) -> dict[str, tuple[list[Path], Callable[[bytes, Path], Any], bool]]:
    """Return (examples, parser, whether it is JSON) by name, of the files of a run."""
    directory, checkpoints = RunDirectory(run), Checkpoints(run)
    newest = checkpoints.find("auto")
    assert newest is not None
    manifest, dense = newest.path / "MANIFEST.json", newest.path / checkpoint.DENSE
    rows = next(path for path in newest.path.glob("*.safetensors") if path != dense)
    status = run / "run_status.json"

    def read_status() -> Any:
        State(directory)
        return directory.write_progress(step=1)

    def tensors() -> Any:
        saved = checkpoint.read_manifest(newest.path)
        with suppress(MocmeError):
            checkpoint.load_dense(saved)
        return checkpoint.read_rows(saved, 0, 12)

    return {
        "status": ([status], _in(status, read_status), True),
        "curve": ([directory.curve], _in(directory.curve, lambda: truncate_curve(directory.curve, 3)), False),
        "report": (
            [directory.metrics],
            _in(directory.metrics, lambda: (directory.read_report(), read_report(run))),
            True,
        ),
        "run configuration": ([directory.config], _in(directory.config, directory.read_config), False),
        "checkpoint": ([manifest], _in(manifest, lambda: checkpoint.read_manifest(newest.path)), True),
        "checkpoint rows": ([rows], _in(rows, tensors, manifest), False),
        "checkpoint dense": ([dense], _in(dense, tensors, manifest), False),
        "blend": ([directory.blend], _in(directory.blend, lambda: load_blend(directory.blend)), False),
    }


def _bundle_parsers(bundle: Path) -> dict[str, tuple[list[Path], Callable[[bytes, Path], Any], bool]]:
    """Return (examples, parser, whether it is JSON) by name, of the files of a bundle."""
    manifest = bundle / MANIFEST

    def ask() -> Any:
        opened = Bundle.open(bundle, verify=True)
        return opened.predict("item 00", RELATION), opened.facts("item 01"), opened.metrics, opened.card

    found = {"bundle manifest": ([manifest], _in(manifest, ask), True)}
    for path in (bundle / "vectors-00000.safetensors", bundle / "entities.parquet", bundle / "known_all_targets.npy"):
        found[f"bundle {path.name}"] = ([path], _in(path, ask, manifest), False)
    return found


def _request(app: Any, scope: MutableMapping[str, Any], body: bytes) -> int:
    """Send one request to an ASGI application; return the status of the answer."""
    status: list[int] = []
    sent = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        return next(sent, {"type": "http.disconnect"})

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            status.append(message["status"])

    asyncio.run(asyncio.wait_for(app(scope, receive, send), 60))
    return status[0]


def _scope(method: str, path: str, query: bytes = b"", headers: tuple[tuple[bytes, bytes], ...] = ()) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": quote(path).encode(),
        "root_path": "",
        "query_string": query,
        "headers": [(b"host", b"127.0.0.1"), *headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }


def _get(app: Any) -> Callable[[bytes, Path], Any]:
    def parse_request(content: bytes, _: Path) -> None:
        path, query = (content + b"?").split(b"?", 2)[:2]
        status = _request(app, _scope("GET", path.decode("utf8", "replace"), query), b"")
        assert status < 500, f"status {status}"

    return parse_request


def _post(app: Any, path: str, kind: bytes) -> Callable[[bytes, Path], Any]:
    def parse_request(content: bytes, _: Path) -> None:
        headers = ((b"content-type", kind), (b"content-length", str(len(content)).encode()))
        status = _request(app, _scope("POST", path, b"", headers), content)
        assert status < 500, f"status {status}"

    return parse_request


def _upload(picture: bytes) -> bytes:
    fields = {"name": "new", "text": "an item", "numbers": '{"size": 3.5}', "relation": RELATION, "top": "3"}
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode()
        for key, value in fields.items()
    ]
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n'
    parts += [head.encode() + b"Content-Type: image/png\r\n\r\n" + picture + b"\r\n", f"--{BOUNDARY}--\r\n".encode()]
    return b"".join(parts)


def _service_parsers(bundle: Path, picture: bytes) -> dict[str, tuple[list[bytes], Callable[[bytes, Path], Any], bool]]:
    """Return (examples, parser, whether it is JSON) by name, of the requests of the service."""
    app = make_app(ServiceSettings(places={"ring": str(bundle)}))
    asked = urlencode({"head": "item 00", "relation": RELATION, "top": 3}).encode()
    paths = [b"/predict?" + asked, b"/explain?" + asked + b"&answer=item+01", b"/search?text=item&limit=5"]
    paths += [b"/entity/item 00", b"/relations?entity=item+00", b"/alike?entity=item+00", b"/page/index.html"]
    many = json.dumps({"questions": [{"head": "item 00", "relation": RELATION}], "top": 3}).encode()
    form = f"multipart/form-data; boundary={BOUNDARY}".encode()
    return {
        "request": (paths, _get(app), False),
        "questions by HTTP": ([many], _post(app, "/predict", b"application/json"), True),
        "upload": ([_upload(picture)], _post(app, "/new", form), False),
    }


def _text_parsers(bundle: Bundle) -> dict[str, tuple[list[bytes], Callable[[bytes, Path], Any], bool]]:
    """Return (examples, parser, whether it is JSON) by name, of what users write."""

    def written(name: str, content: bytes, folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    def questions(content: bytes, folder: Path) -> None:
        path = written("q.tsv", content, folder)
        check_names(bundle, read_questions(path), path)

    def rdf(name: str) -> Callable[[bytes, Path], Any]:
        def parse_rdf(content: bytes, folder: Path) -> None:
            shutil.rmtree(folder / "out", ignore_errors=True)
            import_rdf(written(name, content, folder), folder / "out")

        return parse_rdf

    def description(content: bytes, _: Path) -> None:
        encoder.describe(content.decode("utf8", "surrogateescape"))

    import gzip

    encoder = bundle.unseen_encoder()
    line = '<http://a/{0}> <http://a/r> <http://a/{1}> .\n<http://a/{0}> <http://a/label> "name {0}"@en .\n'
    triples = "".join(line.format(number, number + 1) for number in range(6)).encode()
    turtle = b'@prefix a: <http://a/> .\na:x a:r a:y, a:z ; a:size 3.5 ; a:label "x"@en .\n'
    turtle += b"a:y a:r a:z, a:x .\na:z a:r a:x .\n"
    return {
        "questions": ([f"item 00\t{RELATION}\t?\n?\t{RELATION}\titem 01\n".encode()], questions, False),
        "candidates": (
            [b"item 00\nitem 01\n"],
            lambda content, folder: read_candidates(written("c.txt", content, folder), bundle),
            False,
        ),
        "description": ([b"name=new,text=an item,size=3"], description, False),
        "lock": (
            [json.dumps({"pid": os.getpid(), "host": "here", "since": "now", "token": "t", "beats": 3}).encode()],
            lambda content, _: describe(parse(content)),
            True,
        ),
        "N-Triples": ([triples], rdf("x.nt"), False),
        "Turtle": ([turtle], rdf("x.ttl"), False),
        "RDF in gzip": ([gzip.compress(triples, mtime=0)], rdf("x.nt.gz"), False),
    }


def run_targets(
    run: Path, bundle: Path, folder: Path
) -> dict[str, tuple[list[bytes], Callable[[bytes, Path], Any], bool]]:
    """Return (examples, parser, whether it is JSON) by name; the files of copies in `folder` are edited.

    The service and the lists of names use the whole bundle, whose files do not change.
    """
    os.environ["MOCME_CACHE"] = str(folder / "cache")
    run, own = (
        Path(shutil.copytree(run, folder / "edited.run")),
        Path(shutil.copytree(bundle, folder / "edited.bundle")),
    )
    pictures = sorted((folder / "ring" / "images").glob("*.png"))
    picture = pictures[0].read_bytes() if pictures else b"\x89PNG\r\n\x1a\n"
    files = {**_run_parsers(run), **_bundle_parsers(own)}
    return {
        **{name: ([path.read_bytes() for path in paths], parse, json) for name, (paths, parse, json) in files.items()},
        **_text_parsers(Bundle.open(bundle)),
        **_service_parsers(bundle, picture),
    }
