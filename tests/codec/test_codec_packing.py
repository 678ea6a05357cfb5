"""Packing: exact sizes, exact inverse, and refusal of what no encoder writes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import random_plan

from dynamo_kvtc.codec.packing import CHUNK_BYTES, MIN_CHUNK_BYTES, SectionLayout, cut, pack, unpack
from dynamo_kvtc.codec.plan import BitPlan, PlanGroup, QuantType
from dynamo_kvtc.codec.quantiser import PlanQuantiser, QuantisedSection
from dynamo_kvtc.errors import ChunkTableError, PayloadError, ReservedBitsError


def quantised(plan: BitPlan, tokens: int, seed: int = 0) -> tuple[SectionLayout, QuantisedSection]:
    quantiser = PlanQuantiser(plan)
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(quantiser.components.numel(), tokens, generator=generator)
    return SectionLayout.of(quantiser), quantiser.quantise(c)


@settings(deadline=None, max_examples=60)
@given(components=st.integers(1, 300), tokens=st.integers(0, 19), seed=st.integers(0, 1000))
def test_unpacking_undoes_packing(components, tokens, seed):
    layout, section = quantised(random_plan(components, seed), tokens, seed)
    payload = pack(section)
    assert payload.size == layout.payload_size(tokens) == sum(layout.chunk_sizes(tokens))
    restored = unpack(payload, layout, tokens)
    assert torch.equal(restored.side, section.side)
    for quant_type, symbols in section.symbols.items():
        assert torch.equal(restored.symbols[quant_type], symbols)


def test_the_bytes_are_where_the_format_says():
    side = torch.tensor([[1.0, 2.0, 4.0], [0.5, 0.25, 0.0]], dtype=torch.float16)
    symbols = {
        QuantType.FP8: torch.empty((0, 3), dtype=torch.uint8),
        QuantType.INT4: torch.tensor([[1, 2, 3]], dtype=torch.uint8),
        QuantType.INT2: torch.tensor([[1, 2, 3]], dtype=torch.uint8),
    }
    payload = pack(QuantisedSection(side, symbols)).tobytes()
    assert payload == bytes.fromhex("3c4044383400 000000000000 2103 39")


@settings(deadline=None)
@given(regions=st.lists(st.integers(0, 200_000), min_size=1, max_size=6))
def test_chunks_are_bounded_cover_everything_and_keep_to_borders(regions):
    sizes = cut(regions)
    assert sum(sizes) == sum(regions)
    assert all(0 < size <= CHUNK_BYTES for size in sizes)
    if sum(regions) >= MIN_CHUNK_BYTES:
        assert min(sizes) >= MIN_CHUNK_BYTES
    borders = set(np.cumsum(sizes).tolist())
    if all(size >= MIN_CHUNK_BYTES for size in regions):
        assert set(np.cumsum(regions).tolist()) <= borders


def test_wrong_length_is_refused():
    layout, section = quantised(random_plan(50, 1), 5)
    payload = pack(section)
    for damaged in (payload[:-1], np.append(payload, np.uint8(0))):
        with pytest.raises(ChunkTableError, match="payload bytes"):
            unpack(damaged, layout, 5)


@pytest.mark.parametrize("quant_type", [QuantType.INT2, QuantType.INT4])
def test_set_padding_bits_are_refused(quant_type):
    layout, section = quantised(BitPlan((PlanGroup(0, 1, quant_type),)), 5)
    payload = pack(section)
    payload[-1] |= 0x80
    with pytest.raises(ReservedBitsError, match="padding"):
        unpack(payload, layout, 5)


def test_nan_symbols_and_side_data_are_refused():
    layout, section = quantised(BitPlan((PlanGroup(0, 16, QuantType.FP8),)), 4)
    payload = pack(section)
    symbols = payload.copy()
    symbols[-1] = 0xFF
    with pytest.raises(PayloadError, match="FP8"):
        unpack(symbols, layout, 4)
    side = payload.copy()
    side[0] = 0x7C
    with pytest.raises(PayloadError, match="side data"):
        unpack(side, layout, 4)
