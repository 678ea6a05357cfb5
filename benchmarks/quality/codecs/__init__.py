"""The codecs that are compared, one file each."""

from __future__ import annotations

from benchmarks.quality.codecs import fp8, int2, int4, kvtc, none, pca, rd, rotation
from benchmarks.quality.codecs.base import CodecFamily, CodecInputs, DocumentCodec, StoredKv

__all__ = ["CODECS", "CodecFamily", "CodecInputs", "DocumentCodec", "StoredKv"]

#: All codecs by name, in the order of reports.
CODECS: dict[str, CodecFamily] = {
    module.FAMILY.name: module.FAMILY for module in (none, fp8, int4, int2, rotation, pca, kvtc, rd)
}
