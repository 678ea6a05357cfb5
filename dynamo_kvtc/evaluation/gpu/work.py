"""Operations and bytes of each stage, from a shape and its plans: what floors and predictions follow from.

Counted is what a stage must do as it is built: each byte that it reads or writes in the device's memory once,
and the operations of its products on stored components, without padding. Bases are read once a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_kvtc.codec.gpu.stages import DECODE_STAGES, ENCODE_STAGES
from dynamo_kvtc.codec.gpu.staging import decode_bytes_per_token, encode_bytes_per_token
from dynamo_kvtc.codec.gpu.weights import basis_bytes, padded_components, stored_components
from dynamo_kvtc.codec.packing import SectionLayout
from dynamo_kvtc.codec.parameters import AnyParameters
from dynamo_kvtc.codec.quantiser import PlanQuantiser
from dynamo_kvtc.codec.rd_packing import RdLayout
from dynamo_kvtc.codec.rd_plan import RdPlan
from dynamo_kvtc.evaluation.gpu.made_up import PLAN_ID
from dynamo_kvtc.evaluation.gpu.rates import Rates
from dynamo_kvtc.evaluation.gpu.shapes import BenchShape

__all__ = [
    "LINK_STAGES",
    "STREAM_TOKENS",
    "SideWork",
    "StageWork",
    "describe_memory",
    "describe_sides",
    "stage_work",
]

#: Stages that move bytes between host and device.
LINK_STAGES = ("copy to host", "copy to device")

#: Tokens of a stream, by which its bytes are taken: sizes round up to whole bytes per component.
STREAM_TOKENS = 256


@dataclass(frozen=True, slots=True)
class SideWork:
    """One side of a layer group: elements of a row, stored components, a token's bytes before coding."""

    row: int
    stored: int
    plain_bytes: float
    two_bases: bool

    @property
    def padded(self) -> int:
        """Columns of coefficients on the device."""
        return padded_components(self.stored)


@dataclass(frozen=True, slots=True)
class StageWork:
    """One stage of one token: operations, bytes of device memory, bytes over the link to the host."""

    operations: float = 0.0
    bytes: float = 0.0
    link_bytes: float = 0.0

    def floor(self, stage: str, rates: Rates) -> float | None:
        """Return the least seconds that a device's rates allow; None for a stage of the host."""
        if stage in LINK_STAGES:
            return self.link_bytes / (rates.to_host if stage == "copy to host" else rates.to_device)
        if not self.operations and not self.bytes:
            return None
        return max(self.operations / rates.matrix, self.bytes / rates.memory)


def describe_sides(parameters: AnyParameters, plan_id: int) -> list[SideWork]:
    """Return all sides of all layer groups, keys before values."""
    sides = []
    for group in parameters.groups:
        for side in (group.keys, group.values):
            plan = side.plans[plan_id]
            two = isinstance(plan, RdPlan)
            if two:
                payload = RdLayout(plan.counts).payload_bounds(STREAM_TOKENS)[0]
            else:
                payload = SectionLayout.of(PlanQuantiser(plan)).payload_size(STREAM_TOKENS)
            stored = stored_components(side, plan_id).numel()
            sides.append(SideWork(side.mean.numel(), stored, payload / STREAM_TOKENS, two))
    return sides


def describe_memory(
    parameters: AnyParameters, token_bytes: int | None = None
) -> tuple[int, int, int, int, int, int, int]:
    """Return the fields of a `ShapeReport` from its first group to its staging bytes a token.

    Parameters
    ----------
    token_bytes : int, optional
        Those bytes, where a coder is known; by default without the slack that nvCOMP's slots have.
    """
    sides = describe_sides(parameters, PLAN_ID)
    in_flight = encode_bytes_per_token(parameters, PLAN_ID), decode_bytes_per_token(parameters, PLAN_ID)
    return (
        parameters.groups[0].layers.count,
        max(group.layers.count for group in parameters.groups),
        len(parameters.groups),
        sum(side.stored for side in sides),
        sum(side.row for side in sides),
        basis_bytes(parameters, PLAN_ID),
        token_bytes or max(in_flight),
    )


def stage_work(
    shape: BenchShape,
    sides: Sequence[SideWork],
    coded_bytes: float,
    batch_tokens: int,
    *,
    slots: bool = True,
) -> dict[str, StageWork]:
    """Return the work of each stage of encoding and decoding, a token.

    Parameters
    ----------
    coded_bytes : float
        Bytes of streams a token.
    batch_tokens : int
        Tokens in one batch, among which reading the bases is divided.
    slots : bool
        Whether the entropy coder needs its chunks in aligned slots, as nvCOMP does.
    """
    raw = shape.raw_bytes
    plain = sum(side.plain_bytes for side in sides)
    operations = float(sum(2 * side.stored * side.row for side in sides))
    bases = sum(2 * side.padded * side.row for side in sides) / batch_tokens
    coefficients = sum(2 * side.padded for side in sides)
    moved = 2 * plain if slots else 0.0
    work = {
        "gather": StageWork(bytes=2 * raw),
        "project, quantise, pack": StageWork(operations, raw + bases + plain),
        "deflate": StageWork(bytes=plain + coded_bytes),
        "assemble": StageWork(bytes=moved + 2 * coded_bytes),
        "copy to host": StageWork(link_bytes=coded_bytes),
        "verify": StageWork(),
        "copy to device": StageWork(link_bytes=coded_bytes),
        "inflate": StageWork(bytes=plain + coded_bytes),
        "unpack, dequantise": StageWork(bytes=moved + plain + coefficients),
        "inverse product, scatter": StageWork(operations, coefficients + bases + raw),
    }
    assert list(work) == [*ENCODE_STAGES, *DECODE_STAGES]
    return work
