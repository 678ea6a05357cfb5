"""How fast a codec is here, where its time goes, and how close its entropy coding comes to the entropy."""

from __future__ import annotations

import cProfile
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, cast

import numpy as np
import torch

from dynamo_kvtc.codec import packing, rd_packing
from dynamo_kvtc.codec.base import KvCodec, TierBlock
from dynamo_kvtc.codec.bitstream import encode_chunks, read_section, read_sections, write_stream
from dynamo_kvtc.codec.entropy import STORE
from dynamo_kvtc.codec.importance import predict_levels
from dynamo_kvtc.codec.quantiser import PlanQuantiser
from dynamo_kvtc.codec.rd_quantiser import RdQuantiser
from dynamo_kvtc.codec.rope import RopeParameters
from dynamo_kvtc.codec.transform import SideTransform

__all__ = ["CodecSpeed", "EntropyCoding", "decode_blocks", "entropy_coding", "measure_codec"]

#: The functions whose time makes up each stage; what none of them covers is reported as "other".
_Stages = dict[str, tuple[Callable[..., Any], ...]]
_ENCODE_STAGES: _Stages = {
    "remove RoPE": (RopeParameters.rotate,),
    "centre and project": (SideTransform.centre, SideTransform.project),
    "quantise": (PlanQuantiser.quantise, predict_levels, RdQuantiser.quantise),
    "pack": (packing.pack, rd_packing.pack),
    "entropy coding": (encode_chunks,),
    "assemble": (write_stream,),
}
_DECODE_STAGES: _Stages = {
    "verify and inflate": (read_sections,),
    "unpack": (packing.unpack, rd_packing.unpack),
    "dequantise": (PlanQuantiser.dequantise, RdQuantiser.dequantise),
    "project": (SideTransform.inverse,),
    "apply RoPE": (RopeParameters.rotate,),
}


@dataclass(frozen=True, slots=True)
class CodecSpeed:
    """Speed of one codec.

    Attributes
    ----------
    tokens : int
        Tokens in one run.
    ratio : float
        16-bit bytes in over all bytes out.
    encode_tokens_per_s, decode_tokens_per_s : float
        By the median run, with the codec's own threads.
    encode_shares, decode_shares : dict[str, float]
        Share of each stage, measured with entropy coding in the calling thread.
    """

    tokens: int
    ratio: float
    encode_tokens_per_s: float
    decode_tokens_per_s: float
    encode_shares: dict[str, float]
    decode_shares: dict[str, float]


@dataclass(frozen=True, slots=True)
class EntropyCoding:
    """Bytes of all chunks before and after entropy coding, and their order-0 entropy.

    Attributes
    ----------
    plain_bytes, stored_bytes : int
        Before and after; headers and padding are in neither.
    entropy_bytes : float
        Sum of the chunks' order-0 entropies: what an ideal coder of single bytes that knew each chunk's
        frequencies would need. A coder that finds repetitions can do better.
    """

    plain_bytes: int
    stored_bytes: int
    entropy_bytes: float


def measure_codec(
    codec: KvCodec, single_threaded: KvCodec, blocks: Sequence[TierBlock], *, repetitions: int = 5
) -> CodecSpeed:
    """Measure encoding and decoding of some tier blocks.

    Parameters
    ----------
    codec : KvCodec
        Measured for speed.
    single_threaded : KvCodec
        The same codec without threads of its own, measured for the shares: a profiler sees one thread.
    blocks : Sequence[TierBlock]
        What to encode in one call.
    repetitions : int
        Runs of each direction, after one that is not counted.
    """
    streams = codec.encode(blocks)
    decode_blocks(codec, streams)
    encode_s, decode_s = [], []
    for _ in range(repetitions):
        encode_s.append(_seconds(lambda: codec.encode(blocks)))
        decode_s.append(_seconds(lambda: decode_blocks(codec, streams)))
    tokens = sum(block.num_tokens for block in blocks)
    decode_blocks(single_threaded, single_threaded.encode(blocks))
    return CodecSpeed(
        tokens=tokens,
        ratio=tokens * codec.geometry.token_bytes_16bit / sum(len(stream) for stream in streams),
        encode_tokens_per_s=tokens / statistics.median(encode_s),
        decode_tokens_per_s=tokens / statistics.median(decode_s),
        encode_shares=_shares(lambda: single_threaded.encode(blocks), _ENCODE_STAGES),
        decode_shares=_shares(lambda: decode_blocks(single_threaded, streams), _DECODE_STAGES),
    )


@torch.inference_mode()
def decode_blocks(codec: KvCodec, streams: Sequence[bytes]) -> None:
    """Decode consecutive tier blocks in the order that onboarding does: group by group, layer by layer."""
    headers = [codec.read_header(stream) for stream in streams]
    views = [memoryview(stream) for stream in streams]
    for group, layers in enumerate(codec.layer_groups):
        parts = []
        for header, view in zip(headers, views, strict=True):
            first, stop = header.group_span(group)
            parts.append(codec.open_group(header, group, view[first:stop]))
        for layer in range(layers.first, layers.stop):
            codec.decode_layer(parts, layer)


def entropy_coding(codec: KvCodec, streams: Sequence[bytes]) -> EntropyCoding:
    """Compare the entropy-coded chunks of streams with their order-0 entropy; stored ones are left out."""
    plain_bytes = stored_bytes = 0
    entropy_bytes = 0.0
    for stream in streams:
        header = codec.read_header(stream)
        for group in range(len(codec.layer_groups)):
            first, stop = header.group_span(group)
            for kind in dict.fromkeys(chunk.kind for chunk in header.chunks_of(group)):
                section = memoryview(read_section(header, group, kind, stream[first:stop]))
                offset = 0
                for chunk in header.chunks_of(group, kind):
                    plain = section[offset : offset + chunk.plain_size]
                    offset += chunk.plain_size
                    if chunk.coder_id != STORE:
                        plain_bytes += chunk.plain_size
                        stored_bytes += chunk.stored_size
                        entropy_bytes += _order0_bytes(plain)
    return EntropyCoding(plain_bytes, stored_bytes, entropy_bytes)


def _order0_bytes(data: memoryview) -> float:
    counts = np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
    seen = counts[counts > 0].astype(np.float64)
    return float((seen * np.log2(seen.sum() / seen)).sum()) / 8


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _shares(work: Callable[[], object], stages: _Stages) -> dict[str, float]:
    """Profile one run; the share of a stage is the time in its functions and everything they call."""
    profiler = cProfile.Profile()
    profiler.enable()
    whole = _seconds(work)
    profiler.disable()
    seconds: dict[CodeType, float] = {
        entry.code: entry.totaltime for entry in profiler.getstats() if isinstance(entry.code, CodeType)
    }
    shares = {
        stage: sum(seconds.get(cast(FunctionType, one).__code__, 0.0) for one in functions) / whole
        for stage, functions in stages.items()
    }
    return shares | {"other": max(0.0, 1.0 - sum(shares.values()))}
