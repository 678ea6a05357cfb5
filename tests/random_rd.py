"""Random artifacts of the rd profile: nothing in them is fitted, every part is valid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.calibration.artifact_writer import FittedRdSide, MeasuredPlan, write_artifact
from dynamo_kvtc.calibration.fingerprint import ModelFingerprint
from dynamo_kvtc.calibration.manifest import CalibrationRecord
from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange
from dynamo_kvtc.codec.rd_plan import RdPlan
from dynamo_kvtc.codec.rope import RopeParameters

__all__ = ["random_rd_plan", "random_rd_side", "write_random_rd_artifact"]


def random_rd_plan(rank: int, step: float, generator: torch.Generator) -> RdPlan:
    """Return a plan that stores some of `rank` components, in classes of random sizes."""
    stored = int(torch.randint(rank + 1, (), generator=generator))
    cuts = torch.randint(stored + 1, (3,), generator=generator).sort().values.tolist()
    wide, byte, nibble = cuts[0], cuts[1] - cuts[0], cuts[2] - cuts[1]
    return RdPlan(
        step=step,
        components=torch.randperm(rank, generator=generator)[:stored],
        counts=(wide, byte, nibble, stored - cuts[2]),
        rounding=0.5 - 0.4 * torch.rand(stored, generator=generator),
        offsets=0.4 * (torch.rand(2, stored, generator=generator) - 0.5),
    )


def random_rd_side(
    geometry: KvGeometry,
    layers: int,
    plan_ids: Sequence[int],
    generator: torch.Generator,
    basis_dtype: torch.dtype = torch.float16,
) -> FittedRdSide:
    """Return a side whose plans have falling rates."""
    row, heads, size = layers * geometry.layer_size, layers * geometry.num_kv_heads, geometry.head_size
    rank = int(torch.randint(1, row + 1, (), generator=generator))
    factor = torch.randn(heads, size, size, generator=generator)
    variances = torch.rand(rank, generator=generator).sort(descending=True).values + 0.1
    return FittedRdSide(
        mean=torch.randn(row, generator=generator),
        basis=torch.linalg.qr(torch.randn(row, row, generator=generator)).Q[:rank].to(basis_dtype),
        metric=factor @ factor.mT + torch.eye(size),
        importance=0.1 * torch.randn(row, generator=generator),
        importance_bias=float(torch.randn((), generator=generator)),
        variances=variances,
        total_variance=2 * float(variances.sum()),
        plans={
            plan_id: random_rd_plan(rank, 10.0 * (1 + number), generator)
            for number, plan_id in enumerate(plan_ids)
        },
        errors=dict.fromkeys(plan_ids, (0.1,) * layers),
    )


def write_random_rd_artifact(
    folder: Path,
    *,
    geometry: KvGeometry,
    groups: Sequence[LayerRange],
    sides: Sequence[tuple[FittedRdSide, FittedRdSide]] | None = None,
    ratios: Mapping[int, float] | None = None,
    measured: Mapping[int, MeasuredPlan] | None = None,
    rope: RopeParameters | None = None,
    seed: int = 0,
) -> Artifact:
    """Write an artifact with plans for ratios 10 and 20, of which a KL of 0.001 and 0.004 was measured."""
    generator = torch.Generator().manual_seed(seed)
    ratios = {0: 10.0, 1: 20.0} if ratios is None else ratios
    if measured is None:
        measured = {
            plan_id: MeasuredPlan(1.1 * ratio, kl=1e-5 * ratio**2, top1=0.98, tokens=64)
            for plan_id, ratio in ratios.items()
        }
    if sides is None:
        sides = [
            (
                random_rd_side(geometry, layers.count, list(ratios), generator),
                random_rd_side(geometry, layers.count, list(ratios), generator),
            )
            for layers in groups
        ]
    return write_artifact(
        folder,
        fingerprint=ModelFingerprint(
            "LlamaForCausalLM",
            geometry,
            rope or RopeParameters(theta=10_000.0, rotary_dim=geometry.head_size),
            "ab" * 32,
        ),
        layer_groups=groups,
        sides=sides,
        ratios=ratios,
        calibration=CalibrationRecord(
            text_digest="cd" * 32,
            input_digest="ef" * 32,
            documents=3,
            document_tokens=100,
            rows=280,
            sample_rows=30,
            sink_tokens=4,
            recent_window=16,
            method="eigh",
            seed=0,
            sensitivity_documents=2,
            scored_tokens=32,
            validation_documents=2,
            sensitivity="gradients",
        ),
        measured=measured,
    )
