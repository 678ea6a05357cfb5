"""The transform against plain float64 algebra."""

from __future__ import annotations

import pytest
import torch
from synthetic import orthonormal_basis

from dynamo_kvtc.codec.parameters import SideParameters
from dynamo_kvtc.codec.transform import SideTransform, resolve_compute_dtype

LAYERS, LAYER_SIZE, TOKENS = 3, 32, 20
COMPONENTS = torch.tensor([40, 41, 0, 1, 2, 7])


@pytest.fixture
def side() -> SideParameters:
    generator = torch.Generator().manual_seed(0)
    row = LAYERS * LAYER_SIZE
    mean = 100 * torch.randn(row, generator=generator)
    return SideParameters(mean, orthonormal_basis(64, row, generator), {})


def make_rows(side: SideParameters) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return side.mean + torch.randn(TOKENS, side.mean.numel(), generator=generator)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_forward_projects_on_the_chosen_components(side, dtype, tolerance):
    rows = make_rows(side)
    transform = SideTransform(side, COMPONENTS, LAYER_SIZE, dtype)
    coefficients = transform.forward(rows)
    assert coefficients.dtype is dtype is transform.dtype
    expected = (rows.double() - side.mean.double()) @ side.basis.double().t()
    torch.testing.assert_close(coefficients.double(), expected[:, COMPONENTS].t(), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_inverse_gives_each_layer_its_part_of_the_row(side, dtype, tolerance):
    coefficients = torch.randn(COMPONENTS.numel(), TOKENS, generator=torch.Generator().manual_seed(2))
    transform = SideTransform(side, COMPONENTS, LAYER_SIZE, dtype)
    rows = coefficients.double().t() @ side.basis.double()[COMPONENTS] + side.mean.double()
    for layer in range(LAYERS):
        expected = rows[:, layer * LAYER_SIZE : (layer + 1) * LAYER_SIZE]
        found = transform.inverse(coefficients.to(dtype).t(), layer)
        assert found.dtype is torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


def test_without_components_every_row_is_the_mean(side):
    transform = SideTransform(side, torch.empty(0, dtype=torch.int64), LAYER_SIZE, torch.float32)
    coefficients = transform.forward(make_rows(side))
    assert coefficients.shape == (0, TOKENS)
    assert torch.equal(
        transform.inverse(coefficients.t(), 1), side.mean[LAYER_SIZE : 2 * LAYER_SIZE].expand(TOKENS, -1)
    )


def test_a_basis_without_unreached_components_gives_the_same(side):
    trimmed = SideParameters(side.mean, side.basis[:42], {})
    whole, short = (SideTransform(s, COMPONENTS, LAYER_SIZE, torch.float32) for s in (side, trimmed))
    rows = make_rows(side)
    assert torch.equal(whole.forward(rows), short.forward(rows))


def test_compute_dtype_is_chosen_by_name():
    assert resolve_compute_dtype("float32") is torch.float32
    assert resolve_compute_dtype("bfloat16") is torch.bfloat16
    assert resolve_compute_dtype("auto") in (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="auto, bfloat16, float32"):
        resolve_compute_dtype("float8")


@pytest.mark.parametrize(
    ("amx", "avx512", "expected"),
    [
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
        (False, False, torch.float32),
    ],
)
def test_auto_follows_the_cpu(monkeypatch, amx, avx512, expected):
    # The CPU at hand is one of these; its answers are replaced to see all.
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    assert resolve_compute_dtype("auto") is expected


def test_auto_is_float32_where_torch_cannot_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert resolve_compute_dtype("auto") is torch.float32
