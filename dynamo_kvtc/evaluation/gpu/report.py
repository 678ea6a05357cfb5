"""What a measurement or a prediction says, JSON-ready; both have one form, so that they lie side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dynamo_kvtc.codec.gpu.stages import DECODE_STAGES, ENCODE_STAGES
from dynamo_kvtc.evaluation.gpu.rates import Rates
from dynamo_kvtc.evaluation.gpu.shapes import BenchShape
from dynamo_kvtc.evaluation.gpu.work import LINK_STAGES, StageWork

__all__ = [
    "PUBLISHED",
    "Alternatives",
    "Direction",
    "GpuReport",
    "Onboard",
    "ShapeReport",
    "Stage",
    "alternatives",
    "direction",
]

#: KVTC (arXiv 2511.01815v2) on an H100, Mistral-NeMo-12B, 8 times 8K tokens, nominal 16x: raw bytes, and
#: seconds of compressing (projecting .153, quantising .067, DEFLATE .137) and decompressing (inflating .064,
#: dequantising .037, projecting .156).
PUBLISHED = {
    "raw_bytes": 10.7e9,
    "deflate_s": 0.137,
    "inflate_s": 0.064,
    "encode_raw_bytes_per_s": 10.7e9 / 0.379,
    "decode_raw_bytes_per_s": 10.7e9 / 0.267,
}


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of all tokens.

    Attributes
    ----------
    seconds : float or None
        Median; None where a prediction says nothing (stages of the host).
    operations, bytes, link_bytes : float
        Its work; see `StageWork`.
    floor_s : float or None
        Least seconds at the rates of the report.
    of_floor : float or None
        Floor over seconds: 1 is as fast as the device can.
    """

    name: str
    seconds: float | None
    operations: float
    bytes: float
    link_bytes: float
    floor_s: float | None
    of_floor: float | None


@dataclass(frozen=True, slots=True)
class Direction:
    """Encoding or decoding.

    Attributes
    ----------
    device_s : float
        Stages on the device, without copies to and from the host: what the published times are.
    device_raw_bytes_per_s : float
        Raw KV by it.
    seconds : float
        Everything, by the host's clock; compressed bytes are in pinned host memory.
    raw_bytes_per_s, tokens_per_s : float
        By it.
    longest : str
        The longest stage on the device.
    """

    stages: tuple[Stage, ...]
    device_s: float
    device_raw_bytes_per_s: float
    seconds: float
    raw_bytes_per_s: float
    tokens_per_s: float
    longest: str


@dataclass(frozen=True, slots=True)
class Onboard:
    """A request's KV, from a tier into the paged cache, by the whole pipeline.

    Attributes
    ----------
    source : str
        ``"host"`` or ``"disk"``.
    seconds, first_group_s, first_layer_s : float
        Until all layers, those of the first layer group, and the first one are in place.
    first_group_share : float
        `first_group_s` over `seconds`.
    """

    source: str
    seconds: float
    first_group_s: float
    first_layer_s: float
    first_group_share: float


@dataclass(frozen=True, slots=True)
class Alternatives:
    """What else could bring the KV: a raw copy out of pinned host memory, or computing it again.

    Attributes
    ----------
    raw_copy_s : float
        Raw bytes over the link's rate.
    recompute_s : float
        Operations of the prefill over the matrix rate: less than any engine takes.
    """

    raw_copy_s: float
    recompute_s: float


@dataclass(frozen=True, slots=True)
class ShapeReport:
    """One shape under one profile.

    Attributes
    ----------
    ratio : float
        Raw bytes over bytes of streams.
    first_group, largest_group, layer_groups, stored, row : int
        The first group's layers; groups; components and elements of both sides of all groups.
    basis_bytes, staging_bytes_per_token : int
        Device memory of the bases, and of a token in flight (the larger of encoding and decoding).
    coder : str
        What codes chunks; without nvCOMP the host does, and copies are of bytes before coding.
    relative_error : float or None
        Root-mean-square error of decoded values over their deviation; a check that real work was done.
    """

    shape: str
    profile: str
    tokens: int
    raw_bytes: int
    ratio: float
    first_group: int
    largest_group: int
    layer_groups: int
    stored: int
    row: int
    basis_bytes: int
    staging_bytes_per_token: int
    coder: str
    relative_error: float | None
    encode: Direction
    decode: Direction
    onboard: tuple[Onboard, ...]
    alternatives: Alternatives


@dataclass(frozen=True, slots=True)
class GpuReport:
    """All shapes, the rates that floors are made of, where it was measured, and how."""

    rates: Rates
    environment: Mapping[str, Any]
    settings: Mapping[str, Any]
    shapes: tuple[ShapeReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values, and the published figures."""
        return {**asdict(self), "published": dict(PUBLISHED)}


def direction(
    names: Sequence[str],
    work: Mapping[str, StageWork],
    seconds: Mapping[str, float | None],
    rates: Rates,
    shape: BenchShape,
    tokens: int,
    whole_s: float,
) -> Direction:
    """Put stages beside their floors.

    Parameters
    ----------
    names : Sequence[str]
        `ENCODE_STAGES` or `DECODE_STAGES`.
    work : Mapping[str, StageWork]
        Of a token.
    seconds : Mapping[str, float or None]
        Of all tokens.
    """
    assert tuple(names) in (ENCODE_STAGES, DECODE_STAGES)
    stages = []
    for name in names:
        own, took = work[name], seconds.get(name)
        least = own.floor(name, rates)
        floor = None if least is None else least * tokens
        share = floor / took if floor is not None and took else None
        whole = (tokens * own.operations, tokens * own.bytes, tokens * own.link_bytes)
        stages.append(Stage(name, took, *whole, floor, share))
    on_device = {s.name: s.seconds or 0.0 for s in stages if s.name not in (*LINK_STAGES, "verify")}
    device_s = sum(on_device.values())
    raw = shape.raw_bytes * tokens
    return Direction(
        tuple(stages),
        device_s,
        raw / device_s,
        whole_s,
        raw / whole_s,
        tokens / whole_s,
        max(on_device, key=lambda name: on_device[name]),
    )


def alternatives(shape: BenchShape, tokens: int, rates: Rates) -> Alternatives:
    """Return what a raw copy and recomputing take at a device's rates."""
    return Alternatives(
        shape.raw_bytes * tokens / rates.to_device, shape.prefill_operations(tokens) / rates.matrix
    )
