"""Blocks of vectors against plain slices.

Layout, distances, the loss with its gradients, and what the model puts into them.
"""

from __future__ import annotations

import pytest
import torch
from plain_settings import FUSION, LOSS, MODEL, WEIGHTING

from mocme_dist.errors import ShapeError
from mocme_dist.kernels.distance import distance
from mocme_dist.model.blocks import Blocks, block_distances, join_blocks, make_blocks, split_blocks, split_phases
from mocme_dist.model.loss import completion_loss
from mocme_dist.model.mocme import MoCME
from mocme_dist.model.rotate import rotate

COUNT, WIDTH = 3, 4
C = COUNT * WIDTH // 2
# Complex columns of each block, written out: real parts, and the imaginary parts of the same columns.
COLUMNS = [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
G, B, N = 2, 4, 5


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "form, modalities, width, expected",
    [
        ("sum", 4, 256, Blocks(1, 256)),
        ("blocks", 1, 256, Blocks(1, 256)),
        ("blocks", 4, 320, Blocks(5, 64)),
        ("blocks", 4, 256, Blocks(5, 50)),
        ("blocks", 2, 8, Blocks(3, 2)),
    ],
)
def test_blocks_are_equal_and_even_and_no_wider_than_asked(form, modalities, width, expected):
    found = make_blocks(form, modalities, width)
    assert found == expected and found.width % 2 == 0 and found.total <= width
    with pytest.raises(ShapeError, match=r"set experts\.width to 10 or more"):
        make_blocks("blocks", 4, 8)


def test_blocks_are_ranges_of_complex_columns_and_split_undoes_join():
    vector = normal(7, 2 * C)
    blocks = split_blocks(vector, COUNT)
    assert all(torch.equal(blocks[k], vector[:, columns]) for k, columns in enumerate(COLUMNS))
    assert torch.equal(join_blocks(blocks), vector)
    phase, sign = normal(7, C, seed=1) * 3, normal(7, seed=2).sign()
    whole = rotate(vector, phase, sign)
    parts = rotate(blocks, split_phases(phase, COUNT), sign.expand(COUNT, 7))
    assert torch.equal(split_blocks(whole, COUNT), parts)


@pytest.mark.parametrize("compiled", [False, True])
def test_distances_of_blocks_add_up_to_that_of_the_vectors(compiled):
    query, candidate = normal(6, 2 * C), normal(9, 2 * C, seed=1)
    found = block_distances(query, candidate, COUNT, compiled)
    for k, columns in enumerate(COLUMNS):
        torch.testing.assert_close(found[k], distance(query[:, None, columns], candidate[:, columns]))
    torch.testing.assert_close(found.sum(0), distance(query[:, None], candidate))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["contrastive", "one_vs_all"])
def test_the_loss_is_the_mean_of_the_losses_of_the_blocks(kind, compiled):
    weight = torch.ones(G, B)
    weight[1, 3] = 0
    allowed = torch.rand(G, B, N, generator=torch.Generator().manual_seed(4)) < 0.7
    settings = LOSS._replace(kind=kind, gamma=3.0, weighting=WEIGHTING._replace(kind="entropy_adversarial"))

    def leaves() -> list[torch.Tensor]:
        sizes = ((G, B, 2 * C), (G, B, C), (G, B, 2 * C), (G, N, 2 * C))
        return [normal(*size, seed=number).requires_grad_() for number, size in enumerate(sizes)]

    whole, plain, sign = leaves(), leaves(), normal(G, B, seed=9).sign()
    source, phase, target, pool = whole
    how = settings._replace(blocks=COUNT, compiled=compiled)
    loss, stats = completion_loss(source, phase, sign, target, pool, allowed, weight, how)
    loss.backward()
    source, phase, target, pool = plain
    found = [
        completion_loss(
            source[..., columns],
            phase[..., columns[: WIDTH // 2]],
            sign,
            target[..., columns],
            pool[..., columns],
            allowed,
            weight,
            settings,
        )
        for columns in COLUMNS
    ]
    expected = torch.stack([one for one, _ in found]).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for left, right in zip(whole, plain, strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-6)
    for name, value in stats._asdict().items():
        mean = torch.stack([getattr(one, name) for _, one in found]).mean(0)
        torch.testing.assert_close(value, mean, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def model_of(form: str, width: int) -> MoCME:
    sizes = {"width": width, "num_experts": 2, "gamma": 6.0, "projection_hidden": 5}
    how = {"residual": True, "structure": "identity", "form": form, "fusion": FUSION._replace(estimator="uniform")}
    settings = MODEL._replace(**sizes, **how)
    return MoCME({"structure": WIDTH, "text": 5}, 3, settings)


def test_a_vector_is_each_modality_beside_the_fused_one_and_absent_ones_are_learned():
    model, twin = model_of("blocks", COUNT * WIDTH), model_of("sum", WIDTH)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(("late", "relations"))}
    twin.load_state_dict(state, strict=False)
    with torch.no_grad():
        model.late.absent_MD.copy_(normal(2, WIDTH, seed=3))
    raw = {"structure": normal(4, WIDTH), "text": normal(4, 5, seed=1)}
    present = torch.tensor([[True, True, False, False], [True, False, True, False]])
    found = split_blocks(model.encode(raw, present).z_VD, COUNT)

    def alone(modality: int) -> torch.Tensor:
        only = torch.zeros(2, 4, dtype=torch.bool)
        only[modality] = True
        return twin.encode(raw, only).z_VD

    assert model.scale == twin.scale == 8 / WIDTH
    torch.testing.assert_close(found[2], twin.encode(raw, present).z_VD)
    for m in range(2):
        expected = torch.where(present[m][:, None], alone(m), model.late.absent_MD[m] * model.scale)
        torch.testing.assert_close(found[m], expected)
    assert not found[2][3].any(), "an entity without any modality has nothing to fuse"
    found.square().sum().backward()
    assert (model.late.absent_MD.grad != 0).all()
