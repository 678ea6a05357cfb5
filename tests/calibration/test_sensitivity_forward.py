from __future__ import annotations

import dataclasses

import pytest
import torch
from random_models import TOKEN_IDS, make_model
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dynamo_kvtc.calibration.capture import SINK_TOKENS
from dynamo_kvtc.calibration.models import load_model
from dynamo_kvtc.calibration.sensitivity_capture import capture_sensitivity
from dynamo_kvtc.calibration.sensitivity_forward import (
    ForwardSensitivity,
    ForwardSensitivitySums,
    forward_only_sensitivity,
)
from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.errors import CalibrationError

SCORED, WINDOW = 10, 5
CONTEXT = len(TOKEN_IDS) - SCORED
STOP = CONTEXT - WINDOW


def estimate(loaded, token_ids=TOKEN_IDS) -> ForwardSensitivity:
    return forward_only_sensitivity(loaded, token_ids, scored_tokens=SCORED, recent_window=WINDOW)


def first_layer_by_differentiation(loaded) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks of layer 0 by their definition: Jacobians of what each head adds to the stream."""
    decoder = loaded.model.base_model
    layer = decoder.layers[0]
    attention = layer.self_attn
    tokens = len(TOKEN_IDS)
    embedded = decoder.embed_tokens(torch.tensor([TOKEN_IDS]))
    normed = layer.input_layernorm(embedded)[0]

    def heads(projection, norm):
        split = projection(normed).view(tokens, -1, 8)
        return (getattr(attention, norm)(split) if hasattr(attention, norm) else split).transpose(0, 1)

    queries, keys = heads(attention.q_proj, "q_norm"), heads(attention.k_proj, "k_norm")
    values = heads(attention.v_proj, "v_norm")
    cos, sin = decoder.rotary_emb(embedded, torch.arange(tokens)[None])
    projection = attention.o_proj.weight.view(32, 4, 8)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()

    def added(keys, values):
        """``[heads, scored, hidden]``"""
        rotated_queries, rotated_keys = apply_rotary_pos_emb(queries[None], keys[None], cos, sin)
        logits = rotated_queries[0] @ rotated_keys[0].repeat_interleave(2, 0).transpose(1, 2) / 8**0.5
        weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
        read = weights @ values.repeat_interleave(2, 0)
        return torch.einsum("htd,ohd->hto", read, projection)[:, CONTEXT:]

    stream = embedded[0, CONTEXT:] + added(keys, values).sum(0)
    jacobians = torch.func.jacrev(added, argnums=(0, 1))(keys, values)
    blocks = []
    for jacobian in jacobians:  # [heads, scored, hidden, kv_heads, tokens, 8]
        relative = jacobian[..., SINK_TOKENS:STOP, :] / stream.norm(dim=1)[None, :, None, None, None, None]
        blocks.append(torch.einsum("hiogtd,hiogte->gde", relative, relative) / (STOP - SINK_TOKENS))
    return blocks[0].detach().float(), blocks[1].detach().float()


@pytest.mark.parametrize("kind", ["llama", "llama yarn", "qwen3"])
def test_blocks_are_the_squared_jacobians_of_attention(kind):
    loaded = make_model(kind)
    estimated = estimate(loaded)
    keys, values = first_layer_by_differentiation(loaded)
    torch.testing.assert_close(estimated.key_blocks[0], keys, rtol=1e-3, atol=1e-4 * float(keys.max()))
    torch.testing.assert_close(estimated.value_blocks[0], values, rtol=1e-3, atol=1e-4 * float(values.max()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_are_symmetric_and_positive_semi_definite(tiny_model, dtype):
    estimated = estimate(load_model(tiny_model, dtype=dtype))
    assert estimated.coded_tokens == STOP - SINK_TOKENS
    for blocks in (estimated.key_blocks, estimated.value_blocks):
        assert (blocks.shape, blocks.dtype) == ((3, 2, 16, 16), torch.float32)
        assert torch.equal(blocks, blocks.transpose(2, 3))
        eigenvalues = torch.linalg.eigvalsh(blocks.double())
        assert (eigenvalues[..., 0] > -1e-6 * eigenvalues[..., -1]).all()
        assert (eigenvalues[..., -1] > 0).all()


def test_blocks_rank_heads_and_directions_as_gradients_do():
    """Fisher blocks from many draws of labels against the estimate, over layers, heads and sides.

    Every key head of the first layer, for one, is put out of use, which both must see.
    """
    loaded = make_model()
    with torch.no_grad():
        loaded.model.base_model.layers[0].self_attn.q_proj.weight.mul_(0.03)
        loaded.model.base_model.layers[1].self_attn.o_proj.weight[:, :16].mul_(0.2)
    fisher = torch.zeros(2, 2, 2, 8, 8)
    for seed in range(30):
        rows = capture_sensitivity(loaded, TOKEN_IDS, scored_tokens=SCORED, recent_window=WINDOW, seed=seed)
        for side, gradients in enumerate((rows.key_gradients, rows.value_gradients)):
            heads = gradients.view(-1, 2, 2, 8)
            fisher[side] += torch.einsum("tlgd,tlge->lgde", heads, heads)
    estimated = estimate(loaded)
    blocks = torch.stack([estimated.key_blocks, estimated.value_blocks])
    traces = torch.stack([each.diagonal(dim1=-2, dim2=-1).sum(-1).flatten() for each in (fisher, blocks)])
    ranks = traces.argsort(1).argsort(1).float()
    assert torch.corrcoef(ranks)[0, 1] > 0.7
    shapes = [each / each.norm(dim=(-2, -1), keepdim=True) for each in (fisher, blocks)]
    alike = (shapes[0] * shapes[1]).sum((-2, -1))
    white = fisher.diagonal(dim1=-2, dim2=-1).sum(-1) / fisher.norm(dim=(-2, -1)) / 8**0.5
    assert alike.mean() > white.mean()


def test_sums_are_means_over_the_coded_tokens_of_all_documents():
    loaded = make_model()
    documents = [estimate(loaded), estimate(loaded, TOKEN_IDS[:30])]
    sums = ForwardSensitivitySums(loaded.geometry)
    for document in documents:
        sums.add(document)
    counts = [document.coded_tokens for document in documents]
    assert counts == [21, 11]
    assert sums.coded_tokens == 32
    for side in ("key_blocks", "value_blocks"):
        expected = sum(getattr(d, side) * n for d, n in zip(documents, counts, strict=True)) / 32
        torch.testing.assert_close(getattr(sums, side), expected)
        assert getattr(sums, side).dtype == torch.float32


def test_sums_refuse_other_models_and_nothing():
    sums = ForwardSensitivitySums(KvGeometry(num_layers=3, num_kv_heads=2, head_size=8))
    with pytest.raises(CalibrationError, match="one model only"):
        sums.add(estimate(make_model()))
    for side in ("key_blocks", "value_blocks"):
        with pytest.raises(CalibrationError, match="at least one"):
            getattr(sums, side)


def test_the_same_document_gives_the_same_blocks_and_leaves_no_hook():
    loaded = make_model()
    first, again = estimate(loaded), estimate(loaded)
    for field in dataclasses.fields(ForwardSensitivity):
        one, other = getattr(first, field.name), getattr(again, field.name)
        assert one == other if isinstance(one, int) else torch.equal(one, other)
    for layer in loaded.model.base_model.layers:
        for module in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.post_attention_layernorm):
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


def test_documents_that_are_too_short_are_refused():
    with pytest.raises(CalibrationError, match="at least 20 tokens"):
        estimate(make_model(), TOKEN_IDS[:19])


def test_attention_without_the_known_projections_is_refused():
    loaded = make_model()
    del loaded.model.base_model.layers[1].self_attn.o_proj
    with pytest.raises(CalibrationError, match=r"does not know the attention.*capture gradients"):
        estimate(loaded)


def test_projections_that_are_not_linear_layers_are_refused():
    loaded = make_model()
    attention = loaded.model.base_model.layers[1].self_attn
    attention.q_proj = torch.nn.Sequential(attention.q_proj)  # as adapters and quantised layers wrap them
    with pytest.raises(CalibrationError, match="not plain linear layers"):
        estimate(loaded)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gpt-oss", "what its heads read differs"),  # a learned sink takes part of the softmax
        ("gemma2", "the residual stream behind it differs"),  # normalises what attention adds
    ],
)
def test_attention_of_another_kind_is_refused(kind, message):
    loaded = make_model(kind)
    loaded.model.float()  # mixtures of experts do not run in float64
    with pytest.raises(CalibrationError, match=message):
        estimate(loaded)


def test_attention_that_is_not_finite_is_refused():
    loaded = make_model()
    with torch.no_grad():
        loaded.model.base_model.layers[1].self_attn.v_proj.weight.fill_(torch.inf)
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        estimate(loaded)
