"""The whole model on one device: who learns, what is ignored, and what importing it costs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from plain_settings import FUSION, LOSS, MODEL

from mocme_dist.errors import ShapeError
from mocme_dist.model.loss import completion_loss
from mocme_dist.model.mocme import MoCME, ModelSettings

V, D, R = 24, 8, 3
WIDTHS = {"structure": D, "text": 5, "image": 7}


def settings(**changes: object) -> ModelSettings:
    return MODEL._replace(**{"width": D, "num_experts": 2, "gamma": 6.0, **changes})


def inputs() -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(1)
    raw = {name: torch.randn(V, width, generator=gen) for name, width in WIDTHS.items()}
    present = torch.rand(3, V, generator=gen) < 0.7
    present[0] = True
    return raw, present, torch.arange(V) % 2 == 1


def test_structure_without_projection_and_experts_is_the_scaled_row():
    """Plain RotatE: nothing between an entity's row and its distances but RotatE's range."""
    model = MoCME(
        {"structure": D},
        R,
        settings(num_experts=1, experts="identity", structure="identity", fusion=FUSION._replace(estimator="uniform")),
    )
    rows_VD = torch.randn(V, D, requires_grad=True)
    z_VD = model.encode({"structure": rows_VD}, torch.ones(1, V, dtype=torch.bool)).z_VD
    assert torch.equal(z_VD, rows_VD * model.scale)
    assert [name for name, _ in model.named_parameters()] == ["relations.phase_RC"]


def loss_of(model: MoCME, z_VD: torch.Tensor) -> torch.Tensor:
    """A completion loss whose chunk has 6 queries and a pool of 10."""
    gen = torch.Generator().manual_seed(2)
    pick = lambda *shape: torch.randint(V, shape, generator=gen)  # noqa: E731
    relation = torch.arange(6)[None] % R
    allowed = torch.ones(1, 6, 10, dtype=torch.bool)
    sign = torch.tensor([[1.0, -1, 1, -1, 1, -1]])
    rows = z_VD[pick(1, 6)], model.relations(relation), sign, z_VD[pick(1, 6)], z_VD[pick(1, 10)]
    return completion_loss(*rows, allowed, torch.ones(1, 6), LOSS._replace(gamma=6.0))[0]


@pytest.mark.parametrize("structure", ["mlp", "identity"])
@pytest.mark.parametrize("estimator", ["mine", "attention", "cosine", "uniform"])
def test_every_parameter_gets_a_gradient(estimator, structure):
    """Completion loss and the networks' own loss together reach all there is to learn, and the rows."""
    model = MoCME(WIDTHS, R, settings(fusion=FUSION._replace(estimator=estimator, hidden=8), structure=structure))
    raw, present, held_out = inputs()
    raw["structure"].requires_grad_()
    fused = model.encode(raw, present, held_out, estimate=True)
    (loss_of(model, fused.z_VD) + fused.loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name
    assert (raw["structure"].grad != 0).any()


def test_equal_seeds_give_equal_models_and_the_caller_s_random_state_stays():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = MoCME(WIDTHS, R, settings(), seed=1)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(77)
    other, third = MoCME(WIDTHS, R, settings(), seed=1), MoCME(WIDTHS, R, settings(), seed=2)
    for (name, value), (_, same) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(value, same), name
    assert not torch.equal(one.relations.phase_RC, third.relations.phase_RC)
    assert not torch.equal(
        one.projections.by_modality["text"].first.weight, third.projections.by_modality["text"].first.weight
    )


@pytest.mark.parametrize("estimator", ["uniform", "mine", "cosine", "attention"])
def test_absent_rows_are_ignored_and_no_modality_gives_zero(estimator):
    """Absent rows are masked before the experts, where squares of what they hold could overflow."""
    widths = {"text": 5, "image": 7}
    raw, present, held_out = inputs()
    raw, present = {name: raw[name] for name in widths}, present[1:].clone()
    present[:, 4] = False
    garbage = {name: torch.where(present[m][:, None], raw[name], 1e25) for m, name in enumerate(widths)}
    states = []
    for features in (raw, garbage):
        model = MoCME(widths, R, settings(fusion=FUSION._replace(estimator=estimator, hidden=8)))
        fused = model.encode(features, present, held_out, estimate=True)
        (loss_of(model, fused.z_VD) + fused.loss).backward()
        states.append([fused.z_VD, *(p.grad for p in model.parameters()), *model.buffers()])
    for one, other in zip(*states, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other)
    assert (states[0][0][4] == 0).all()


def test_gradients_stay_finite_where_an_entity_has_nothing():
    model = MoCME({"text": 5}, R, settings(fusion=FUSION._replace(estimator="mine", hidden=8)))
    raw, _, held_out = inputs()
    fused = model.encode({"text": raw["text"]}, torch.zeros(1, V, dtype=torch.bool), held_out, estimate=True)
    (loss_of(model, fused.z_VD) + fused.loss).backward()
    assert (fused.z_VD == 0).all()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_row_is_encoded_alike_in_any_company():
    """Evaluation fuses entities in blocks: a row's vector must not depend on the others in its block."""
    model = MoCME(WIDTHS, R, settings(fusion=FUSION._replace(estimator="mine", scope="entity", hidden=8)))
    raw, present, held_out = inputs()
    for _ in range(3):
        model.encode(raw, present, held_out, estimate=True)
    model.eval()
    whole = model.encode(raw, present).z_VD
    few = torch.tensor([3, 17, 4])
    part = model.encode({name: value[few] for name, value in raw.items()}, present[:, few]).z_VD
    torch.testing.assert_close(part, whole[few])


def test_fused_vectors_start_at_rotate_s_scale():
    """Parts near (gamma + 2) / D, so that distances start near gamma."""
    model = MoCME(WIDTHS, R, settings(fusion=FUSION._replace(estimator="uniform")))
    raw, present, _ = inputs()
    assert model.scale == pytest.approx(8 / D)
    z_VD = model.encode(raw, present).z_VD
    assert 0.02 < z_VD.std().item() / model.scale < 2


def test_wrong_modalities_and_widths_are_refused():
    model = MoCME(WIDTHS, R, settings())
    raw, present, _ = inputs()
    with pytest.raises(
        ShapeError, match=r"features of \['structure', 'text'\], expected \['image', 'structure', 'text'\]"
    ):
        model.encode({name: raw[name] for name in ("structure", "text")}, present)
    with pytest.raises(ShapeError, match="structure rows have width 9, expected D = 8"):
        MoCME({"structure": 9}, R, settings())


def test_importing_the_model_loads_torch_and_nothing_heavy_besides():
    heavy = (
        "ray",
        "deepspeed",
        "transformers",
        "torchvision",
        "tensorboard",
        "webdataset",
        "pydantic",
        "pyarrow",
        "pandas",
        "PIL",
    )
    code = (
        # What the environment's start has loaded (its shim for torchvision) is not the model's doing.
        "import sys; before = set(sys.modules); import mocme_dist.model.mocme, mocme_dist.model.loss\n"
        f"new = set(sys.modules) - before; loaded = sorted(set({heavy!r}) & new)\n"
        "loaded += sorted(m for m in new if m.startswith('mocme_dist.'))\n"
        "ours = ('mocme_dist.model', 'mocme_dist.environment', 'mocme_dist.errors', 'mocme_dist.kernels')\n"
        "print(' '.join(m for m in loaded if not m.startswith(ours)))\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True, timeout=400
    )
    assert found.stdout.split() == []
