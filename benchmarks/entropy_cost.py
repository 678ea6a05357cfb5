"""Entropy coders on the CPU: CPU time of DEFLATE and rANS, alone and within encoding and decoding a text.

python benchmarks/entropy_cost.py --artifact demo-output/artifact
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

from common import interleave, load_subject, parse_arguments, publish

from dynamo_kvtc.codec.entropy import Buffer, EntropyCoder, RansCoder, StoreCoder
from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.evaluation.codec_speed import decode_blocks
from dynamo_kvtc.policy import OffloadPolicy

#: What a codec gives its coder in one call.
_Batch = Sequence[tuple[Buffer, Sequence[int]]]


class Recorder(StoreCoder):
    """Codes nothing, and keeps what it is given: chunks of a section at once, as `RansCoder` gets them."""

    coder_id = RansCoder.coder_id
    max_plain_size = RansCoder.max_plain_size
    batch = RansCoder.batch

    def __init__(self) -> None:
        self.batches: list[_Batch] = []

    def encode_many(self, chunks: _Batch) -> list[bytes]:
        self.batches.append([(bytes(plain), runs) for plain, runs in chunks])
        return super().encode_many(chunks)


async def cpu_timed(work: Callable[[], object]) -> float:
    """Return the seconds of CPU that a plain function takes, whatever else the machine does."""
    start = time.process_time()
    work()
    return time.process_time() - start


async def main() -> None:
    arguments = parse_arguments(__doc__)
    subject = load_subject(arguments)
    policy = OffloadPolicy()
    # One thread: the chunks of a rANS batch are coded in one whatever there are.
    open_with = partial(open_codec, subject.artifact.parameters, ratio=arguments.ratio, threads=1)
    recorder = Recorder()
    blocks = subject.gather(policy)
    open_with(coder=recorder).encode(blocks)
    codecs = {"deflate": open_with(), "rans": open_with(coder=RansCoder())}
    streams = {name: codec.encode(blocks) for name, codec in codecs.items()}

    def encode(coder: EntropyCoder) -> list[list[tuple[bytes, int]]]:
        return [
            [(data, len(plain)) for data, (plain, _) in zip(coder.encode_many(batch), batch, strict=True)]
            for batch in recorder.batches
        ]

    def decode(coder: EntropyCoder, coded: list[list[tuple[bytes, int]]]) -> None:
        for batch in coded:
            coder.decode_many(batch)

    work = {}
    for name, codec in codecs.items():
        work[f"coder encodes, {name}"] = partial(encode, codec.coder)
        work[f"coder decodes, {name}"] = partial(decode, codec.coder, encode(codec.coder))
        work[f"encode, {name}"] = partial(codec.encode, blocks)
        work[f"decode, {name}"] = partial(decode_blocks, codec, streams[name])
    seconds = await interleave(
        {name: partial(cpu_timed, one) for name, one in work.items()}, arguments.repetitions
    )
    median = {name: statistics.median(runs) for name, runs in seconds.items()}
    ratios = {
        f"{what}, rans / deflate": (median[f"{what}, rans"] / median[f"{what}, deflate"], "none")
        for what in ("coder encodes", "coder decodes", "encode", "decode")
    }
    sizes = {name: sum(len(stream) for stream in found) for name, found in streams.items()}
    ratios["bytes, rans / deflate"] = (sizes["rans"] / sizes["deflate"], "none")
    publish(
        arguments,
        "Entropy coders on the CPU",
        seconds,
        ratios,
        {
            "tier_block_tokens": policy.tier_block_tokens,
            "plain_bytes": sum(len(plain) for batch in recorder.batches for plain, _ in batch),
            "stored_bytes": sizes["deflate"],
            "stored_bytes_rans": sizes["rans"],
            "profile": subject.artifact.manifest.profile,
            "dtype": subject.loaded.geometry.dtype,
            "layer_groups": len(codecs["rans"].layer_groups),
        },
    )


if __name__ == "__main__":
    asyncio.run(main())
