"""The lock file pins the tested set with hashes; the audit says what it could not check."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import audit, lock

ROOT = Path(__file__).resolve().parents[2]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_package_of_the_lock_has_a_hash_and_the_version_of_the_tested_set():
    text = lock.LOCK.read_text()
    assert text.startswith(lock.HEADER) and "://" not in text
    entries = re.findall(r"^([\w.-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, re.MULTILINE)
    assert len(entries) == sum("==" in line for line in text.splitlines() if not line.startswith("#"))
    locked = {canonical(name): version for name, version, _ in entries}
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    differing = {
        name: (version, locked[canonical(name)])
        for name, version in tested.items()
        if locked.get(canonical(name), version) != version
    }
    assert differing == {}
    assert {"torch", "ray", "deepspeed", "numpy", "safetensors", "pillow", "fastapi", "pytest"} <= locked.keys()


def test_a_service_that_is_not_there_is_skipped_loudly():
    assert audit.verdict("no answer within 20 s") == (
        0,
        ["SKIPPED: vulnerabilities are not checked: no answer within 20 s"],
    )
    code, lines = audit.verdict([{"name": "a", "version": "1", "skip_reason": "not found", "vulns": []}])
    assert code == 0 and lines[0].startswith("SKIPPED: ")


def test_a_known_vulnerability_fails_and_is_named():
    flaw = {"id": "GHSA-1", "fix_versions": ["2.1"], "aliases": []}
    found = [{"name": "a", "version": "2.0", "vulns": [flaw]}, {"name": "b", "version": "1", "vulns": []}]
    code, lines = audit.verdict(found)
    assert code == 1 and lines[0] == "a 2.0: GHSA-1, fixed in 2.1" and lines[1].startswith("2 packages checked")
    assert audit.verdict(found[1:])[0] == 0


@pytest.mark.slow
def test_without_a_network_the_audit_ends_soon_and_well():
    code = "import sys, tools.audit as a; a.PROBE_S = 20; sys.exit(a.main())"
    proxy = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=proxy, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0 and done.stdout.startswith("SKIPPED: "), done.stdout + done.stderr
