"""The fast codec against the slow one: payloads bit for bit, streams both ways, values within a tolerance.

Tolerance between the two decoders, of the same stream, in units of the decoded KV's largest magnitude M:
one rounding of the cache's dtype, plus 2**-16 M for products in float32 or 2**-6 M for products in
bfloat16.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_block, make_parameters, random_plan

from dynamo_kvtc.codec.base import TierBlock
from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.codec.kvtc import KvtcCodec
from dynamo_kvtc.codec.packing import SectionLayout, pack, unpack
from dynamo_kvtc.codec.quantiser import PlanQuantiser, e4m3_to_float, float_to_e4m3
from dynamo_kvtc.codec.reference import ReferenceCodec
from dynamo_kvtc.codec.reference_steps import (
    e4m3_pattern,
    e4m3_value,
    pack_coefficients,
    unpack_coefficients,
)
from dynamo_kvtc.codec.rope import RopeParameters
from dynamo_kvtc.errors import EncodeRangeError, StreamMismatchError

GEOMETRIES = st.builds(
    KvGeometry,
    num_layers=st.integers(1, 4),
    num_kv_heads=st.integers(1, 3),
    head_size=st.integers(1, 8).map(lambda n: 2 * n),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
)

PRODUCT_TOLERANCE = {"float32": 2.0**-16, "bfloat16": 2.0**-6}


def coefficients_of(rank: int, tokens: int, seed: int, kind: str) -> torch.Tensor:
    """Coefficients of every kind that could tell two implementations apart."""
    c = torch.randn(tokens, rank, generator=torch.Generator().manual_seed(seed))
    return {
        "normal": c,
        "falling": c / (1 + torch.arange(rank)),
        "tiny": c * 1e-7,
        "large": c * 5_000,
        "coarse": (2 * c).round() / 2,
        "bfloat16": c.bfloat16().float(),
        "signed zeros": c.sign() * 0.0,
        "constant": torch.full_like(c, 0.1),
    }[kind]


KINDS = ["normal", "falling", "tiny", "large", "coarse", "bfloat16", "signed zeros", "constant"]


@settings(deadline=None, max_examples=60)
@given(
    components=st.integers(1, 150),
    tokens=st.integers(0, 9),
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(KINDS),
)
def test_the_same_coefficients_make_the_same_payload(components, tokens, seed, kind):
    plan = random_plan(components, seed)
    c = coefficients_of(plan.rank, tokens, seed, kind)
    quantiser = PlanQuantiser(plan)
    payload = pack(quantiser.quantise(c.t()[quantiser.components]))
    assert payload.tobytes() == pack_coefficients(c.double().numpy(), plan)

    slow = torch.from_numpy(unpack_coefficients(payload.tobytes(), plan, tokens))
    fast = quantiser.dequantise(unpack(payload, SectionLayout.of(quantiser), tokens))
    largest = float(slow.abs().max()) if slow.numel() else 0.0
    torch.testing.assert_close(fast.double(), slow.t()[quantiser.components], rtol=0, atol=largest * 2.0**-22)


def test_e4m3_agrees_for_every_pattern_and_between_them():
    patterns = torch.tensor([p for p in range(256) if p & 0x7F != 0x7F], dtype=torch.uint8)
    values = torch.tensor([e4m3_value(int(p)) for p in patterns])
    assert torch.equal(e4m3_to_float(patterns), values)
    ordered = values.unique()
    between = torch.cat((ordered, (ordered[1:] + ordered[:-1]) / 2, torch.linspace(-460, 460, 999)))
    assert float_to_e4m3(between).tolist() == [e4m3_pattern(float(x) + 0.0) for x in between]


@settings(deadline=None, max_examples=25)
@given(
    geometry=GEOMETRIES,
    tokens=st.integers(1, 9),
    sinks=st.integers(0, 3),
    sink_bits=st.sampled_from([8, 16]),
    first_position=st.integers(0, 100_000),
    style=st.sampled_from(["half", "interleaved"]),
    compute_dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 1000),
)
def test_each_decodes_the_streams_of_the_other(
    geometry, tokens, sinks, sink_bits, first_position, style, compute_dtype, seed
):
    rope = RopeParameters(
        theta=10_000.0,
        rotary_dim=max(2, geometry.head_size // 4 * 2),
        style=style,
        scaling="yarn",
        factor=4.0,
        original_max_position_embeddings=4096,
    )
    parameters = make_parameters(
        geometry, groups=min(2, geometry.num_layers), rope=rope, plans="random", seed=seed
    )
    block = make_block(
        parameters, tokens, first_position=first_position, sink_tokens=min(sinks, tokens), seed=seed
    )
    fast = KvtcCodec(parameters, ratio=8.0, sink_bits=sink_bits, compute_dtype=compute_dtype, threads=1)
    slow = ReferenceCodec(parameters, ratio=8.0, sink_bits=sink_bits)
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
        rounding = torch.finfo(wanted.dtype).eps
        tolerance = largest * (rounding + PRODUCT_TOLERANCE[compute_dtype])
        torch.testing.assert_close(found.float(), wanted.float(), rtol=0, atol=tolerance)
        assert torch.equal(found[: fast.sink_tokens], wanted[: fast.sink_tokens])


def test_in_float32_both_encoders_lose_the_same(parameters_and_block):
    parameters, block = parameters_and_block
    fast = KvtcCodec(parameters, ratio=8.0, compute_dtype="float32")
    slow = ReferenceCodec(parameters, ratio=8.0)
    errors = [
        float((codec.decode(codec.encode([block])[0]).values - block.values).norm()) for codec in (fast, slow)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


@pytest.fixture
def parameters_and_block():
    parameters = make_parameters(KvGeometry(2, 2, 8, "float32"))
    return parameters, make_block(parameters, 8)


def test_the_reference_refuses_what_the_fast_codec_refuses(parameters_and_block):
    parameters, block = parameters_and_block
    slow = ReferenceCodec(parameters, ratio=8.0)
    (stream,) = slow.encode([block])
    with pytest.raises(StreamMismatchError):
        slow.read_header(stream, binding=bytes([1]) * 32)
    block.values[2, 0, 0, 0] = torch.nan
    with pytest.raises(EncodeRangeError):
        slow.encode([block])
