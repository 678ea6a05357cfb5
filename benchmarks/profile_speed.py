"""rd is no slower than kvtc: encoding and decoding the same text with both, at plans of like quality.

python benchmarks/profile_speed.py --artifact demo-output/artifact --ratio 40 \
    --kvtc-artifact demo-output/artifact-kvtc --kvtc-ratio 16
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from pathlib import Path

import torch
from common import interleave, parse_arguments, publish, timed

from dynamo_kvtc.calibration.artifact import load_artifact
from dynamo_kvtc.calibration.model_cache import prefill
from dynamo_kvtc.calibration.models import load_model
from dynamo_kvtc.codec.base import KvCodec, TierBlock
from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.data import HELDOUT_TEXTS
from dynamo_kvtc.policy import OffloadPolicy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kvtc-artifact", type=Path, required=True)
    parser.add_argument("--kvtc-ratio", type=float, default=16.0, help="nominal ratio of its plan")


async def main() -> None:
    arguments = parse_arguments(__doc__, add_arguments)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rd, kvtc = load_artifact(arguments.artifact), load_artifact(arguments.kvtc_artifact)
    loaded = load_model(arguments.model, rd.parameters.geometry.dtype)
    for artifact in (rd, kvtc):
        artifact.check_model(loaded.geometry, loaded.rope, loaded.fingerprint.weights_hash)
    text = HELDOUT_TEXTS[1].read_text(encoding="utf-8")[: 8 * arguments.tokens]
    token_ids = loaded.tokenizer(text, verbose=False)["input_ids"][: arguments.tokens]
    keys, values = prefill(loaded, token_ids)
    policy = OffloadPolicy()
    step = policy.tier_block_tokens
    blocks = [
        TierBlock(keys[first : first + step], values[first : first + step], first, policy.sinks_in(first))
        for first in range(0, len(token_ids), step)
    ]
    codecs: dict[str, KvCodec] = {
        "rd": open_codec(rd.parameters, ratio=arguments.ratio, threads=1),
        "kvtc": open_codec(kvtc.parameters, ratio=arguments.kvtc_ratio, threads=1),
    }
    streams = {name: codec.encode(blocks) for name, codec in codecs.items()}
    variants = {}
    for name, codec in codecs.items():
        variants[f"{name} encode"] = lambda codec=codec: timed(lambda: codec.encode(blocks))
        variants[f"{name} decode"] = lambda codec=codec, name=name: timed(
            lambda: [codec.decode(stream) for stream in streams[name]]
        )
    seconds = await interleave(variants, arguments.repetitions)
    median = {name: statistics.median(runs) for name, runs in seconds.items()}
    raw_bytes = len(token_ids) * loaded.geometry.token_bytes_16bit
    publish(
        arguments,
        "Speed of the profiles",
        seconds,
        {
            f"{work}, rd / kvtc": (median[f"rd {work}"] / median[f"kvtc {work}"], "at most 1")
            for work in ("encode", "decode")
        },
        {
            "tier_block_tokens": step,
            "kvtc_nominal_ratio": arguments.kvtc_ratio,
            "measured_ratio": {name: raw_bytes / sum(map(len, coded)) for name, coded in streams.items()},
            "layer_groups": {name: len(codec.layer_groups) for name, codec in codecs.items()},
            "dtype": loaded.geometry.dtype,
        },
    )


if __name__ == "__main__":
    asyncio.run(main())
