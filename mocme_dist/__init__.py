"""Completes multi-modal knowledge graphs: pack, extract, train, evaluate, export, query.

    >>> from mocme_dist import load_bundle
    >>> bundle = load_bundle("bundles/demo")  # mocme export runs/demo bundles/demo
    >>> answers = bundle.predict("Norway", "borders", k=3)
    >>> answers.columns[8:].tolist()
    ['rank', 'id', 'label', 'score', 'probability', 'known']
    >>> len(answers), bool(answers["known"].any())  # filter="none" would show known answers too
    (3, False)
    >>> bundle.predict("Norwey", "borders")
    Traceback (most recent call last):
        ...
    mocme_dist.errors.ConfigError: entity 'Norwey': not known here; did you mean 'Norway'?

The model by itself, whose import needs torch alone:

    >>> import torch
    >>> from mocme_dist.config import load_config
    >>> from mocme_dist.model import MoCME
    >>> from mocme_dist.training.build import model_settings
    >>> settings = model_settings(load_config([], ["experts.width=64"]), num_modalities=2)
    >>> model = MoCME({"structure": 64, "text": 384}, num_relations=5, settings=settings)
    >>> features = {"structure": torch.randn(2, 64), "text": torch.randn(2, 384)}
    >>> present_MV = torch.tensor([[True, True], [True, False]])  # the second entity has no text
    >>> model.encode(features, present_MV).z_VD.shape
    torch.Size([2, 64])
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from mocme_dist.serving.bundle import Bundle

__version__ = "0.1.0"

# OpenMP reads it when it is loaded, which is when torch is first imported; workers inherit it. By default a thread that
# waits for others spins 300,000 rounds: where another process needs its core, it keeps it from the threads that it
# waits for. With 10,000 rounds a loaded machine is no slower than with one thread, and an idle one as fast as by
# default (tools/bench/RESULTS.md, waiting).
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "10000"

if sys.argv[:1] == ["-m"]:  # `python -m mocme_dist.COMMAND`, whose module is not imported yet
    from mocme_dist import environment

    environment.end_on_signals()
    environment.require()


def load_bundle(directory: str | Path) -> Bundle:
    """Open what `mocme export` wrote; ask it with `.predict("Norway", "borders", k=10)`.

    Raises:
        DataError: the folder is not a bundle, or a file of it is missing or has another size.
    """
    # Imported here, so that `import mocme_dist` itself takes milliseconds.
    from mocme_dist.serving.bundle import Bundle

    return Bundle.open(directory)


def load_features(dataset: str | Path, modality: str) -> tuple[list[str], NDArray[np.float32]]:
    """Return the frozen features of one modality.

    Args:
        dataset: packed data set, a folder or an fsspec URL.
        modality: text, image, numeric, audio or video.

    Returns:
        ids of the entities that have the modality, and their features (n, F).

    Raises:
        DataError: it is not a data set, or the features have not been extracted.
    """
    from mocme_dist.data.dataset import Dataset
    from mocme_dist.data.features import FeatureStore

    opened = Dataset.open(dataset, check_shards=False)
    opened.bring_features(modality, 0, opened.num_entities)
    store = FeatureStore.open(opened.directory, modality, 0, opened.num_entities, "mmap")
    rows = store.present().nonzero().flatten()
    names = opened.entity_names()
    return [names[row] for row in rows.tolist()], store.gather(rows)[0].numpy()
