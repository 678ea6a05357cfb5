"""FP8 (E4M3), the quantised cache that engines offer, at its better setting: a scale per token and head.

Engines also cast to E4M3 without scales, or with one scale per tensor; the ratio is then 2 exactly, and
quality the same or worse. Here the scale of each head vector is ``max|x| / 448`` in float16.

Micikevicius et al., "FP8 formats for deep learning", arXiv 2209.05433.
"""

from __future__ import annotations

import torch

from benchmarks.quality.codecs.base import (
    BaselineCodec,
    CodecFamily,
    CodecInputs,
    DocumentCodec,
    StoredKv,
)

__all__ = ["FAMILY", "Fp8Codec"]

_E4M3_MAX = 448.0


class Fp8Codec(BaselineCodec):
    """One byte an element and a 16-bit scale a head vector."""

    family = "fp8"
    setting = "scale per token and head"

    def store_tokens(self, keys: torch.Tensor, values: torch.Tensor, first_position: int) -> StoredKv:
        """Encode tokens behind the sinks; see `BaselineCodec.store_tokens`."""
        vectors = (keys.numel() + values.numel()) // keys.shape[-1]
        return StoredKv(_round_trip(keys), _round_trip(values), vectors * (keys.shape[-1] + 2))


def _round_trip(x: torch.Tensor) -> torch.Tensor:
    tiny = torch.finfo(torch.float16).smallest_normal
    scale = (x.float().abs().amax(-1, keepdim=True) / _E4M3_MAX).clamp(min=tiny).half().float()
    # Rounding the scale down would push the largest element beyond what E4M3 holds, which is NaN there.
    symbols = (x.float() / scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return (symbols.float() * scale).to(x.dtype)


def _build(inputs: CodecInputs) -> list[DocumentCodec]:
    return [Fp8Codec()]


FAMILY = CodecFamily("fp8", _build)
