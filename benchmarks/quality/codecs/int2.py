"""Integers of two bits in groups; see `benchmarks.quality.codecs.integer_groups`."""

from __future__ import annotations

from benchmarks.quality.codecs.base import CodecFamily, CodecInputs, DocumentCodec
from benchmarks.quality.codecs.integer_groups import GROUP_SIZES, IntegerGroupsCodec

__all__ = ["FAMILY"]


def _build(inputs: CodecInputs) -> list[DocumentCodec]:
    return [IntegerGroupsCodec("int2", 2, size) for size in GROUP_SIZES]


FAMILY = CodecFamily("int2", _build)
