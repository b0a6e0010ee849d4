"""Completes multi-modal knowledge graphs: pack, extract, train, evaluate, export, query.

    >>> from mocme_dist import load_bundle
    >>> bundle = load_bundle("bundles/demo")        # python -m mocme_dist.export runs/demo bundles/demo
    >>> answers = bundle.predict(head="Norway", relation="borders", top=3)
    >>> answers.columns.tolist()
    ['rank', 'head', 'relation', 'tail', 'answer', 'side', 'score', 'probability', 'known']
    >>> len(answers), bool(answers["known"].any())  # filter="none" would show known answers too
    (3, False)
    >>> bundle.predict(head="Norwey", relation="borders")
    Traceback (most recent call last):
        ...
    mocme_dist.errors.ConfigError: entity 'Norwey': not known here; did you mean 'Norway'?

The model by itself needs torch alone:

    >>> import torch
    >>> from mocme_dist.model import MoCME, ModelSettings
    >>> model = MoCME({"structure": 64, "text": 384}, num_relations=5, settings=ModelSettings(width=64))
    >>> features = {"structure": torch.randn(2, 64), "text": torch.randn(2, 384)}
    >>> present_MV = torch.tensor([[True, True], [True, False]])  # the second entity has no text
    >>> model.encode(features, present_MV).z_VD.shape
    torch.Size([2, 64])
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from mocme_dist.serving.bundle import Bundle

__version__ = "0.1.0"


def load_bundle(directory: str | Path) -> Bundle:
    """Open what `python -m mocme_dist.export` wrote; ask it with `.predict(head=..., relation=..., top=10)`.

    Raises:
        DataError: the folder is no bundle, or a file of it is missing or has another size.
    """
    # imported here: `import mocme_dist` itself stays a matter of milliseconds
    from mocme_dist.serving.bundle import Bundle

    return Bundle.open(directory)
