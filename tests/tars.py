"""Tar files as no writer of ours makes them."""

import io
import tarfile

from mocme_dist.data.shards import read_shard

LIMIT = 1 << 20


def write_tar(path, members, kind=tarfile.REGTYPE, link=""):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), kind, link
            tar.addfile(info, io.BytesIO(content))
    return path


def read(path, entry=None, limit=LIMIT):
    return list(read_shard(path, entry, limit))
