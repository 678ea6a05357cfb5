from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from random_models import TOKEN_IDS, make_model
from transformers.cache_utils import DynamicCache, DynamicLayer

from dynamo_kvtc.calibration.capture import SINK_TOKENS, capture_rows
from dynamo_kvtc.calibration.models import load_model
from dynamo_kvtc.calibration.sensitivity_capture import (
    DocumentCut,
    SensitivityRows,
    capture_sensitivity,
    pull_back,
)
from dynamo_kvtc.calibration.transformers_cache import cache_argument, cache_of
from dynamo_kvtc.codec.rope import RopeParameters
from dynamo_kvtc.errors import CalibrationError

SCORED, WINDOW, SEED = 10, 5, 3
STOP = len(TOKEN_IDS) - SCORED - WINDOW


def capture(loaded, token_ids=TOKEN_IDS, **changes) -> SensitivityRows:
    settings = {"scored_tokens": SCORED, "recent_window": WINDOW, "seed": SEED} | changes
    return capture_sensitivity(loaded, token_ids, **settings)


@torch.no_grad()
def log_likelihood(loaded, labels, key_change, value_change) -> tuple[torch.Tensor, torch.Tensor]:
    """Score the last tokens behind a cache whose rows are changed, keys before RoPE.

    Draws labels if there are none yet. Returns the log-likelihood and the labels.
    """
    context = len(TOKEN_IDS) - SCORED
    ids = torch.tensor([TOKEN_IDS])
    filled = cache_of(loaded.model(input_ids=ids[:, :context], use_cache=True))
    shape = (context, 2, 2, 8)
    rotated = loaded.rope.apply_rope(key_change.view(shape), torch.arange(context))  # linear, so of changes
    cache = DynamicCache()
    for index, layer in enumerate(filled.layers):
        cache.update(
            layer.keys + rotated[:, index].transpose(0, 1)[None].double(),
            layer.values + value_change.view(shape)[:, index].transpose(0, 1)[None].double(),
            index,
        )
    logits = loaded.model(input_ids=ids[:, context:], **cache_argument(loaded.model, cache)).logits[0]
    log_probabilities = logits.log_softmax(-1)
    if labels is None:
        generator = torch.Generator().manual_seed(SEED)
        labels = torch.multinomial(log_probabilities.float().exp(), 1, generator=generator)
    return log_probabilities.gather(1, labels).sum(), labels


@pytest.mark.parametrize(
    ("kind", "size", "tolerance"),
    [
        ("llama", 0.1, 0.02),  # its norms compute in float32, so the steps must be large
        ("stablelm", 1e-3, 1e-3),
        ("stablelm partial", 1e-3, 1e-3),
        ("stablelm yarn", 1e-3, 1e-3),
    ],
)
def test_gradients_are_finite_differences_of_the_log_likelihood(kind, size, tolerance):
    """Central differences along random steps of a token; tolerance relative to the product of norms."""
    loaded = make_model(kind)
    captured = capture(loaded)
    nothing = torch.zeros(len(TOKEN_IDS) - SCORED, loaded.geometry.row_size)
    _, labels = log_likelihood(loaded, None, nothing, nothing)
    generator = torch.Generator().manual_seed(0)
    for side, gradients in enumerate((captured.key_gradients, captured.value_gradients)):
        for _ in range(8):
            step = torch.zeros_like(nothing)
            token = int(torch.randint(SINK_TOKENS, STOP, (1,), generator=generator))
            step[token] = torch.randn(step.shape[1], generator=generator)
            step *= size / step.norm()
            change = [nothing, nothing]
            change[side] = step
            above, _ = log_likelihood(loaded, labels, *change)
            below, _ = log_likelihood(loaded, labels, *(-part for part in change))
            expected = gradients[token - SINK_TOKENS] @ step[token]
            bound = tolerance * size * float(gradients[token - SINK_TOKENS].norm())
            assert float((above - below) / 2) == pytest.approx(float(expected), abs=bound)


def test_rows_are_those_that_capture_takes_without_sinks_and_window():
    loaded = make_model()
    captured = capture(loaded)
    keys, values = capture_rows(loaded, TOKEN_IDS)  # a causal model caches the same for a longer document
    torch.testing.assert_close(captured.keys, keys[SINK_TOKENS:STOP])
    torch.testing.assert_close(captured.values, values[SINK_TOKENS:STOP])
    for rows in (captured.key_gradients, captured.value_gradients):
        assert rows.shape == captured.keys.shape
        assert rows.dtype == torch.float32
        assert (rows.abs().sum(1) > 0).all()


def test_the_window_only_moves_the_border():
    loaded = make_model()
    wide, narrow = capture(loaded, recent_window=8), capture(loaded, recent_window=0)
    assert (wide.keys.shape[0], narrow.keys.shape[0]) == (STOP - SINK_TOKENS - 3, STOP - SINK_TOKENS + WINDOW)
    for field in dataclasses.fields(SensitivityRows):
        rows = getattr(wide, field.name)
        torch.testing.assert_close(rows, getattr(narrow, field.name)[: len(rows)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_seed_gives_the_same_result_and_another_one_other_labels(tiny_model, dtype):
    loaded = load_model(tiny_model, dtype=dtype)
    first, again, other = capture(loaded), capture(loaded), capture(loaded, seed=SEED + 1)
    for field in dataclasses.fields(SensitivityRows):
        assert getattr(first, field.name).dtype == torch.float32
        assert torch.equal(getattr(first, field.name), getattr(again, field.name))
    assert torch.equal(first.keys, other.keys)
    assert not torch.allclose(first.key_gradients, other.key_gradients)


def test_bfloat16_agrees_with_float32(tiny_model):
    """Labels may differ where rounding moves a draw, but not here; the rest is bfloat16's 8 bits."""
    coarse, fine = (capture(load_model(tiny_model, dtype=dtype)) for dtype in ("bfloat16", "float32"))
    for side in ("key_gradients", "value_gradients"):
        expected = getattr(fine, side)
        assert (getattr(coarse, side) - expected).norm() < 0.1 * expected.norm()


def test_expected_gradients_vanish():
    """The mean of the score under the model's own predictions is zero, which only sampled labels give."""
    loaded = make_model()
    draws = torch.stack([capture(loaded, seed=seed).value_gradients for seed in range(100)])
    mean, spread = draws.mean(0), draws.std(0)
    assert (mean.square().sum() / spread.square().sum()).sqrt() < 2 / len(draws) ** 0.5


def test_parameters_are_left_as_they_were():
    loaded = make_model()
    parameters = dict(loaded.model.named_parameters())
    parameters["lm_head.weight"].requires_grad_(False)
    before = copy.deepcopy(loaded.model.state_dict())
    capture(loaded)
    for name, parameter in parameters.items():
        assert parameter.grad is None
        assert parameter.requires_grad is (name != "lm_head.weight")
        assert torch.equal(parameter, before[name])


def test_parameters_are_restored_when_the_model_fails():
    loaded = make_model()
    with pytest.raises(IndexError):
        capture(loaded, token_ids=[10_000] * len(TOKEN_IDS))
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


def test_pulling_back_is_the_adjoint_of_rotating():
    generator = torch.Generator().manual_seed(1)
    keys, gradients = torch.randn(2, 6, 3, 8, generator=generator)
    positions = torch.arange(6) * 11
    for style in ("half", "interleaved"):
        rope = RopeParameters(theta=1e4, rotary_dim=4, style=style)
        here = (rope.apply_rope(keys, positions) * gradients).sum()
        there = (keys * pull_back(rope, gradients, positions)).sum()
        torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "scored", "window", "message"),
    [
        (19, 10, 5, "at least 20 tokens"),
        (0, 10, 5, "too short"),
        (40, 0, 5, "at least one token"),
        (40, 10, -1, "none or more"),
    ],
)
def test_documents_that_leave_nothing_to_code_are_refused(tokens, scored, window, message):
    with pytest.raises(CalibrationError, match=message):
        DocumentCut(tokens, scored, window)


def test_the_shortest_document_leaves_one_coded_token():
    assert capture(make_model(), TOKEN_IDS[:20]).key_gradients.shape == (1, 32)


def test_predictions_that_are_not_finite_are_refused():
    loaded = make_model()
    with torch.no_grad():
        loaded.model.lm_head.weight[5] = torch.inf
    with pytest.raises(CalibrationError, match="predictions in float32 hold NaN"):
        capture(loaded)


def test_gradients_that_are_not_finite_are_refused(tiny_model):
    """Tiny values, read with huge weights, overflow float16 on the way back only."""
    loaded = load_model(tiny_model, dtype="float16")
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(50)
        attention = loaded.model.base_model.layers[-1].self_attn
        attention.v_proj.weight.mul_(1e-4)
        attention.o_proj.weight.sign_().mul_(6e4)
    with pytest.raises(CalibrationError, match=r"gradients of Llama.*in float16.*load it in float32"):
        capture(loaded)


def test_a_cache_that_carries_no_gradients_is_refused(monkeypatch):
    """Quantised and pre-allocated caches detach or overwrite what they are given; stood in for here."""
    update = DynamicLayer.update

    def detaching_update(*args, **kwargs):
        return tuple(part.detach() for part in update(*args, **kwargs))

    loaded = make_model()
    monkeypatch.setattr(DynamicLayer, "update", detaching_update)
    with pytest.raises(CalibrationError, match=r"no gradients come back.*forward-only"):
        capture(loaded)
