"""What the GPU codec should take, from operations, bytes and a data sheet: to be proved wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dynamo_kvtc.codec.gpu.stages import DECODE_STAGES, ENCODE_STAGES
from dynamo_kvtc.evaluation.gpu.made_up import PLAN_ID, RATIO, make_up
from dynamo_kvtc.evaluation.gpu.rans_time import RANS_ASSUMPTIONS, rans_seconds
from dynamo_kvtc.evaluation.gpu.rates import Rates
from dynamo_kvtc.evaluation.gpu.report import (
    PUBLISHED,
    GpuReport,
    Onboard,
    ShapeReport,
    alternatives,
    direction,
)
from dynamo_kvtc.evaluation.gpu.shapes import BenchShape
from dynamo_kvtc.evaluation.gpu.work import (
    LINK_STAGES,
    SideWork,
    StageWork,
    describe_memory,
    describe_sides,
    stage_work,
)

__all__ = ["ASSUMPTIONS", "predict"]

#: What the prediction assumes, beyond a data sheet: shares of the peaks that kernels reach, and bytes a
#: second of DEFLATE, counted before coding: KVTC's times at nominal 16x, where those are a 16th of the raw.
ASSUMPTIONS = {
    "product_share": 0.6,
    "memory_share": 0.8,
    "link_share": 0.85,
    "inflate_bytes_per_s": PUBLISHED["raw_bytes"] / 16 / PUBLISHED["inflate_s"],
    "deflate_bytes_per_s": PUBLISHED["raw_bytes"] / 16 / PUBLISHED["deflate_s"],
}

#: Before DEFLATE over after it where the ratio is nominal: KVTC's average, and so ours is assumed to be.
_KVTC_GAIN = 1.23


def predict(
    shapes: Sequence[BenchShape],
    profiles: Sequence[str],
    rates: Rates,
    tokens: int = 8192,
    entropy: str = "deflate",
) -> GpuReport:
    """Predict every shape under every profile; stages of the device one after the other, no host time.

    Parameters
    ----------
    entropy : str
        ``"deflate"`` (nvCOMP's) or ``"rans"``, which is assumed to gain as much.
    """
    reports = [_predict(shape, profile, rates, tokens, entropy) for shape in shapes for profile in profiles]
    assumed = {**ASSUMPTIONS, **(RANS_ASSUMPTIONS if entropy == "rans" else {})}
    return GpuReport(
        rates, {}, {"tokens": tokens, "entropy": entropy, "assumptions": assumed}, tuple(reports)
    )


def _predict(shape: BenchShape, profile: str, rates: Rates, tokens: int, entropy: str) -> ShapeReport:
    parameters = make_up(shape, profile, with_bases=False).parameters
    sides = describe_sides(parameters, PLAN_ID)
    plain = sum(side.plain_bytes for side in sides)
    coded = plain / _KVTC_GAIN if profile == "kvtc" else shape.raw_bytes / RATIO
    work = stage_work(shape, sides, coded, tokens, slots=entropy == "deflate")
    seconds: dict[str, float | None] = {
        name: _expected(name, own, plain, rates, tokens) for name, own in work.items()
    }
    if entropy == "rans":
        for name in ("deflate", "inflate"):
            moved = tokens * work[name].bytes / (ASSUMPTIONS["memory_share"] * rates.memory)
            seconds[name] = max(moved, rans_seconds(name, sides, tokens, rates))
    encode = direction(
        ENCODE_STAGES, work, seconds, rates, shape, tokens, sum(seconds[n] or 0.0 for n in ENCODE_STAGES)
    )
    whole = sum(seconds[name] or 0.0 for name in DECODE_STAGES)
    decode = direction(DECODE_STAGES, work, seconds, rates, shape, tokens, whole)
    first_group, first_layer = _first(sides, seconds, parameters.groups[0].layers.count)
    return ShapeReport(
        shape.name,
        profile,
        tokens,
        shape.raw_bytes * tokens,
        shape.raw_bytes / coded,
        *describe_memory(parameters),
        "nvCOMP DEFLATE" if entropy == "deflate" else "rANS",
        None,
        encode,
        decode,
        (Onboard("host", whole, first_group, first_layer, first_group / whole),),
        alternatives(shape, tokens, rates),
    )


def _first(
    sides: Sequence[SideWork], seconds: Mapping[str, float | None], layers: int
) -> tuple[float, float]:
    """Return the seconds of decoding until the first layer group is in place, and until its first layer.

    Of the stages until its coefficients are there, the group has its share of bytes; of the product that of
    operations, and the layer a part of that.
    """
    product = seconds["inverse product, scatter"] or 0.0
    opened = sum(seconds[name] or 0.0 for name in DECODE_STAGES) - product
    operations = [side.stored * side.row for side in sides]
    product *= sum(operations[:2]) / sum(operations)
    plain = [side.plain_bytes for side in sides]
    opened *= sum(plain[:2]) / sum(plain)
    return opened + product, opened + product / layers


def _expected(name: str, work: StageWork, plain: float, rates: Rates, tokens: int) -> float | None:
    """Return the seconds of all tokens that a stage should take."""
    if name in LINK_STAGES:
        least = work.floor(name, rates)
        return None if least is None else tokens * least / ASSUMPTIONS["link_share"]
    if name in ("inflate", "deflate"):
        return tokens * plain / ASSUMPTIONS[f"{name}_bytes_per_s"]
    if not work.bytes:
        return None
    return tokens * max(
        work.operations / (ASSUMPTIONS["product_share"] * rates.matrix),
        work.bytes / (ASSUMPTIONS["memory_share"] * rates.memory),
    )
