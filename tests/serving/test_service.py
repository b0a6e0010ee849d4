"""The endpoint as a client meets it: a real server over a tiny bundle with planted markup, and what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

from service_client import MARKUP, Server, listening, with_markup

from mocme_dist.errors import ConfigError
from mocme_dist.serving.service_answers import names_of
from mocme_dist.serving.service_guard import read_token
from mocme_dist.serving.service_media import has_coordinates


@pytest.fixture(scope="module")
def server(bundle_dir: Path, answered_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    marked = with_markup(bundle_dir, tmp_path_factory.mktemp("served") / "marked")
    dataset = answered_run.parent / "dataset"
    running = Server(str(bundle_dir), str(marked), "--data", str(dataset), "--trust-encoders")
    yield running
    running.stop()


def test_answers_are_those_of_the_bundle(server, bundle):
    reply = server.get("/predict", head="item 05", relation="near", top=4)
    expected = bundle.predict("item 05", "near", k=4)
    answers = reply.json["answers"]
    assert reply.status == 200 and [row["id"] for row in answers] == expected["id"].tolist()
    assert np.allclose([row["score"] for row in answers], expected["score"], atol=1e-5)
    assert reply.json["head"]["id"] == "item 05" and reply.json["tail"] is None
    # one name per column, in the answers of the endpoint, of the command line and of Python
    columns = {"rank", "id", "label", "score", "probability", "known", "direction"}
    assert all(set(answer) == columns | {"thumbnail"} for answer in answers) and columns <= set(expected.columns)
    command = [
        sys.executable,
        "-m",
        "mocme_dist.query",
        str(bundle.directory),
        "--head",
        "item 05",
        "--relation",
        "near",
    ]
    printed = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True).stdout)
    assert all(set(answer) == columns for answer in printed["answers"])


def test_a_map_is_offered_only_where_numbers_are_coordinates(server):
    assert not has_coordinates(["size", "year", "latitude"]) and has_coordinates(["Lat", "size", "LON"])
    about = server.get("/bundles").json["bundles"][0]
    assert about["media"] and about["map"] == bool(server.get("/map").json["points"])


def test_many_questions_at_once_are_answered_as_one_by_one(server):
    questions = [{"head": f"item {n:02d}", "relation": "near"} for n in range(20)]
    body = json.dumps({"questions": questions, "top": 3}).encode()
    together = server.ask("/predict", "POST", body, Content_Type="application/json").json["results"]
    alone: list[Any] = [None] * len(questions)

    def ask(at: int) -> None:
        alone[at] = server.get("/predict", top=3, **questions[at]).json

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert 'mocme_requests_total{route="/predict",status="200"}' in server.get("/metrics").body.decode()


def test_an_entity_has_facts_texts_numbers_and_pictures(server, bundle):
    every = (server.get(f"/entity/item%20{number:02d}").json for number in range(60))
    about = next(one for one in every if one["media"] and one["texts"] and one["numbers"])
    assert about["weights"]
    assert {group["direction"] for group in about["facts"]} <= {"tail", "head"}
    total = sum(group["count"] for group in about["facts"])
    entity = bundle.entities.id_of(about["id"])
    width = 2 * bundle.num_relations
    low, high = np.searchsorted(bundle.known.keys, [entity * width, (entity + 1) * width])
    assert total == bundle.known.offsets[high] - bundle.known.offsets[low]
    [picture] = [file for file in about["media"] if file["modality"] == "image"][:1]
    whole = server.ask(f"/{picture['url']}")
    assert (
        whole.status == 200
        and whole.headers["content-type"].startswith("image/")
        and len(whole.body) == picture["bytes"]
    )
    part = server.ask(f"/{picture['url']}", Range="bytes=2-5")
    assert part.status == 206 and part.body == whole.body[2:6]
    assert part.headers["content-range"] == f"bytes 2-5/{len(whole.body)}"
    assert server.ask(f"/{picture['url']}", Range=f"bytes={len(whole.body)}-").status == 416
    small = server.ask(f"/{about['thumbnail']}")
    assert small.status == 200 and max(Image.open(io.BytesIO(small.body)).size) <= 128


def test_relations_of_an_entity_come_first(server):
    found = server.get("/relations", entity="item 05").json["relations"]
    sensible = [row["sensible"] for row in found]
    assert found[0]["has"] and sensible == sorted(sensible, reverse=True)


def test_reasons_are_those_of_the_bundle(server, bundle):
    expected = bundle.explain("item 05", "near", "item 06")
    found = server.get("/explain", head="item 05", relation="near", tail="item 06").json
    assert found["text"] == expected["text"] and found["rank_without"] == expected["rank_without"]
    assert found["source"]["id"] == "item 05" and found["answer"]["id"] == "item 06"
    other = server.get("/explain", head="item 05", relation="near", tail="item 06", direction="head").json
    assert other["source"]["id"] == "item 06" and other["direction"] == "head"


def test_candidates_range_and_filter_are_those_of_the_bundle(server, bundle):
    chosen = ["item 01", "item 02", "item 03"]
    body = {"questions": [{"head": "item 05", "relation": "near"}], "candidates": chosen, "filter": "train"}
    reply = server.ask("/predict", "POST", json.dumps(body).encode(), Content_Type="application/json")
    expected = bundle.predict("item 05", "near", candidates=chosen, filter="train")
    assert [row["id"] for row in reply.json["results"][0]["answers"]] == expected["id"].tolist()
    ranged = server.get("/predict", head="item 05", relation="near", range=True).json["answers"]
    expected = bundle.predict("item 05", "near", range=True)
    assert [(row["id"], row["known"]) for row in ranged] == list(zip(expected["id"], expected["known"], strict=True))


def test_search_prefers_beginnings_and_forgives_spelling(server):
    assert server.get("/search", q="ITEM 1").json["results"][0]["id"].startswith("item 1")
    assert server.get("/search", q="itme 05").json["results"]
    assert server.get("/search", q="   ").json["results"] == []


def test_a_name_with_markup_stays_text_in_json(server):
    reply = server.ask(f"/entity/{urllib.parse.quote(MARKUP, safe='')}?bundle=marked")
    assert reply.json["id"] == MARKUP and reply.headers["content-type"].startswith("application/json")
    assert reply.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path, status, words",
    [
        ("/predict?head=itme%2005&relation=near", 404, "did you mean 'item 05'"),
        ("/predict?relation=near", 400, "neither head nor tail"),
        ("/predict?head=item%2005&relation=near&top=0", 422, "top: "),
        ("/predict?head=item%2005&relation=near&top=100000", 422, "top: "),
        ("/predict?head=item%2005&relation=near&bundle=other", 404, "not served here"),
        ("/entity/nobody%20at%20all", 404, "not known here"),
        ("/media/image/99?entity=item%2005", 404, "no such file"),
        ("/media/text/0?entity=item%2005", 422, "modality"),
        ("/page/..%2Fservice.py", 404, ""),
        ("/page/../../../bundle.json", 404, ""),
        ("/docs/..%2F..", 404, ""),
    ],
)
def test_a_mistake_is_one_line_of_json(server, path, status, words):
    reply = server.ask(path)
    assert reply.status == status and words in reply.json["error"] and "\n" not in reply.json["error"]


def test_every_answer_forbids_foreign_content(server):
    for path in ("/", "/health", "/docs", "/page/app.js", "/nothing", "/openapi.json"):
        policy = server.ask(path).headers["content-security-policy"]
        assert "script-src 'self'" in policy and "unsafe" not in policy and "http" not in policy
    pages = list((Path(__file__).parents[2] / "mocme_dist/serving/page").iterdir())
    for page in pages:
        text = page.read_text(encoding="utf8")
        assert not re.search(r"https?://(?!www\.w3\.org/)", text), page.name
        assert not re.search(
            r"<script(?![^>]*\bsrc=)|\son\w+\s*=\s*[\"']|innerHTML|outerHTML|insertAdjacentHTML|document\.write", text
        )


def test_pages_of_other_sites_and_names_are_refused(server):
    assert server.ask("/health", Origin="http://evil.example").status == 403
    assert server.ask("/health", host="evil.example").status == 403
    assert server.ask("/health", Origin=f"http://127.0.0.1:{server.port}").status == 200


def picture(side: int, colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(out, "PNG")
    return out.getvalue()


def test_a_new_entity_is_answered_as_by_the_query_command(server, bundle, tmp_path):
    from mocme_dist.serving.predict import Question, predict
    from mocme_dist.serving.unseen import UnseenEntityEncoder

    form = server.get("/new").json
    attribute = form["numbers"][0]
    (tmp_path / "x.png").write_bytes(picture(8))
    encoder = UnseenEntityEncoder(bundle, trust_encoders=True)
    described = encoder.describe(f"name=X,text=a red thing,image={tmp_path / 'x.png'},{attribute}=3.5")
    unseen, weights = encoder.entity_of(described)
    expected = predict(bundle, [Question(unseen, "near", None)], 5, range=True)
    fields = {
        "name": "X",
        "text": "a red thing",
        "numbers": json.dumps({attribute: 3.5}),
        "relation": "near",
        "top": "5",
    }
    reply = server.post("/new", fields, {"image": ("/etc/passwd.png", picture(8))}).json
    assert [row["id"] for row in reply["answers"]] == expected.columns()["id"]
    assert reply["weights"] == pytest.approx(weights) and len(reply["near"]) > 3 and reply["relations"]
    assert server.post("/new", {"text": "a red thing"}).json["answers"] == []


@pytest.mark.parametrize(
    "fields, files, status, words",
    [
        ({}, {}, 400, "nothing is given"),
        ({"text": "x", "numbers": '{"no such": 1}'}, {}, 400, "numbers: no such: unknown"),
        ({"text": "x", "numbers": '{"size": NaN}'}, {}, 400, "expected a finite number"),
        ({"text": "x", "numbers": "["}, {}, 400, "expected a JSON object"),
        ({"text": "x", "path": "/etc/passwd"}, {}, 400, "path: unknown field"),
        ({"image": "/etc/passwd"}, {}, 400, "image: expected a file"),
        ({}, {"image": ("x.png", b"no picture")}, 400, "image: not an image"),
        ({}, {"image": ("x.exe", b"MZ")}, 400, "expected a file of type"),
        ({}, {"audio": ("x.wav", b"RIFF")}, 400, "not trained with it"),
        ({"text": "x" * 30_000}, {}, 400, "limit 20,000"),
        ({"text": "x", "relation": "no such relation"}, {}, 404, "not known here"),
    ],
)
def test_a_wrong_form_is_told(server, fields, files, status, words):
    reply = server.post("/new", fields, files)
    assert reply.status == status and words in reply.json["error"]


def chunked(port: int, size: int) -> int:
    """Status of a POST whose body has no Content-Length; the server may close before it has read all."""
    head = (
        f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nTransfer-Encoding:"
        " chunked\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(head.encode())
        with contextlib.suppress(OSError):
            for _ in range(size >> 14):
                connection.sendall(b"4000\r\n" + b"x" * (1 << 14) + b"\r\n")
            connection.sendall(b"0\r\n\r\n")
        return int(connection.recv(64).split()[1])


def test_uploads_are_bounded(server):
    limit = server.get("/new").json["max_file_bytes"]
    claimed = server.ask("/new", "POST", b"", Content_Length=str(limit + (2 << 20)))
    assert claimed.status == 413
    many = {"text": "x"} | {f"x{n}": "y" for n in range(100)}
    assert server.post("/new", many).status == 400
    assert server.ask("/predict", "POST", b"", Content_Length=str(2 << 20)).status == 413
    assert chunked(server.port, 2 << 20) == 413
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    reply = server.post("/new", {}, {"image": ("bomb.png", bomb.getvalue())})
    assert reply.status == 400 and "too large" in reply.json["error"]


def test_openapi_lists_every_route(server):
    paths = server.get("/openapi.json").json["paths"]
    assert {"/predict", "/explain", "/new", "/entity/{name}", "/search", "/relations", "/health", "/metrics"} <= set(
        paths
    )


def test_one_process_listens_on_loopback_only(server):
    assert listening(server.process.pid) == {f"127.0.0.1:{server.port}"}


def test_the_server_ends_with_a_signal(bundle_dir):
    server = Server(str(bundle_dir))
    assert server.get("/health").status == 200
    assert server.stop() == 0


# -- tokens


def test_beyond_loopback_a_token_is_required(bundle_dir, tmp_path):
    def refused(*arguments: str) -> str:
        env = {key: value for key, value in os.environ.items() if key != "MOCME_SERVE_TOKEN"}
        done = subprocess.run(
            [sys.executable, "-m", "mocme_dist.serve", str(bundle_dir), *arguments],
            capture_output=True,
            text=True,
            env=env,
            timeout=60,
        )
        assert done.returncode == 2 and "Traceback" not in done.stderr
        return done.stderr

    assert "needs a token" in refused("--host", "0.0.0.0")
    assert "usage" in refused("--replicas", "0")


def test_a_token_file_must_be_private_and_long(tmp_path):
    path = tmp_path / "token"
    path.write_text("0123456789abcdef\n")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="mode 0644, expected 0600"):
        read_token(str(path))
    path.chmod(0o600)
    assert read_token(str(path)) == "0123456789abcdef"
    path.write_text("short")
    with pytest.raises(ConfigError, match="5 characters, expected 16"):
        read_token(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(str(tmp_path / "absent"))


def test_with_a_token_only_the_page_and_health_are_open(bundle_dir):
    token = "0123456789abcdef"
    server = Server(str(bundle_dir), "--host", "0.0.0.0", MOCME_SERVE_TOKEN=token)
    try:
        assert server.get("/health").status == 200 and server.get("/").status == 200
        for path in (
            "/bundles",
            "/metrics",
            "/openapi.json",
            "/entity/item%2005",
            "/media/image/0?entity=item%2005",
            "/page/../bundles",
        ):
            assert server.ask(path).status in (401, 404), path
        assert server.ask("/bundles", Authorization="Bearer wrong").status == 401
        assert server.ask("/bundles", Authorization=f"Bearer {token}", host="other.example").status == 200
        session = server.ask("/session", "POST", b"", Authorization=f"Bearer {token}")
        cookie = session.headers["set-cookie"]
        assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower() and token not in cookie
        assert server.ask("/bundles", Cookie=cookie.partition(";")[0]).status == 200
        assert server.ask("/session", "POST", b"").status == 401
    finally:
        server.stop()


def test_bundles_have_names_of_their_own():
    assert names_of(["a/demo", "other=b/demo"]) == {"demo": "a/demo", "other": "b/demo"}
    assert names_of(["s3://bucket/x/"]) == {"x": "s3://bucket/x/"}
    with pytest.raises(ConfigError, match="two bundles are called 'demo'"):
        names_of(["a/demo", "b/demo"])


def test_a_missing_extra_is_one_line(bundle_dir, tmp_path):
    code = (
        "import sys, importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'fastapi' else real(name, *a)\n"
        f"sys.argv = ['serve', {str(bundle_dir)!r}]\n"
        "from mocme_dist import serve\nfrom mocme_dist.commands import run_command\nrun_command(serve.main)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "pip install 'mocme-dist[serve]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_data_set_of_another_run_is_refused(bundle_dir, tmp_path, tiny_raw):
    from mocme_dist.config.schema import DataConfig
    from mocme_dist.data.packing import pack_folder

    raw = Path(shutil.copytree(tiny_raw, tmp_path / "raw"))
    with (raw / "train.txt").open("a") as file:
        file.write("item 01\tnear\tsomebody new\n")
    other = pack_folder(raw, tmp_path / "dataset", DataConfig(shard_rows=16)).directory
    done = subprocess.run(
        [sys.executable, "-m", "mocme_dist.serve", str(bundle_dir), "--data", str(other), "--port", "0"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 3 and "the bundle was trained on" in done.stderr
