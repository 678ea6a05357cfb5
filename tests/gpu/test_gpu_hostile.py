"""Damaged payloads: kernels report whatever the CPU refuses, and read the rest as the CPU does."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import random_plan, random_rd_plan

from dynamo_kvtc.codec import packing, rd_packing
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.faults import fault_error
from dynamo_kvtc.codec.gpu.kernels.unpack_kvtc import unpack_groups
from dynamo_kvtc.codec.gpu.kernels.unpack_rd import UNPACK_ROWS, unpack_symbols
from dynamo_kvtc.codec.gpu.kvtc_tables import KvtcTables
from dynamo_kvtc.codec.gpu.sections import RowTiles, Sections
from dynamo_kvtc.codec.importance import LEVELS, MIN_LEVEL, scales
from dynamo_kvtc.codec.quantiser import PlanQuantiser
from dynamo_kvtc.codec.rd_packing import ESCAPE_BYTES, RdLayout, RdSection
from dynamo_kvtc.codec.rd_quantiser import RdQuantiser
from dynamo_kvtc.errors import BitstreamError

#: Places and values of damaged bytes; places count from the front or the back, where fields and padding are.
DAMAGE = st.lists(st.tuples(st.integers(-60, 400), st.integers(0, 255)), max_size=3)
TABLE = scales(torch.arange(MIN_LEVEL, MIN_LEVEL + LEVELS))


def damage(payload: np.ndarray, places: list[tuple[int, int]]) -> np.ndarray:
    damaged = payload.copy()
    for place, value in places:
        damaged[place % damaged.size] = value
    return damaged


@settings(max_examples=25)
@given(seed=st.integers(0, 1 << 16), tokens=st.integers(1, 11), places=DAMAGE)
def test_kvtc(gpu: GpuDevice, seed: int, tokens: int, places: list[tuple[int, int]]) -> None:
    plan = random_plan(30, seed)
    quantiser = PlanQuantiser(plan)
    layout = packing.SectionLayout.of(quantiser)
    generator = torch.Generator().manual_seed(seed)
    stored = quantiser.components.numel()
    c = torch.randn((stored, tokens), generator=generator)
    payload = damage(packing.pack(quantiser.quantise(c)), places)
    faults = torch.zeros(1, dtype=torch.int32, device=gpu.device)
    decoded = torch.empty((tokens, stored), dtype=torch.bfloat16, device=gpu.device)
    with gpu.active():
        on_device = torch.from_numpy(payload).to(gpu.device)
        tables = KvtcTables.make(gpu, plan)
        unpack_groups(gpu, on_device, tables, Sections.make(gpu, [tokens], [0]), decoded, faults)
    found = fault_error(int(faults.cpu()))
    try:
        expected = quantiser.dequantise(packing.unpack(payload, layout, tokens), torch.bfloat16)
    except BitstreamError:
        assert found is not None
        return
    assert found is None
    assert torch.equal(decoded.cpu(), expected.t())


@settings(max_examples=25)
@given(seed=st.integers(0, 1 << 16), tokens=st.integers(1, 11), places=DAMAGE, large=st.floats(0, 0.05))
def test_rd(gpu: GpuDevice, seed: int, tokens: int, places: list[tuple[int, int]], large: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    plan = random_rd_plan(24, 0.5, generator)
    stored = plan.components.numel()
    quantiser, layout = RdQuantiser(plan), RdLayout(plan.counts)
    c = 0.4 * torch.randn((stored, tokens), generator=generator)
    c[torch.rand(c.shape, generator=generator) < large] *= 1000  # symbols beyond their class
    levels = torch.randint(-2, 3, (tokens,), generator=generator).to(torch.int8)
    symbols = quantiser.quantise(c.clone(), scales(levels))
    payload = damage(rd_packing.pack(RdSection(levels.numpy(), symbols.numpy()), layout), places)
    escapes = (payload.size - layout.payload_bounds(tokens)[0]) // ESCAPE_BYTES
    start = payload.size - sum(layout.class_sizes(tokens))
    faults = torch.zeros(1, dtype=torch.int32, device=gpu.device)
    decoded = torch.empty((tokens, stored), dtype=torch.bfloat16, device=gpu.device)
    begin = torch.zeros(1, dtype=torch.int64, device=gpu.device)
    with gpu.active():
        unpack_symbols(
            gpu, torch.from_numpy(payload).to(gpu.device), begin,
            torch.tensor([escapes], dtype=torch.int32, device=gpu.device),
            RowTiles.make(gpu, plan.counts, UNPACK_ROWS), Sections.make(gpu, [tokens], [start]),
            TABLE.to(gpu.device), plan.offsets.to(gpu.device), plan.step, decoded, faults,
            any_escapes=escapes > 0,
        )  # fmt: skip
    found = fault_error(int(faults.cpu()))
    try:
        section = rd_packing.unpack(payload, layout, tokens)
    except BitstreamError:
        assert found is not None
        return
    assert found is None
    factors = scales(torch.from_numpy(section.levels))
    expected = quantiser.dequantise(torch.from_numpy(section.symbols), factors, torch.bfloat16)
    assert torch.equal(decoded.cpu(), expected.t())
