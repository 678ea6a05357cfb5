"""Encoding keeps up with prefill: gathering and encoding a text's KV against computing it.

python benchmarks/encode_vs_prefill.py --artifact demo-output/artifact
"""

from __future__ import annotations

import asyncio
import statistics

from common import interleave, load_subject, parse_arguments, publish, timed

from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.policy import OffloadPolicy


async def main() -> None:
    arguments = parse_arguments(__doc__)
    subject = load_subject(arguments)
    policy = OffloadPolicy()
    codec = open_codec(subject.artifact.parameters, ratio=arguments.ratio)
    streams = codec.encode(subject.gather(policy))
    seconds = await interleave(
        {
            "prefill": lambda: timed(subject.prefill),
            "gather and encode": lambda: timed(lambda: codec.encode(subject.gather(policy))),
        },
        arguments.repetitions,
    )
    prefill_s, encode_s = (statistics.median(runs) for runs in seconds.values())
    publish(
        arguments,
        "Encode against prefill",
        seconds,
        {"encode / prefill": (encode_s / prefill_s, "below 1")},
        {
            "tier_block_tokens": policy.tier_block_tokens,
            "stored_bytes": sum(len(stream) for stream in streams),
            "profile": subject.artifact.manifest.profile,
            "dtype": subject.loaded.geometry.dtype,
            "layer_groups": len(codec.layer_groups),
        },
    )


if __name__ == "__main__":
    asyncio.run(main())
