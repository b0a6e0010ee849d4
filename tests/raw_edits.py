"""Raw folders with changes, and what is packed from them."""

from mocme_dist.config.schema import DataConfig
from mocme_dist.data.packing import pack_folder

LIMIT = 1 << 24


def pack(raw, out, **settings):
    return pack_folder(raw, out, DataConfig(**{"shard_rows": 16, **settings}))


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def append(path, text):
    with path.open("ab") as file:
        file.write(text.encode() if isinstance(text, str) else text)


def rows(raw, name):
    return [tuple(line.split("\t")) for line in (raw / name).read_text(encoding="utf8").splitlines()]


def samples(dataset):
    names = dataset.entity_names()
    return {names[s.id]: s for shard in range(dataset.shards.num_shards) for s in dataset.read_samples(shard, LIMIT)}


def named(dataset, split):
    entities, relations = dataset.entity_names(), dataset.relation_names()
    return [(entities[h], relations[r], entities[t]) for h, r, t in dataset.triples(split).tolist()]
