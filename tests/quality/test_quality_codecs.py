"""Baseline codecs: exact bytes, errors that fall with the bits, shapes; streams against the codec itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.quality.codecs import CODECS, CodecInputs, DocumentCodec
from benchmarks.quality.codecs.fp8 import Fp8Codec
from benchmarks.quality.codecs.integer_groups import IntegerGroupsCodec
from benchmarks.quality.codecs.none import NoCodec
from benchmarks.quality.codecs.pca import PcaCodec
from benchmarks.quality.codecs.rotation import RotationCodec, lloyd_max_normal
from benchmarks.quality.codecs.streams import StreamCodec
from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.calibration.model_cache import prefill
from dynamo_kvtc.calibration.models import LoadedModel
from dynamo_kvtc.codec.base import TierBlock
from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.codec.kvtc import KvtcCodec
from dynamo_kvtc.codec.raw import RawCodec
from dynamo_kvtc.errors import EvaluationError

LAYERS, HEADS, SIZE = 3, 2, 16
VECTORS_PER_TOKEN = 2 * LAYERS * HEADS
SINK_BYTES = 4 * VECTORS_PER_TOKEN * SIZE * 2


def _kv(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn((2, tokens, LAYERS, HEADS, SIZE), generator=generator)
    keys[..., 3] += 20  # as real keys, a channel far off
    return keys, values


def _error(codec: DocumentCodec, tokens: int = 100) -> float:
    keys, values = _kv(tokens)
    stored = codec.store(keys, values)
    return float((stored.keys - keys).square().mean() + (stored.values - values).square().mean())


@pytest.mark.parametrize(
    ("codec", "bytes_behind_sinks"),
    [
        (Fp8Codec(), lambda n: n * VECTORS_PER_TOKEN * (SIZE + 2)),
        (RotationCodec(3), lambda n: n * VECTORS_PER_TOKEN * (SIZE * 3 // 8 + 2)),
        (RotationCodec(2), lambda n: n * VECTORS_PER_TOKEN * (SIZE * 2 // 8 + 2)),
        (
            IntegerGroupsCodec("int2", 2, 8),
            # keys: a group for every channel and 8 tokens; values: two groups of 8 channels a vector
            lambda n: (
                4 * -(-n // 8) * LAYERS * HEADS * SIZE
                + 4 * 2 * n * LAYERS * HEADS
                + n * VECTORS_PER_TOKEN * SIZE * 2 // 8
            ),
        ),
    ],
)
@pytest.mark.parametrize("tokens", [5, 36, 101])
def test_stored_bytes_are_those_of_the_formula(
    codec: DocumentCodec, bytes_behind_sinks: Callable[[int], int], tokens: int
) -> None:
    keys, values = _kv(tokens)
    stored = codec.store(keys, values)
    assert stored.stored_bytes == SINK_BYTES + bytes_behind_sinks(tokens - 4)
    assert stored.keys.shape == stored.values.shape == keys.shape
    assert stored.keys.dtype == torch.float32


@pytest.mark.parametrize(
    "codecs",
    [
        [RotationCodec(bits) for bits in (4, 3, 2)],
        [IntegerGroupsCodec("int", bits, 32) for bits in (8, 4, 2)],
        [IntegerGroupsCodec("int4", 4, size) for size in (4, 32)],
        [NoCodec(rounded=False), NoCodec(rounded=True), Fp8Codec(), RotationCodec(2)],
    ],
)
def test_fewer_bits_mean_larger_errors(codecs: list[DocumentCodec]) -> None:
    errors = [_error(codec) for codec in codecs]
    assert errors == sorted(errors)
    assert errors[-1] > errors[0]


def test_no_codec_is_exact_and_counts_16_bits() -> None:
    keys, values = _kv(10)
    stored = NoCodec(rounded=False).store(keys, values)
    assert torch.equal(stored.keys, keys)
    assert torch.equal(stored.values, values)
    assert stored.stored_bytes == 10 * KvGeometry(LAYERS, HEADS, SIZE).token_bytes_16bit


def test_baselines_keep_sinks_at_16_bits_and_do_not_touch_their_input() -> None:
    keys, values = _kv(50)
    before = keys.clone()
    for codec in (Fp8Codec(), RotationCodec(2), IntegerGroupsCodec("int2", 2, 32)):
        stored = codec.store(keys, values)
        assert torch.equal(stored.keys[:4], keys[:4].bfloat16().float())
        assert not torch.equal(stored.keys[4:], keys[4:].bfloat16().float())
        assert torch.equal(keys, before)


def test_documents_shorter_than_the_sinks_are_all_sinks() -> None:
    keys, values = _kv(3)
    stored = RotationCodec(2).store(keys, values)
    assert stored.stored_bytes == 3 * VECTORS_PER_TOKEN * SIZE * 2
    assert torch.equal(stored.values, values.bfloat16().float())


def test_lloyd_max_levels_are_the_published_ones() -> None:
    # Max, "Quantizing for minimum distortion", 1960, table I
    expected = {1: [0.7980], 2: [0.4528, 1.510], 3: [0.2451, 0.7560, 1.344, 2.152]}
    for bits, half in expected.items():
        levels = lloyd_max_normal(bits)
        assert levels[2 ** (bits - 1) :].tolist() == pytest.approx(half, abs=1e-3)
        assert torch.allclose(levels, -levels.flip(0))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3))
def test_rotation_reaches_the_distortion_of_its_code_book_for_vectors_of_any_shape(
    seed: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(400, 1, 1, 64)
    x[..., :8] = torch.rand((400, 1, 1, 8), generator=generator) * scale  # far from normal before rotation
    stored = RotationCodec(2).store(x, x)
    relative = (stored.keys - x)[4:].square().sum() / x[4:].square().sum()
    assert 0.08 < float(relative) < 0.16  # .1175 for independent normal coordinates


def test_constant_and_zero_vectors_survive() -> None:
    for codec in (Fp8Codec(), RotationCodec(4), IntegerGroupsCodec("int4", 4, 32)):
        zeros = torch.zeros(40, LAYERS, HEADS, SIZE)
        stored = codec.store(zeros, zeros)
        assert float(stored.keys.abs().max() + stored.values.abs().max()) < 1e-3
    ones = torch.ones(40, LAYERS, HEADS, SIZE)
    assert torch.equal(IntegerGroupsCodec("int2", 2, 8).store(ones, ones).keys, ones)


def test_fp8_keeps_the_largest_element_of_a_vector() -> None:
    x = torch.rand(400, 1, 1, 64)
    stored = Fp8Codec().store(x, x)
    assert stored.keys.isfinite().all()
    assert torch.allclose(stored.keys.amax(-1), x.amax(-1), rtol=2e-3)


def test_truncation_keeps_what_the_basis_spans(byte_model: LoadedModel, byte_artifact: Artifact) -> None:
    keys, values = prefill(byte_model, list(range(60)))
    row = byte_artifact.parameters.groups[0].keys.mean.numel()
    fine, coarse = PcaCodec(byte_artifact.parameters, 2.0), PcaCodec(byte_artifact.parameters, 8.0)
    stored = fine.store(keys, values)
    assert stored.stored_bytes == SINK_BYTES + 56 * 2 * (row // 2) * 2
    assert coarse.store(keys, values).stored_bytes == SINK_BYTES + 56 * 2 * (row // 8) * 2
    errors = [(c.store(keys, values).keys - keys)[4:].square().sum() for c in (fine, coarse)]
    assert 0 < errors[0] < errors[1] < keys[4:].square().sum()
    with pytest.raises(EvaluationError, match="lower ratio"):
        PcaCodec(byte_artifact.parameters, 1e6)


def test_streams_count_every_byte_and_decode_what_the_codec_decodes(
    byte_model: LoadedModel, byte_artifact: Artifact
) -> None:
    keys, values = prefill(byte_model, list(range(100)))
    codec = KvtcCodec(byte_artifact.parameters, ratio=4.0)
    stored = StreamCodec("kvtc", "4x", codec, 64).store(keys, values)
    exact = RawCodec(byte_model.geometry)
    raw = StreamCodec("raw", "raw", exact, 64).store(keys, values)
    assert torch.equal(raw.keys, keys)
    assert torch.equal(raw.values, values)
    assert raw.stored_bytes == exact.max_stream_bytes(64, 4) + exact.max_stream_bytes(36, 0)
    assert stored.stored_bytes < raw.stored_bytes / 3
    assert 0 < float((stored.keys - keys)[4:].square().mean()) < float(keys[4:].square().mean())


def test_blocks_that_a_codec_refuses_are_stored_as_they_are(
    byte_model: LoadedModel, byte_artifact: Artifact
) -> None:
    keys, values = (side.clone() for side in prefill(byte_model, list(range(100))))
    keys[80] = 1e30  # beyond every scale of 16 bits
    codec = KvtcCodec(byte_artifact.parameters, ratio=4.0)
    stored = StreamCodec("kvtc", "4x", codec, 64).store(keys, values)
    assert torch.equal(stored.keys[64:], keys[64:])
    assert torch.equal(stored.values[64:], values[64:])
    first = codec.encode([TierBlock(keys[:64], values[:64], 0, 4)])[0]
    assert stored.stored_bytes == len(first) + 36 * byte_model.geometry.token_bytes_16bit


def test_every_family_of_the_registry_builds_and_keeps_shapes(
    byte_model: LoadedModel, byte_artifact: Artifact
) -> None:
    keys, values = prefill(byte_model, list(range(80)))
    inputs = CodecInputs(byte_model.geometry, {"kvtc": byte_artifact}, tier_block_tokens=64)
    for name, family in CODECS.items():
        if family.profile not in (None, "kvtc"):
            continue
        codecs = family.build(inputs)
        assert codecs
        assert len({codec.setting for codec in codecs}) == len(codecs)
        for codec in codecs:
            assert codec.family == name
            stored = codec.store(keys, values)
            assert stored.keys.shape == stored.values.shape == keys.shape
            assert stored.stored_bytes > 0


def test_a_missing_artifact_is_named(byte_model: LoadedModel) -> None:
    with pytest.raises(EvaluationError, match="kvtc"):
        CODECS["kvtc"].build(CodecInputs(byte_model.geometry, {}))
