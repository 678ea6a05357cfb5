"""Gather and scatter in every layout, head size, block size, dtype and rotation, against the CPU's own way.

Cases cover every pair of these; each is a few tokens, out-of-order blocks, a start in mid-sequence.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layouts import CACHES, all_pairs, make_cache

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.kernels.gather import gather_rows
from dynamo_kvtc.codec.gpu.kernels.reconstruct import reconstruct_layers
from dynamo_kvtc.codec.gpu.paged import PagedSide, channel_pairs, to_pairs
from dynamo_kvtc.codec.gpu.rotation import rotation_tables
from dynamo_kvtc.codec.gpu.scattering import token_slots
from dynamo_kvtc.codec.rope import RopeParameters

LAYERS, BLOCKS = 2, 5


def rope_of(name: str, head_size: int) -> RopeParameters:
    kinds: dict[str, dict[str, Any]] = {
        "half": {},
        "partial": {"rotary_dim": head_size // 4 * 2},
        "interleaved": {"style": "interleaved"},
        "interleaved, partial": {"style": "interleaved", "rotary_dim": head_size // 4 * 2},
        "linear": {"scaling": "linear", "factor": 4.0},
        "llama3": {"scaling": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
        "yarn": {"scaling": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    }
    return RopeParameters(**{"theta": 10_000.0, "rotary_dim": head_size, **kinds[name]})


CASES = all_pairs(
    {
        "layout": CACHES,
        "head_size": (64, 80, 96, 128, 192, 256),
        "rope": ("half", "partial", "interleaved", "interleaved, partial", "linear", "llama3", "yarn"),
        "block_size": (8, 16, 32, 64, 128, 256),
        "dtype": (torch.bfloat16, torch.float16, torch.float32),
        "heads": (1, 2),
    }
)


def test_cases_cover_every_pair_and_are_few() -> None:
    assert len(CASES) < 80
    found = {(case["layout"], case["head_size"]) for case in CASES}
    assert len(found) == len(CACHES) * 6
    assert len({(case["rope"], case["block_size"]) for case in CASES}) == 7 * 6
    assert len({(case["dtype"], case["heads"]) for case in CASES}) == 6


class Case:
    """One combination: a cache, and 13 tokens in it from position 4,001 on, in out-of-order blocks."""

    def __init__(self, options: dict[str, Any], gpu: GpuDevice) -> None:
        self.heads, self.head_size = options["heads"], options["head_size"]
        self.dtype, self.block_size = options["dtype"], options["block_size"]
        self.rope = rope_of(options["rope"], self.head_size)
        self.pairs = channel_pairs(self.rope, self.head_size)
        self.cache = make_cache(
            options["layout"],
            LAYERS,
            BLOCKS,
            self.block_size,
            self.heads,
            self.head_size,
            self.dtype,
            gpu.device,
        )
        self.tokens = 13
        needed = -(-self.tokens // self.block_size)
        self.block_ids = [3, 0, 4, 1][:needed]
        self.slots = token_slots(self.block_ids, self.block_size)[: self.tokens]
        self.positions = torch.arange(4001, 4001 + self.tokens)
        self.row = LAYERS * self.heads * self.head_size
        generator = torch.Generator().manual_seed(self.head_size)
        shape = (self.tokens, LAYERS, self.heads, self.head_size)
        self.kv = torch.randn(shape, generator=generator).to(self.dtype)
        self.mean = torch.randn(self.row, generator=generator)
        self.weights = torch.randn((16, self.row), generator=generator) / 4
        self.coefficients = torch.randn((self.tokens, 16), generator=generator).to(torch.bfloat16)
        self.gpu = gpu

    def side(self, views: tuple[torch.Tensor, ...]) -> PagedSide:
        in_order = torch.equal(self.pairs.flatten(), torch.arange(self.head_size))
        return PagedSide.of(views, self.pairs.to(self.gpu.device), in_order=in_order)

    def write(self, views: tuple[torch.Tensor, ...]) -> None:
        """Put the tokens into the cache, one by one, by plain indexing."""
        for token, slot in enumerate(self.slots.tolist()):
            for layer, view in enumerate(views):
                view[slot // self.block_size, slot % self.block_size] = self.kv[token, layer].to(view.device)


@pytest.mark.parametrize("options", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_gather_and_scatter(gpu: GpuDevice, options: dict[str, Any]) -> None:
    case = Case(options, gpu)
    check_gather(case, rotate=True)
    check_scatter(case, rotate=True)


@pytest.mark.parametrize("options", CASES[::9], ids=lambda case: "-".join(map(str, case.values())))
def test_values_are_not_rotated(gpu: GpuDevice, options: dict[str, Any]) -> None:
    case = Case(options, gpu)
    check_gather(case, rotate=False)
    check_scatter(case, rotate=False)


def check_gather(case: Case, *, rotate: bool) -> None:
    """Rows are those of the CPU's codec to the last bit of bfloat16 but for its rounding."""
    gpu, views = case.gpu, case.cache.keys if rotate else case.cache.values
    case.write(views)
    rows = torch.empty((case.tokens, case.row), dtype=torch.bfloat16, device=gpu.device)
    status = torch.zeros(2, dtype=torch.int32, device=gpu.device)
    positions = case.positions.to(gpu.device)
    tables = rotation_tables(gpu, case.rope, positions, case.head_size, inverse=True) if rotate else None
    importance = to_pairs(torch.linspace(-1, 1, case.row).view(LAYERS, -1), case.pairs).flatten()
    owners = torch.zeros(case.tokens, dtype=torch.int32, device=gpu.device)
    with gpu.active():
        sums = gather_rows(
            gpu, case.side(views), case.slots.to(gpu.device), owners, status,
            to_pairs(case.mean.view(LAYERS, -1), case.pairs).to(gpu.device), tables,
            importance.to(gpu.device), rows,
        )  # fmt: skip
    expected = case.rope.remove_rope(case.kv, case.positions) if rotate else case.kv.float()
    centred = expected.flatten(1) - case.mean
    arranged = to_pairs(centred.view(case.tokens, LAYERS, -1), case.pairs).flatten(1)
    # Rounded to bfloat16: half a unit in the last place, and what float32's order of operations changes.
    assert torch.allclose(rows.cpu().float(), arranged, rtol=2.0**-8 + 2.0**-16, atol=1e-5)
    assert torch.allclose(sums.cpu(), centred @ torch.linspace(-1, 1, case.row), rtol=1e-3, atol=1e-2)
    assert not status.any()


def check_scatter(case: Case, *, rotate: bool) -> None:
    """Written tokens are the CPU's within rounding, and everything else is untouched."""
    gpu, views = case.gpu, case.cache.keys if rotate else case.cache.values
    for view in (*case.cache.keys, *case.cache.values):
        view.fill_(7.0)
    weights = to_pairs(case.weights.view(16, LAYERS, -1), case.pairs).transpose(0, 1)
    slots = case.slots.clone()
    slots[5] = -1
    positions = case.positions.to(gpu.device)
    tables = rotation_tables(gpu, case.rope, positions, case.head_size, inverse=False) if rotate else None
    with gpu.active():
        reconstruct_layers(
            gpu, case.coefficients.to(gpu.device), weights.to(torch.bfloat16).contiguous().to(gpu.device),
            to_pairs(case.mean.view(LAYERS, -1), case.pairs).to(gpu.device), tables, slots.to(gpu.device),
            case.side(views),
        )  # fmt: skip
    product = case.coefficients.double() @ case.weights.to(torch.bfloat16).double()
    rows = (product + case.mean.double()).float().view(case.kv.shape)
    expected = case.rope.apply_rope(rows, case.positions) if rotate else rows
    reference = [torch.full_like(view, 7.0, device="cpu") for view in views]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            for layer, view in enumerate(reference):
                place = slot // case.block_size, slot % case.block_size
                view[place] = expected[token, layer].to(view.dtype)
    # Half a unit in the last place of the cache's dtype, and now and then a whole one.
    unit = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-19}[case.dtype]
    for view, wanted in zip(views, reference, strict=True):
        found = view.cpu()
        assert torch.allclose(found.float(), wanted.float(), rtol=unit, atol=1e-5)
        assert case.dtype is torch.float32 or (found != wanted).float().mean() < 0.01
    others = case.cache.values if rotate else case.cache.keys
    assert all((view == 7.0).all() for view in others)
