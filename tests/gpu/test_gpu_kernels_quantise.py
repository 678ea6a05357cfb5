"""Symbols are bit-exact with the CPU's, from the same coefficients."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from synthetic import random_plan, random_rd_plan

from dynamo_kvtc.codec import packing, rd_packing
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.kernels.project_rd import quantise_symbols
from dynamo_kvtc.codec.gpu.kernels.quantise_kvtc import quantise_groups
from dynamo_kvtc.codec.gpu.kernels.rd_side_data import write_side_data
from dynamo_kvtc.codec.gpu.kernels.unpack_kvtc import unpack_groups
from dynamo_kvtc.codec.gpu.kernels.unpack_rd import unpack_symbols
from dynamo_kvtc.codec.gpu.kvtc_tables import KvtcTables
from dynamo_kvtc.codec.gpu.sections import RowTiles, Sections
from dynamo_kvtc.codec.importance import LEVELS, MIN_LEVEL, scales
from dynamo_kvtc.codec.quantiser import PlanQuantiser
from dynamo_kvtc.codec.rd_packing import RdLayout, RdSection
from dynamo_kvtc.codec.rd_quantiser import RdQuantiser


def layout_offsets(sizes: list[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


TOKENS = st.lists(st.integers(1, 24), min_size=1, max_size=2).map(tuple)


@settings(max_examples=4)
@given(tokens=TOKENS, seed=st.integers(0, 1 << 16))
@example(tokens=(13, 8), seed=0)
@example(tokens=(1,), seed=1)
@example(tokens=(17, 30), seed=2)
def test_kvtc_payloads_are_the_cpus_bytes(gpu: GpuDevice, tokens: tuple[int, ...], seed: int) -> None:
    plan = random_plan(120, seed)
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
