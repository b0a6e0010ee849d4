"""How OpenMP's threads wait: set before it is loaded, unless the user has chosen."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")


@pytest.mark.parametrize(
    "chosen, spins",
    [({}, "10000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
)
def test_openmp_spins_a_little_unless_the_user_has_chosen(chosen, spins):
    env = {name: value for name, value in os.environ.items() if name not in NAMES} | chosen
    # OpenMP itself says what it has read.
    done = subprocess.run(
        [sys.executable, "-c", "import mocme_dist, torch"],
        capture_output=True,
        text=True,
        timeout=400,
        env=env | {"OMP_DISPLAY_ENV": "VERBOSE", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if found is None:
        pytest.skip("torch's OpenMP here is not GNU's")
    assert found[1] == spins
