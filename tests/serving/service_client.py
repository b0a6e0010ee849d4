"""`mocme serve` in a process of its own, and a bundle with markup in a name.

For the tests of the endpoint and the page.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.parse
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

MARKUP = '<img src=x onerror="document.title=1">&amp;/"'
HERE = str(Path(__file__).parent)


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """`mocme serve` in a process of its own."""

    def __init__(self, *arguments: str, port: int = 0, **environment: str) -> None:
        command = [sys.executable, "-m", "mocme_dist.serve", *arguments, "--port", str(port)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")]), **environment}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        line = self.process.stdout.readline()
        found = re.search(r":(\d+)\n", line)
        assert found, self.process.communicate()[1]
        self.port = int(found[1])

    def ask(
        self, path: str, method: str = "GET", body: bytes | None = None, host: str = "127.0.0.1", **headers: str
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            own = {"Host": f"{host}:{self.port}", **{key.replace("_", "-"): value for key, value in headers.items()}}
            connection.request(method, path, body, own)
            response = connection.getresponse()
            found = {key.lower(): value for key, value in response.getheaders()}
            return Reply(response.status, found, response.read())
        finally:
            connection.close()

    def get(self, path: str, **query: Any) -> Reply:
        return self.ask(f"{path}?{urllib.parse.urlencode(query)}" if query else path)

    def post(
        self, path: str, fields: dict[str, str], files: dict[str, tuple[str, bytes]] | None = None, **headers: str
    ) -> Reply:
        edge = "edge-of-a-part"
        parts = [
            f'--{edge}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode()
            for key, value in fields.items()
        ]
        for key, (name, content) in (files or {}).items():
            head = f'--{edge}\r\nContent-Disposition: form-data; name="{key}"; filename="{name}"\r\n\r\n'
            parts.append(head.encode() + content + b"\r\n")
        body = b"".join(parts) + f"--{edge}--\r\n".encode()
        return self.ask(path, "POST", body, Content_Type=f"multipart/form-data; boundary={edge}", **headers)

    def stop(self) -> int:
        self.process.terminate()
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()
            self.process.communicate()


def with_markup(bundle_dir: Path, target: Path) -> Path:
    """A copy of a bundle whose entity 0 has markup for a name."""
    shutil.copytree(bundle_dir, target)
    manifest = json.loads((target / "bundle.json").read_text())
    for file, column in (("entities.parquet", "name"), ("entity_labels.parquet", "label")):
        table = pyarrow.parquet.read_table(target / file)
        values = [MARKUP, *table[column].to_pylist()[1:]]
        changed = pyarrow.array(values, table[column].type)
        pyarrow.parquet.write_table(table.set_column(table.column_names.index(column), column, changed), target / file)
        content = (target / file).read_bytes()
        manifest["files"][file] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (target / "bundle.json").write_text(json.dumps(manifest))
    return target


def listening(*pids: int) -> set[str]:
    """Addresses on which processes listen, read from /proc."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with_target = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link)) if link.is_symlink() else None
            if with_target:
                inodes.add(with_target[1])
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and columns[9] in inodes:
                address, port = columns[1].split(":")
                words = [bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8)]
                found.add(f"{socket.inet_ntop(family, b''.join(words))}:{int(port, 16)}")
    return found


def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
