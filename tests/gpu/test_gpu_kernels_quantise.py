"""Symbols are bit-exact with the CPU's, from the same coefficients."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from synthetic import random_plan, random_rd_plan

from dynamo_kvtc.codec import packing, rd_packing
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.kernels.project_kvtc import quantise_groups
from dynamo_kvtc.codec.gpu.kernels.project_rd import quantise_symbols
from dynamo_kvtc.codec.gpu.kernels.rd_side_data import write_side_data
from dynamo_kvtc.codec.gpu.kernels.unpack_kvtc import unpack_groups
from dynamo_kvtc.codec.gpu.kernels.unpack_rd import unpack_symbols
from dynamo_kvtc.codec.gpu.kvtc_tables import UNIT_ROWS, KvtcTables
from dynamo_kvtc.codec.gpu.sections import RowTiles, Sections
from dynamo_kvtc.codec.importance import LEVELS, MIN_LEVEL, scales
from dynamo_kvtc.codec.plan import BitPlan, PlanGroup, QuantType
from dynamo_kvtc.codec.quantiser import STORED_TYPES, PlanQuantiser
from dynamo_kvtc.codec.rd_packing import RdLayout, RdSection
from dynamo_kvtc.codec.rd_quantiser import RdQuantiser


def layout_offsets(sizes: list[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


TOKENS = st.lists(st.integers(1, 24), min_size=1, max_size=2).map(tuple)


@settings(max_examples=4)
@given(tokens=TOKENS, seed=st.integers(0, 1 << 16), components=st.just(120))
@example(tokens=(13, 8), seed=0, components=120)
@example(tokens=(1,), seed=1, components=120)
@example(tokens=(17, 30), seed=2, components=120)
@example(tokens=(5, 3), seed=6, components=1500)  # groups of 1,024, 256 and 64
def test_kvtc_payloads_are_the_cpus_bytes(
    gpu: GpuDevice, tokens: tuple[int, ...], seed: int, components: int
) -> None:
    plan = random_plan(components, seed)
    quantiser = PlanQuantiser(plan)
    layout = packing.SectionLayout.of(quantiser)
    generator = torch.Generator().manual_seed(seed)
    stored = quantiser.components.numel()
    c = torch.randn((stored, sum(tokens)), generator=generator) * 10 ** torch.linspace(3, -6, stored)[:, None]
    c[:, 0] = 0  # a scale of 0
    c[stored // 2, :] = -0.0
    expected, start = [], 0
    for count in tokens:
        expected.append(packing.pack(quantiser.quantise(c[:, start : start + count])))
        start += count
    sizes = [layout.payload_size(count) for count in tokens]
    payload = torch.full((sum(sizes),), 0xAA, dtype=torch.uint8, device=gpu.device)
    status = torch.zeros(len(tokens), dtype=torch.int32, device=gpu.device)
    sections = Sections.make(gpu, tokens, layout_offsets(sizes))
    tables = KvtcTables.make(gpu, plan)
    with gpu.active():
        quantise_groups(gpu, c.to(gpu.device), tables, sections, payload, status)
        decoded = torch.empty((sum(tokens), stored), dtype=torch.bfloat16, device=gpu.device)
        faults = torch.zeros_like(status)
        unpack_groups(gpu, payload, tables, sections, decoded, faults)
        result = payload.cpu()
    assert not status.any()
    assert not faults.any()
    assert torch.equal(result, torch.cat([torch.from_numpy(part) for part in expected]))
    start = 0
    for part, count in zip(expected, tokens, strict=True):
        values = quantiser.dequantise(packing.unpack(part, layout, count), torch.bfloat16)
        assert torch.equal(decoded[start : start + count].cpu(), values.t())
        start += count


@given(components=st.integers(1, 3000), seed=st.integers(0, 1 << 16), ones=st.booleans())
def test_kvtc_panels_hold_each_group_once(gpu: GpuDevice, components: int, seed: int, ones: bool) -> None:
    plan = random_plan(components, seed)
    if ones:
        singles = tuple(PlanGroup(index, 1, QuantType.INT4) for index in range(components))
        plan = BitPlan(singles)
    tables = KvtcTables.make(gpu, plan)
    units, panels = tables.units.tolist(), tables.panels.tolist()
    seen: dict[int, tuple[int, int, int]] = {}
    for bits, first_unit, unit_stop, first_row, row_stop in panels:
        row = first_row
        for group, first, rows, each in units[first_unit:unit_stop]:
            assert first == row
            row += rows
            for index in range(rows if each else 1):
                seen[group + index] = (bits, first + index, 1 if each else rows)
            assert not each or rows <= UNIT_ROWS
        assert row == row_stop
        assert row_stop - first_row <= (tables.panel_rows if unit_stop - first_unit == 1 else 256)
    assert sorted(seen) == list(range(len(plan.groups)))
    start = 0
    for quant_type in STORED_TYPES:
        for index, found in enumerate(plan.groups):
            if found.type is quant_type:
                assert seen[index] == (quant_type.bits, start, found.size)
                start += found.size
    # The largest first, so that no program begins one when the others are about to end.
    sizes = [stop - first for *_, first, stop in panels]
    assert sizes == sorted(sizes, reverse=True)
    assert tables.panel_rows == max(sizes, default=0)
    if ones:
        assert len(units) == -(-components // UNIT_ROWS)


@settings(max_examples=4)
@given(tokens=TOKENS, seed=st.integers(0, 1 << 16))
@example(tokens=(1,), seed=1)
@example(tokens=(30, 17), seed=2)
@example(tokens=(10,), seed=3)
@example(tokens=(140, 7), seed=4)
def test_rd_payloads_are_the_cpus_bytes(gpu: GpuDevice, tokens: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    plan = random_rd_plan(60, 0.5, generator)
    stored = plan.components.numel()
    quantiser, layout = RdQuantiser(plan), RdLayout(plan.counts)
    spread = 10 ** torch.linspace(2.5, -1, stored)
    c = torch.randn((stored, sum(tokens)), generator=generator) * spread[:, None]
    levels = torch.randint(MIN_LEVEL, MIN_LEVEL + LEVELS, (sum(tokens),), generator=generator).to(torch.int8)
    levels = levels.clamp(max=3)
    table = scales(torch.arange(MIN_LEVEL, MIN_LEVEL + LEVELS))
    expected, start = [], 0
    for count in tokens:
        part = slice(start, start + count)
        symbols = quantiser.quantise(c[:, part].clone(), scales(levels[part]))
        expected.append(rd_packing.pack(RdSection(levels[part].numpy(), symbols.numpy()), layout))
        start += count
    slabs = [layout.payload_bounds(count)[1] for count in tokens]
    most = [layout.side_size(count, layout.max_escapes(count)) for count in tokens]
    starts = [slab + side for slab, side in zip(layout_offsets(slabs), most, strict=True)]
    sections = Sections.make(gpu, tokens, starts)
    payload = torch.full((sum(slabs),), 0xAA, dtype=torch.uint8, device=gpu.device)
    status = torch.zeros(len(tokens), dtype=torch.int32, device=gpu.device)
    capacity = max(layout.max_escapes(count) for count in tokens)
    counts = torch.zeros_like(status)
    lists = torch.zeros((2, len(tokens), capacity), dtype=torch.int32, device=gpu.device)
    tiles = RowTiles.make(gpu, plan.counts, 32)
    nibbles = (levels.int() - MIN_LEVEL).to(gpu.device)
    with gpu.active():
        factors = (scales(levels) / torch.tensor(plan.step)).to(gpu.device)
        quantise_symbols(
            gpu, c.to(gpu.device), factors, plan.rounding.to(gpu.device), tiles, sections, payload,
            (counts, lists[0], lists[1]), status,
        )  # fmt: skip
        write_side_data(gpu, nibbles, (counts, lists[0], lists[1]), sections, payload)
        result, found = payload.cpu(), counts.tolist()
    assert not status.any()
    sides = []
    for start, count, escapes, part in zip(starts, tokens, found, expected, strict=True):
        first = start - layout.side_size(count, escapes)
        sides.append(first)
        assert result[first : first + part.size].tolist() == part.tolist()
    decoded = torch.empty((sum(tokens), stored), dtype=torch.bfloat16, device=gpu.device)
    faults = torch.zeros_like(status)
    with gpu.active():
        unpack_symbols(
            gpu, payload, torch.tensor(sides, device=gpu.device), counts, tiles, sections,
            table.to(gpu.device), plan.offsets.to(gpu.device), plan.step, decoded, faults, any_escapes=True,
        )  # fmt: skip
    assert not faults.any()
    start = 0
    for part, count in zip(expected, tokens, strict=True):
        section = rd_packing.unpack(part, layout, count)
        factors = scales(torch.from_numpy(section.levels))
        values = quantiser.dequantise(torch.from_numpy(section.symbols), factors, torch.bfloat16)
        assert torch.equal(decoded[start : start + count].cpu(), values.t())
        start += count
