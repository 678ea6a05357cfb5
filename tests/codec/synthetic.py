"""Parameters and KV made up for tests of the kvtc profile: random bases, random valid plans."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import torch

from dynamo_kvtc.codec.base import TierBlock
from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange
from dynamo_kvtc.codec.parameters import CodecParameters, GroupParameters, SideParameters
from dynamo_kvtc.codec.plan import GROUP_SIZES, BitPlan, PlanGroup, QuantType
from dynamo_kvtc.codec.rope import RopeParameters

STORED = (QuantType.INT2, QuantType.INT4, QuantType.FP8)


def random_plan(components: int, seed: int) -> BitPlan:
    """A valid plan of all stored types, with gaps."""
    rng = random.Random(seed)
    groups: list[PlanGroup] = []
    start = rng.randrange(3)
    while start < components:
        size = rng.choice([size for size in GROUP_SIZES if size <= components - start])
        groups.append(PlanGroup(start, size, rng.choice(STORED)))
        start += size + rng.choice((0, 0, 1, 5))
    return BitPlan(tuple(groups))


def falling_plan(row: int, ratio: float) -> BitPlan:
    """A plan like calibrated ones: types fall from FP8 to nothing until the budget of `ratio` is spent."""
    budget, groups, start = 16 * row / ratio, [], 0
    for share, size, quant_type in (
        (0.04, 1, QuantType.FP8),
        (0.15, 16, QuantType.FP8),
        (0.65, 16, QuantType.INT4),
        (1.00, 64, QuantType.INT2),
    ):
        while start + size <= row:
            group = PlanGroup(start, size, quant_type)
            if sum(g.bits for g in groups) + group.bits > share * budget:
                break
            groups.append(group)
            start += size
    return BitPlan(tuple(groups))


def orthonormal_basis(components: int, row: int, generator: torch.Generator) -> torch.Tensor:
    """Random float32 ``[components, row]`` with orthonormal rows."""
    q, _ = torch.linalg.qr(torch.randn(row, components, generator=generator))
    return q.t().contiguous()


def make_parameters(
    geometry: KvGeometry,
    *,
    groups: int = 1,
    rope: RopeParameters | None = None,
    ratios: Sequence[float] = (8.0,),
    plans: str = "falling",
    seed: int = 0,
) -> CodecParameters:
    """Codec parameters with random bases; `plans` is "falling" or "random"."""
    generator = torch.Generator().manual_seed(seed)
    borders = [geometry.num_layers * i // groups for i in range(groups + 1)]

    def side(row: int, index: int) -> SideParameters:
        make = (
            {plan_id: falling_plan(row, ratio) for plan_id, ratio in enumerate(ratios, 1)}
            if plans == "falling"
            else {
                plan_id: random_plan(row, seed + 97 * index + plan_id)
                for plan_id in range(1, len(ratios) + 1)
            }
        )
        rank = max(plan.rank for plan in make.values())
        mean = 3 * torch.randn(row, generator=generator)
        return SideParameters(mean, orthonormal_basis(rank, row, generator), make)

    parts = []
    for index, (first, stop) in enumerate(pairwise(borders)):
        row = (stop - first) * geometry.layer_size
        layers = LayerRange(first, stop - first)
        parts.append(GroupParameters(layers, side(row, 2 * index), side(row, 2 * index + 1)))
    rope = rope or RopeParameters(theta=10_000.0, rotary_dim=geometry.head_size // 2 * 2)
    nominal = dict(enumerate(ratios, 1))
    return CodecParameters(bytes(range(32)), geometry, rope, tuple(parts), nominal)


def make_block(
    parameters: CodecParameters,
    tokens: int,
    *,
    first_position: int = 0,
    sink_tokens: int = 0,
    seed: int = 0,
    noise: float = 0.01,
) -> TierBlock:
    """KV whose coefficients have a falling spectrum under `parameters`, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    geometry = parameters.geometry
    sides = []
    for name in ("keys", "values"):
        rows = []
        for group in parameters.groups:
            side: SideParameters = getattr(group, name)
            rank = side.basis.shape[0]
            spectrum = 4.0 / (1 + torch.arange(rank)) ** 0.5
            rows.append(torch.randn(tokens, rank, generator=generator) * spectrum @ side.basis + side.mean)
        sides.append(torch.cat(rows, dim=1).view(tokens, geometry.num_layers, geometry.num_kv_heads, -1))
    keys, values = (side + noise * torch.randn(side.shape, generator=generator) for side in sides)
    positions = torch.arange(first_position, first_position + tokens)
    keys = parameters.rope.apply_rope(keys, positions)
    dtype = geometry.torch_dtype
    return TierBlock(keys.to(dtype), values.to(dtype), first_position, sink_tokens)
