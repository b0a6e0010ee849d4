"""Safetensors files by numpy: what is written is what safetensors reads, mapped and aligned.

What is torn is refused.
"""

from __future__ import annotations

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from mocme_dist.data.tensors import map_tensors, read_metadata, write_tensors


def test_a_written_file_is_read_alike_by_safetensors_and_by_the_maps(tmp_path):
    gen = np.random.default_rng(0)
    tensors = {
        "vectors": gen.normal(size=(5, 3)).astype(np.float32),
        "half": gen.normal(size=(2, 2)).astype(np.float16),
        "views": gen.integers(-127, 128, size=(2, 5, 3)).astype(np.int8),
        "empty": np.zeros((0, 4), np.float32),
    }
    path = tmp_path / "part.safetensors"
    write_tensors(path, tensors, {"first": "7"})
    mapped, theirs = map_tensors(path), load_file(path)
    assert list(mapped) == list(tensors)
    for name, value in tensors.items():
        assert np.array_equal(mapped[name], value) and np.array_equal(theirs[name], value)
        assert mapped[name].dtype == value.dtype
    assert read_metadata(path) == {"first": "7"}
    with safe_open(path, "np") as file:
        assert file.metadata() == {"first": "7"}
    assert mapped["vectors"].ctypes.data % 64 == 0 and isinstance(mapped["vectors"], np.memmap)


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\xff" * 64, b"\x02\x00\x00\x00\x00\x00\x00\x00[]", None])
def test_a_torn_file_is_refused(tmp_path, content):
    path = tmp_path / "part.safetensors"
    write_tensors(path, {"vectors": np.ones((4, 4), np.float32)}, {})
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    with pytest.raises(ValueError):
        map_tensors(path)
