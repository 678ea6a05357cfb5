"""The profile ``rd`` at every plan of its artifact: docs/science.md says how it differs from ``kvtc``."""

from __future__ import annotations

from benchmarks.quality.codecs.base import CodecFamily, CodecInputs, DocumentCodec
from benchmarks.quality.codecs.streams import StreamCodec
from dynamo_kvtc.codec.rd import RdCodec

__all__ = ["FAMILY"]


def _build(inputs: CodecInputs) -> list[DocumentCodec]:
    parameters = inputs.artifact("rd").parameters
    return [
        StreamCodec("rd", f"{ratio:g}x", RdCodec(parameters, ratio=ratio), inputs.tier_block_tokens)
        for ratio in sorted(parameters.ratios.values())
    ]


FAMILY = CodecFamily("rd", _build, profile="rd")
