"""Parameters and KV made up for a shape: a random basis, real shares of components and real statistics.

How many components are stored, in which classes, and how their coefficients spread are those of artifacts of
SmolLM2-135M (rows of 5,760 and 1,920 elements) at 16x; coefficients are independent Gaussians. The work is
that of a calibrated artifact, and so, within some per cent, are the sizes of streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from dynamo_kvtc.calibration.settings import default_layer_groups, split_layers
from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.codec.header import Profile
from dynamo_kvtc.codec.parameters import (
    AnyParameters,
    CodecParameters,
    GroupParameters,
    RdSideParameters,
    SideParameters,
)
from dynamo_kvtc.codec.plan import GROUP_SIZES, SIDE_BITS, BitPlan, PlanGroup, QuantType
from dynamo_kvtc.codec.rd_plan import RdPlan
from dynamo_kvtc.evaluation.gpu.shapes import BenchShape

__all__ = ["PLAN_ID", "RATIO", "MadeUp", "make_up", "write_kv"]

PLAN_ID, RATIO = 1, 16.0

#: rd at 16x: components of each class over elements of a row.
_RD_SHARES = {"keys": (0.0033, 0.0729, 0.1431, 0.0413), "values": (0.0050, 0.1146, 0.2061, 0.0509)}

#: rd at 16x: deviations in steps at these quantiles of each class.
_QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_RD_DEVIATIONS = (
    (300.0, 216.0, 133.0, 83.0, 64.0, 55.0, 50.0),
    (51.0, 18.6, 8.85, 4.5, 2.94, 2.4, 1.64),
    (2.4, 1.75, 1.35, 0.93, 0.68, 0.57, 0.45),
    (0.59, 0.52, 0.48, 0.45, 0.42, 0.4, 0.36),
)

#: kvtc at 16x: share of the budget that goes to INT4, the rest to INT2; the largest deviation and the power
#: by which deviations fall.
_INT4_SHARE, _LARGEST, _POWER = 0.75, 15.0, 0.55


@dataclass(frozen=True)
class MadeUp:
    """Parameters of one profile for one shape.

    Attributes
    ----------
    parameters : AnyParameters
        One plan, `PLAN_ID`, whose nominal ratio is `RATIO`.
    deviations : dict[str, list[torch.Tensor]]
        By side and layer group: float32 ``[components]``, of the coefficients of `write_kv`.
    """

    parameters: AnyParameters
    deviations: dict[str, list[torch.Tensor]]


def make_up(
    shape: BenchShape,
    profile: str,
    *,
    layers_per_group: int | None = None,
    device: torch.device | None = None,
    with_bases: bool = True,
) -> MadeUp:
    """Make parameters; bases of groups of one size are one tensor.

    Parameters
    ----------
    profile : str
        ``"rd"`` or ``"kvtc"``.
    layers_per_group : int, optional
        By default what calibration takes for the profile.
    device : torch.device, optional
        Where bases are made orthonormal; they end on the CPU.
    with_bases : bool
        False leaves bases 0, without memory of their own: for sizes.
    """
    geometry = shape.geometry
    layers = (
        split_layers(geometry.num_layers, layers_per_group)
        if layers_per_group
        else default_layer_groups(profile, geometry)
    )
    bases: dict[tuple[int, int], torch.Tensor] = {}
    groups: list[GroupParameters[SideParameters | RdSideParameters]] = []
    deviations: dict[str, list[torch.Tensor]] = {"keys": [], "values": []}
    for group in layers:
        row = group.count * geometry.layer_size
        sides = []
        for name in ("keys", "values"):
            plan = _kvtc_plan(row) if profile == "kvtc" else _rd_plan(row, _RD_SHARES[name])
            key = (row, plan.rank)
            if key not in bases:
                empty = torch.zeros(()).expand(key[1], row)
                bases[key] = _orthonormal(plan.rank, row, device) if with_bases else empty
            deviations[name].append(_deviations(plan))
            sides.append(_side(geometry, bases[key], plan))
        groups.append(GroupParameters(group, *sides))
    parameters: AnyParameters = CodecParameters(
        artifact_id=bytes(32),
        geometry=geometry,
        rope=shape.rope,
        groups=tuple(groups),
        ratios={PLAN_ID: RATIO},
        profile=Profile[profile.upper()],
    )
    return MadeUp(parameters, deviations)


def write_kv(
    made: MadeUp,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    block_ids: Sequence[int],
    *,
    seed: int = 0,
) -> None:
    """Write KV of a sequence from position 0 into a paged cache, on the cache's device.

    Parameters
    ----------
    keys, values : Sequence[torch.Tensor]
        Views ``[blocks, block_size, heads, head_size]``, one per layer.
    block_ids : Sequence[int]
        The blocks that are filled, in the order of the tokens.
    """
    parameters, device = made.parameters, keys[0].device
    generator = torch.Generator(device).manual_seed(seed)
    ids = torch.as_tensor(block_ids, device=device)
    block_size = keys[0].shape[1]
    tokens = ids.numel() * block_size
    cos, sin = (table.to(device) for table in parameters.rope.cos_sin(torch.arange(tokens)))
    for index, group in enumerate(parameters.groups):
        for name, side, views in (("keys", group.keys, keys), ("values", group.values, values)):
            spread = made.deviations[name][index].to(device)
            drawn = torch.randn((tokens, spread.numel()), generator=generator, device=device) * spread
            weights = side.synthesis(torch.arange(spread.numel())).to(device)
            rows = (drawn @ weights + side.mean.to(device)).view(
                tokens, group.layers.count, *views[0].shape[2:]
            )
            if name == "keys":
                rows = parameters.rope.rotate(rows, cos, sin)
            for layer in range(group.layers.count):
                view = views[group.layers.first + layer]
                view[ids] = rows[:, layer].reshape(-1, *view.shape[1:]).to(view.dtype)


def _orthonormal(components: int, row: int, device: torch.device | None) -> torch.Tensor:
    generator = torch.Generator(device or "cpu").manual_seed(row)
    drawn = torch.randn((row, components), generator=generator, device=device)
    basis: torch.Tensor = torch.linalg.qr(drawn)[0]
    return basis.t().contiguous().cpu()


def _side(
    geometry: KvGeometry, basis: torch.Tensor, plan: BitPlan | RdPlan
) -> SideParameters | RdSideParameters:
    row = basis.shape[1]
    mean = torch.randn(row, generator=torch.Generator().manual_seed(row + 1))
    if isinstance(plan, BitPlan):
        return SideParameters(mean, basis, {PLAN_ID: plan})
    size = geometry.head_size
    metric = torch.eye(size).repeat(row // size, 1, 1)
    return RdSideParameters(mean, basis, metric, torch.zeros(row), 0.0, {PLAN_ID: plan})


def _rd_plan(row: int, shares: Sequence[float]) -> RdPlan:
    counts = [max(1, round(share * row)) for share in shares]
    stored = sum(counts)
    return RdPlan(
        step=0.05,
        components=torch.arange(stored),
        counts=(counts[0], counts[1], counts[2], counts[3]),
        rounding=torch.full((stored,), 0.4),
        offsets=torch.full((2, stored), -0.02),
    )


def _kvtc_plan(row: int) -> BitPlan:
    groups: list[PlanGroup] = []
    start, left = 0, int(16 * row / RATIO)
    for quant_type, share in ((QuantType.INT4, _INT4_SHARE), (QuantType.INT2, 1.0)):
        budget = int(share * left)
        for size in reversed(GROUP_SIZES):
            cost = size * quant_type.bits + SIDE_BITS
            # Groups of more than 256 components of such rows are rare in calibrated plans.
            while size <= 256 and cost <= budget and start + size <= row:
                groups.append(PlanGroup(start, size, quant_type))
                start, budget, left = start + size, budget - cost, left - cost
    return BitPlan(tuple(groups))


def _deviations(plan: BitPlan | RdPlan) -> torch.Tensor:
    if isinstance(plan, BitPlan):
        return _LARGEST * (1 + torch.arange(plan.rank)) ** -_POWER
    parts = []
    borders = list(accumulate(plan.counts, initial=0))
    for (first, stop), known in zip(pairwise(borders), _RD_DEVIATIONS, strict=True):
        at = torch.linspace(0, 1, stop - first) if stop - first > 1 else torch.tensor([0.5])
        parts.append(plan.step * _interpolate(at, torch.tensor(_QUANTILES), torch.tensor(known)))
    return torch.cat(parts)


def _interpolate(at: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Interpolate logarithms of `y` between the points `x`."""
    index = torch.searchsorted(x, at).clamp(1, x.numel() - 1)
    share = (at - x[index - 1]) / (x[index] - x[index - 1])
    logs = y.log()
    return (logs[index - 1] * (1 - share) + logs[index] * share).exp()
