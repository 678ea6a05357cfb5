"""The published method, profile ``kvtc``, at every ratio that its artifact was calibrated for.

"KV cache transform coding for compact storage in LLM inference", ICLR 2026, arXiv 2511.01815.
"""

from __future__ import annotations

from benchmarks.quality.codecs.base import CodecFamily, CodecInputs, DocumentCodec
from benchmarks.quality.codecs.streams import StreamCodec
from dynamo_kvtc.codec.kvtc import KvtcCodec

__all__ = ["FAMILY"]


def _build(inputs: CodecInputs) -> list[DocumentCodec]:
    parameters = inputs.artifact("kvtc").parameters
    return [
        StreamCodec(
            "kvtc", f"{ratio:g}x nominal", KvtcCodec(parameters, ratio=ratio), inputs.tier_block_tokens
        )
        for ratio in sorted(parameters.ratios.values())
    ]


FAMILY = CodecFamily("kvtc", _build, profile="kvtc")
