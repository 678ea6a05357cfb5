"""Target ``payload``: what is inside the sections, down to tensors; every checksum is right."""

from __future__ import annotations

import sys
from functools import lru_cache
from random import Random
from typing import Any, NamedTuple

import torch

from benchmarks.fuzz.streams import GOLDEN, sections
from benchmarks.fuzz.target import Violation, damage
from dynamo_kvtc.codec.base import KvCodec
from dynamo_kvtc.codec.bitstream import (
    EncodedChunk,
    Profile,
    Section,
    StreamHeader,
    encode_chunk,
    parse_header,
    write_stream,
)
from dynamo_kvtc.codec.entropy import DeflateCoder, RansCoder, StoreCoder
from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.codec.raw import RawCodec
from dynamo_kvtc.errors import BitstreamError

__all__ = ["PayloadTarget"]


class PayloadCase(NamedTuple):
    """A sound container around a mutated payload, and the golden stream that it came from."""

    golden: str
    data: bytes


@lru_cache
def _codec(golden: str) -> KvCodec:
    # The readers of golden parameters are part of the tests.
    sys.path.append(str(GOLDEN.parent / "codec"))
    from golden_files import from_json, parameter_file  # type: ignore[import-not-found]

    parameters = from_json(parameter_file(golden).read_text())
    header = parse_header((GOLDEN / f"{golden}.kvtc").read_bytes())
    if header.profile is Profile.RAW:
        return RawCodec(parameters.geometry, parameters.artifact_id, layer_groups=header.layer_groups)
    return open_codec(parameters, compute_dtype="float32", threads=1)


class PayloadTarget:
    """Mutates the plain bytes of one section, packs them again under valid checksums, and decodes."""

    name = "payload"

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._golden = sorted(path.stem for path in GOLDEN.glob("*.kvtc"))
        self._data = {name: (GOLDEN / f"{name}.kvtc").read_bytes() for name in self._golden}
        self._kv = {name: _codec(name).decode(data) for name, data in self._data.items()}

    def make(self, random: Random) -> PayloadCase:
        """Return a stream whose container is sound and one of whose payloads is not what was encoded."""
        name = random.choice(self._golden)
        header = parse_header(self._data[name])
        plains = [bytearray(plain) for plain in sections(header, self._data[name])]
        chosen = random.choice(plains)
        size = len(chosen)
        for _ in range(random.randrange(1, 4)):
            damage(random, chosen, random.choice(plains))
        if random.random() < 0.8:  # another length is refused before anything is unpacked
            chosen[:] = chosen[:size].ljust(size, b"\x80")
        try:
            return PayloadCase(name, write_stream(header, _pack(random, header, plains)))
        except BitstreamError:  # more bytes than a section may have
            return PayloadCase(name, self._data[name])

    def judge(self, case: PayloadCase) -> str:
        """Decode; what is accepted must be finite (unless it is raw) and of the right shape."""
        golden = self._kv[case.golden]
        try:
            block = _codec(case.golden).decode(case.data)
        except BitstreamError as error:
            return type(error).__name__
        if block.keys.shape != golden.keys.shape or block.values.shape != golden.values.shape:
            raise Violation(f"keys of shape {tuple(block.keys.shape)}")
        if isinstance(_codec(case.golden), RawCodec):
            return "any bits are sound"
        if not (block.keys.isfinite().all() and block.values.isfinite().all()):
            raise Violation("NaN or infinity was decoded")
        same = block.keys.equal(golden.keys) and block.values.equal(golden.values)
        return "unchanged" if same else "forged and sound"

    def bound(self, case: PayloadCase) -> int:
        """Allow what a decode of the golden stream needs; tensors are not traced."""
        return (1 << 20) + 64 * len(case.data)


def _pack(random: Random, header: StreamHeader, plains: list[bytearray]) -> list[Section]:
    made: list[Section] = []
    rest: list[Any] = list(plains)
    for group, layers in enumerate(header.layer_groups):
        for kind in dict.fromkeys(chunk.kind for chunk in header.chunks_of(group)):
            plain = bytes(rest.pop(0))
            coder = random.choice((StoreCoder(), DeflateCoder(), RansCoder()))
            size = random.choice((coder.max_plain_size, 64 << 10, 512))
            chunks: list[EncodedChunk] = [
                encode_chunk(plain[start : start + size], coder) for start in range(0, len(plain), size)
            ]
            made.append(Section(layers, kind, chunks))
    return made
