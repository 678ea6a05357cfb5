"""Packing of the rd profile: exact inverse, bytes where the format says, refusal of all others."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_kvtc.codec.entropy import HuffmanCoder
from dynamo_kvtc.codec.importance import LEVELS, MIN_LEVEL
from dynamo_kvtc.codec.rd_chunks import cut_symbols
from dynamo_kvtc.codec.rd_packing import RdLayout, RdSection, pack, unpack
from dynamo_kvtc.codec.rd_plan import SymbolClass
from dynamo_kvtc.errors import ChunkTableError, EncodeRangeError, PayloadError, ReservedBitsError

COUNTS = st.tuples(*[st.integers(0, 5)] * 4)


def random_section(counts: tuple[int, ...], tokens: int, seed: int, escapes: float = 0.05) -> RdSection:
    """Symbols within their classes, of which the share `escapes` then moves beyond them."""
    rng = np.random.default_rng(seed)
    limits = np.repeat([symbol_class.limit for symbol_class in SymbolClass], counts)[:, None]
    symbols = rng.integers(-limits, limits + 1, size=(sum(counts), tokens))
    beyond = (rng.random(symbols.shape) < escapes) & (limits < 32_767)
    symbols = np.where(
        beyond, np.where(symbols < 0, -1, 1) * rng.integers(np.minimum(limits + 1, 32_767), 32_768), symbols
    )
    levels = rng.integers(MIN_LEVEL, MIN_LEVEL + LEVELS, size=tokens)
    return RdSection(levels.astype(np.int8), symbols.astype(np.int16))


@settings(deadline=None, max_examples=80)
@given(counts=COUNTS, tokens=st.integers(0, 23), seed=st.integers(0, 1000))
def test_unpacking_undoes_packing(counts, tokens, seed):
    layout, section = RdLayout(counts), random_section(counts, tokens, seed)
    payload = pack(section, layout)
    least, most = layout.payload_bounds(tokens)
    assert least <= payload.size <= most
    chunks = layout.chunks(tokens, payload.size)
    assert sum(map(sum, chunks)) == payload.size
    assert [len(chunks), *chunks[1:]] == [len(layout.max_chunks(tokens)), *layout.max_chunks(tokens)[1:]]
    restored = unpack(payload, layout, tokens)
    np.testing.assert_array_equal(restored.levels, section.levels)
    np.testing.assert_array_equal(restored.symbols, section.symbols)


def test_the_bytes_are_where_the_format_says():
    symbols = np.array(
        [[300, -1, 0], [-5, 200, 127], [1, -2, 7], [1, -1, 0], [0, 0, 3]],
        dtype=np.int16,
    )
    section = RdSection(np.array([-5, 10, 0], dtype=np.int8), symbols)
    assert pack(section, RdLayout((1, 1, 1, 2))).tobytes() == bytes.fromhex(
        "02000000 f005"  # two escapes, levels
        " 0409"  # gaps 4 and 9, their lowest bytes
        " 9006"  # zigzag of 200 and 3, low bytes
        " 0000 0000 0000 0100"  # the gaps' other bytes, the zigzags' high bytes
        " 010000 2cff00"  # 300 = 256 + 44, -1 = 0 - 1, 0
        " fb7f7f e107 0709"
    )


@settings(deadline=None)
@given(
    counts=st.tuples(*[st.integers(0, 300)] * 4),
    tokens=st.integers(1, 65_536),
    before=st.integers(4, 65_536),
)
def test_runs_and_chunks_cover_everything_within_their_bounds(counts, tokens, before):
    chunks = cut_symbols(counts, tokens, before)
    assert sum(map(sum, chunks)) == sum(RdLayout(counts).class_sizes(tokens))
    assert all(run > 0 for chunk in chunks for run in chunk)
    assert all(sum(chunk) <= 65_536 for chunk in chunks) and before + sum(chunks[0]) <= 65_536
    assert all(chunks[1:])


def test_runs_are_cut_where_the_specification_says():
    (runs,) = cut_symbols((0, 112, 0, 0), 256, 4)
    assert runs == tuple(256 * components for components in (8, 15, 22, 30, 37))
    # NIBBLE rows have half the bytes and go on counting components; 51 bytes of TRIT are a run of their own.
    (runs,) = cut_symbols((0, 10, 12, 1), 256, 4)
    assert runs == (2560, 128 * 12, 52)
    # What is too short for a run shares one: both bytes of a WIDE symbol here, and the first BYTE row.
    (runs,) = cut_symbols((1, 1, 0, 0), 100, 4)
    assert runs == (300,)


def test_where_rates_fall_runs_are_smaller_than_even_ones():
    rng = np.random.default_rng(5)
    layout, tokens = RdLayout((0, 60, 0, 0)), 256
    widths = 40 / np.arange(1, 61)[:, None] ** 0.7
    symbols = np.rint(rng.laplace(0, widths, (60, tokens))).clip(-127, 127).astype(np.int16)
    payload = pack(RdSection(np.zeros(tokens, np.int8), symbols), layout)
    (runs,) = layout.chunks(tokens, payload.size)
    coder, plain, symbols_size = HuffmanCoder(), payload.tobytes(), 60 * tokens
    assert sum(runs[1:]) == symbols_size
    even = [runs[0], *[symbols_size // 2] * 2]
    assert len(coder.encode_runs(plain, runs)) < len(coder.encode_runs(plain, even))


@pytest.mark.parametrize("tokens", [1, 64, 4_096, 65_536])
def test_chunks_of_any_number_of_tokens_are_ones_that_deflate_takes(tokens):
    chunks = RdLayout((2, 300, 200, 400)).max_chunks(tokens)
    assert max(map(sum, chunks)) <= 65_536


def test_a_section_with_too_many_escapes_is_refused():
    layout = RdLayout((0, 0, 0, 20))
    section = RdSection(np.zeros(500, np.int8), np.full((20, 500), 2, np.int16))
    with pytest.raises(EncodeRangeError, match="10000 of"):
        pack(section, layout)


def packed(seed: int = 3) -> tuple[RdLayout, np.ndarray]:
    """A payload of 7 tokens with escapes, one row of each class but WIDE; symbols start at its end - 13."""
    layout = RdLayout((0, 1, 1, 1))
    symbols = np.array([[300, 5, 0, 0, -128, 0, 1], [1, 2, 3, 4, 5, 6, 7], [1, 0, -1, 2, 0, 0, 1]])
    return layout, pack(RdSection(np.zeros(7, np.int8), symbols.astype(np.int16)), layout)


@pytest.mark.parametrize(
    ("position", "byte", "error", "message"),
    [
        (0, 2, ChunkTableError, "says that it has 2 escapes"),
        (3, 0xFF, ChunkTableError, "escapes"),
        (7, 0x55, ReservedBitsError, "level"),
        (8 + 2, 200, PayloadError, "behind the last symbol"),
        (8 + 5, 2, PayloadError, "does not agree"),  # a value within the class
        (8 + 5, 3, PayloadError, "does not agree"),  # a value of the other sign
        (-13, 0, PayloadError, "does not agree"),  # the clamped symbol of an escape
        (-8, 0x80, PayloadError, "below -127"),
        (-6, 0x81, PayloadError, "below -7"),
        (-3, 0x17, ReservedBitsError, "last token"),
        (-2, 243, PayloadError, "at most 242"),
        (-1, 27, ReservedBitsError, "last token"),
    ],
)
def test_what_no_encoder_writes_is_refused(position, byte, error, message):
    layout, payload = packed()
    assert payload[0] == 3 and payload.size == 8 + 6 * 3 + 7 + 4 + 2
    payload[position] = byte
    with pytest.raises(error, match=message):
        unpack(payload, layout, 7)


def test_the_wide_pattern_without_a_positive_counterpart_is_refused():
    layout = RdLayout((1, 0, 0, 0))
    payload = pack(RdSection(np.zeros(1, np.int8), np.array([[32_767]], np.int16)), layout)
    assert unpack(payload, layout, 1).symbols == 32_767
    payload[-2:] = 0x80, 0
    with pytest.raises(PayloadError, match="below -32767"):
        unpack(payload, layout, 1)


def test_wrong_length_is_refused():
    layout, payload = packed()
    for damaged in (payload[:-1], payload[:5], np.append(payload, np.uint8(0))):
        with pytest.raises(ChunkTableError):
            unpack(damaged, layout, 7)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), counts=COUNTS, tokens=st.integers(0, 9), seed=st.integers(0, 100))
def test_any_payload_is_refused_or_is_one_that_packing_makes(data, counts, tokens, seed):
    """No two payloads mean the same, so what is accepted packs to the same bytes again."""
    layout = RdLayout(counts)
    payload = pack(random_section(counts, tokens, seed), layout)
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, payload.size - 1))] = data.draw(st.integers(0, 255))
    try:
        section = unpack(payload, layout, tokens)
    except (PayloadError, ChunkTableError, ReservedBitsError):
        return
    np.testing.assert_array_equal(pack(section, layout), payload)
