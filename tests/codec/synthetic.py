"""Parameters and KV made up for tests of the kvtc and rd profiles: random bases, random valid plans."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import torch

from dynamo_kvtc.codec.base import TierBlock
from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange
from dynamo_kvtc.codec.header import Profile
from dynamo_kvtc.codec.parameters import (
    AnyParameters,
    CodecParameters,
    GroupParameters,
    KvtcParameters,
    RdParameters,
    RdSideParameters,
    SideParameters,
)
from dynamo_kvtc.codec.plan import GROUP_SIZES, BitPlan, PlanGroup, QuantType
from dynamo_kvtc.codec.rd_plan import RdPlan
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
) -> KvtcParameters:
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


def random_rd_plan(components: int, step: float, generator: torch.Generator) -> RdPlan:
    """A valid plan for the coefficients of `make_block` that leaves some components out.

    Every class is used as soon as there are four components; few symbols are beyond their class.
    """
    stored = torch.randperm(components, generator=generator)[: max(1, components * 9 // 10)].sort().values
    deviations = spectrum(components)[stored] / step
    borders = [int((deviations > limit).sum()) for limit in (30, 1.5, 0.4)]
    most = max(0, stored.numel() - 4)
    borders = [min(max(border, index), most + index) for index, border in enumerate(borders, 1)]
    borders = [0, *(min(border, stored.numel()) for border in borders), stored.numel()]
    return RdPlan(
        step=step,
        components=stored,
        counts=tuple(stop - start for start, stop in pairwise(borders)),
        rounding=0.2 + 0.3 * torch.rand(stored.numel(), generator=generator),
        offsets=0.2 * torch.rand(2, stored.numel(), generator=generator) - 0.1,
    )


def spectrum(components: int) -> torch.Tensor:
    """Standard deviations of the coefficients of `make_block`."""
    return 4.0 / (1 + torch.arange(components)) ** 0.5


def make_rd_parameters(
    geometry: KvGeometry,
    *,
    groups: int = 1,
    rope: RopeParameters | None = None,
    steps: Sequence[float] = (0.5,),
    seed: int = 0,
) -> RdParameters:
    """Parameters of the rd profile; the plan of a step has ten times the step as its ratio and its KL."""
    generator = torch.Generator().manual_seed(seed)
    plain = make_parameters(geometry, groups=groups, rope=rope, seed=seed)

    def side(row: int) -> RdSideParameters:
        size = geometry.head_size
        root = torch.eye(size) + 0.3 * torch.randn(row // size, size, size, generator=generator) / size**0.5
        components = max(1, row * 3 // 4)
        return RdSideParameters(
            mean=3 * torch.randn(row, generator=generator),
            basis=orthonormal_basis(components, row, generator),
            metric=root @ root.transpose(1, 2),
            importance=torch.randn(row, generator=generator) / row**0.5,
            importance_bias=0.5,
            plans={
                plan_id: random_rd_plan(components, step, generator) for plan_id, step in enumerate(steps, 1)
            },
        )

    parts = []
    for group in plain.groups:
        row = group.layers.count * geometry.layer_size
        parts.append(GroupParameters(group.layers, side(row), side(row)))
    nominal = {plan_id: 10 * step for plan_id, step in enumerate(steps, 1)}
    return CodecParameters(
        plain.artifact_id, geometry, plain.rope, tuple(parts), nominal, nominal, Profile.RD
    )


def make_block(
    parameters: AnyParameters,
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
            side = getattr(group, name)
            rank = side.basis.shape[0]
            weights = side.synthesis(torch.arange(rank))
            rows.append(torch.randn(tokens, rank, generator=generator) * spectrum(rank) @ weights + side.mean)
        sides.append(torch.cat(rows, dim=1).view(tokens, geometry.num_layers, geometry.num_kv_heads, -1))
    keys, values = (side + noise * torch.randn(side.shape, generator=generator) for side in sides)
    positions = torch.arange(first_position, first_position + tokens)
    keys = parameters.rope.apply_rope(keys, positions)
    dtype = geometry.torch_dtype
    return TierBlock(keys.to(dtype), values.to(dtype), first_position, sink_tokens)
