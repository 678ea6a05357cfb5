"""The rd profile, fast against slow: payloads bit for bit, streams both ways, values within a tolerance.

From the same coefficients and levels both make the same payload. From the same KV they need not: a
coefficient or a level close to a border may be rounded to the other side of it where products are summed in
another order. Whole streams are therefore compared after decoding, each by both decoders; the tolerance is
that of `test_codec_reference`, in units of the decoded KV's largest magnitude M: one rounding of the cache's
dtype, plus 2**-16 M for products in float32 or 2**-6 M in bfloat16.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_block, make_rd_parameters, random_rd_plan, spectrum

from dynamo_kvtc.codec.base import TierBlock
from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.codec.importance import predict_levels, scales
from dynamo_kvtc.codec.rd import RdCodec
from dynamo_kvtc.codec.rd_packing import RdLayout, RdSection, pack, unpack
from dynamo_kvtc.codec.rd_quantiser import RdQuantiser
from dynamo_kvtc.codec.rd_reference import RdReferenceCodec, pack_rd, predict, unpack_rd
from dynamo_kvtc.errors import EncodeRangeError

PRODUCT_TOLERANCE = {"float32": 2.0**-16, "bfloat16": 2.0**-6}
GEOMETRIES = st.builds(
    KvGeometry,
    num_layers=st.integers(1, 4),
    num_kv_heads=st.integers(1, 3),
    head_size=st.integers(1, 8).map(lambda n: 2 * n),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
)


@settings(deadline=None, max_examples=60)
@given(
    components=st.integers(1, 120),
    tokens=st.integers(0, 9),
    seed=st.integers(0, 10_000),
    step=st.sampled_from([0.05, 0.3, 2.0]),
    coarse=st.booleans(),
)
def test_the_same_coefficients_make_the_same_payload(components, tokens, seed, step, coarse):
    generator = torch.Generator().manual_seed(seed)
    plan = random_rd_plan(components, step, generator)
    c = torch.randn(tokens, components, generator=generator) * spectrum(components)
    if coarse:  # numbers that lie on borders
        c = (c / step).round() * step / 2
    levels = torch.randint(-2, 3, (tokens,), generator=generator).to(torch.int8)
    quantiser, layout = RdQuantiser(plan), RdLayout(plan.counts)
    symbols = quantiser.quantise(c.t()[plan.components], scales(levels))
    payload = pack(RdSection(levels.numpy(), symbols.numpy()), layout)
    assert payload.tobytes() == pack_rd(c.double().numpy(), levels.tolist(), plan)

    slow = torch.from_numpy(unpack_rd(payload.tobytes(), plan, tokens))
    restored = unpack(payload, layout, tokens)
    fast = quantiser.dequantise(torch.from_numpy(restored.symbols), scales(torch.from_numpy(restored.levels)))
    torch.testing.assert_close(fast.double(), slow.t(), rtol=2.0**-21, atol=0)


@settings(deadline=None, max_examples=25)
@given(
    geometry=GEOMETRIES,
    tokens=st.integers(1, 9),
    sinks=st.integers(0, 3),
    sink_bits=st.sampled_from([8, 16]),
    first_position=st.integers(0, 100_000),
    compute_dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 1000),
)
def test_each_decodes_the_streams_of_the_other(
    geometry, tokens, sinks, sink_bits, first_position, compute_dtype, seed
):
    parameters = make_rd_parameters(geometry, groups=min(2, geometry.num_layers), seed=seed)
    block = make_block(
        parameters, tokens, first_position=first_position, sink_tokens=min(sinks, tokens), seed=seed
    )
    fast = RdCodec(parameters, ratio=5.0, sink_bits=sink_bits, compute_dtype=compute_dtype, threads=1)
    slow = RdReferenceCodec(parameters, ratio=5.0, sink_bits=sink_bits)
    for codec in (fast, slow):
        (stream,) = codec.encode([block])
        assert codec.header_bytes(tokens, block.sink_tokens) == codec.read_header(stream).header_size
        assert len(stream) <= codec.max_stream_bytes(tokens, block.sink_tokens)
        agree(fast.decode(stream), slow.decode(stream), compute_dtype)


def agree(fast: TierBlock, slow: TierBlock, compute_dtype: str) -> None:
    assert (fast.first_position, fast.sink_tokens) == (slow.first_position, slow.sink_tokens)
    for name in ("keys", "values"):
        found, wanted = getattr(fast, name), getattr(slow, name)
        assert found.dtype is wanted.dtype and found.shape == wanted.shape
        largest = float(wanted.float().abs().max())
        tolerance = largest * (torch.finfo(wanted.dtype).eps + PRODUCT_TOLERANCE[compute_dtype])
        torch.testing.assert_close(found.float(), wanted.float(), rtol=0, atol=tolerance)
        assert torch.equal(found[: fast.sink_tokens], wanted[: fast.sink_tokens])


@pytest.fixture
def parameters_and_block():
    parameters = make_rd_parameters(KvGeometry(2, 2, 8, "float32"))
    return parameters, make_block(parameters, 12)


def test_in_float32_both_encoders_lose_the_same(parameters_and_block):
    parameters, block = parameters_and_block
    codecs = (
        RdCodec(parameters, ratio=5.0, compute_dtype="float32"),
        RdReferenceCodec(parameters, ratio=5.0),
    )
    errors = [
        float((codec.decode(codec.encode([block])[0]).values - block.values).norm()) for codec in codecs
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


def test_levels_differ_at_most_where_the_prediction_lies_between_two(parameters_and_block):
    parameters, _ = parameters_and_block
    side = parameters.groups[0].keys
    rows = side.mean + 2 * torch.randn(400, side.mean.numel(), generator=torch.Generator().manual_seed(5))
    centred = rows - side.mean
    fast = predict_levels(centred, side.importance, side.importance_bias)
    slow = torch.tensor(predict(rows.double().numpy(), side))
    exact = centred.double() @ side.importance.double() + side.importance_bias
    close = ((exact - exact.floor()) - 0.5).abs() < 1e-4
    assert torch.equal(fast[~close].long(), slow[~close])
    assert len(set(slow.tolist())) > 5 and close.float().mean() < 0.01


def test_the_reference_refuses_what_the_fast_codec_refuses(parameters_and_block):
    parameters, block = parameters_and_block
    for number in (float("nan"), 1e9):
        values = block.values.clone()
        values[2, 0, 0, 0] = number
        for codec in (RdCodec(parameters, ratio=5.0), RdReferenceCodec(parameters, ratio=5.0)):
            with pytest.raises(EncodeRangeError, match="raw"):
                codec.encode([TierBlock(block.keys, values, 0)])
