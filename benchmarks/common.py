"""What the benchmarks share: arguments, a model with its paged cache, interleaved timing, results."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dynamo_kvtc.adapters.hf import HfEngine, HfSession
from dynamo_kvtc.calibration.artifact import Artifact, load_artifact
from dynamo_kvtc.calibration.models import BUILTIN_SMOLLM2, LoadedModel, load_model
from dynamo_kvtc.cli.output import format_seconds, make_table, print_json, print_table
from dynamo_kvtc.codec.base import TierBlock
from dynamo_kvtc.data import HELDOUT_TEXTS
from dynamo_kvtc.evaluation.environment import describe_environment
from dynamo_kvtc.pipeline.adapter import TierAdapter
from dynamo_kvtc.policy import OffloadPolicy

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Subject:
    """The model, the artifact, and a text whose KV lies in the paged cache of an engine.

    The engine has room for the text twice: to onboard it while it is there.
    """

    loaded: LoadedModel
    artifact: Artifact
    session: HfSession

    @property
    def token_ids(self) -> list[int]:
        return self.session.token_ids

    @torch.inference_mode()
    def prefill(self) -> None:
        """Compute the KV of the text and nothing more: no output head, no copy into a paged cache."""
        self.loaded.model.base_model(input_ids=torch.tensor([self.token_ids]), use_cache=True)

    def gather(self, policy: OffloadPolicy) -> list[TierBlock]:
        """Copy the text's KV out of the paged cache, as offloading does."""
        step = policy.tier_block_tokens // BLOCK_SIZE
        blocks = []
        for index in range(len(self.token_ids) // policy.tier_block_tokens):
            place = self.session.block_ids[index * step : (index + 1) * step]
            keys, values = self.session.engine.cache.gather(place)
            first = index * policy.tier_block_tokens
            blocks.append(TierBlock(keys, values, first, policy.sinks_in(first)))
        return blocks

    async def offload(self, adapter: TierAdapter) -> int:
        """Store the text's KV; return its bytes."""
        ticket = adapter.offload(self.session.cached_blocks(), self.session.engine.cache)
        return (await ticket.wait()).stored_bytes

    async def onboard(self, adapter: TierAdapter) -> float:
        """Bring the text's KV into fresh blocks; return the seconds until every layer is in place."""
        engine = self.session.engine
        session = engine.session(self.token_ids)
        start = time.perf_counter()
        tokens = await adapter.lookup(session.hashes())
        await adapter.onboard(session.reserve(tokens), engine.cache).wait()
        seconds = time.perf_counter() - start
        if tokens != len(self.token_ids):
            raise SystemExit(f"only {tokens} of {len(self.token_ids)} tokens were onboarded")
        session.evict()
        return seconds


def parse_arguments(
    description: str, add_more: Callable[[argparse.ArgumentParser], None] = lambda _: None
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--artifact", type=Path, default=Path("demo-output/artifact"))
    parser.add_argument("--model", default=BUILTIN_SMOLLM2)
    parser.add_argument("--ratio", type=float, default=20.0, help="ratio of one of the artifact's plans")
    parser.add_argument("--tokens", type=int, default=2048, help="length of the prefix, whole tier blocks")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, help="torch's threads; its own choice by default")
    parser.add_argument("--json", metavar="OUT", help="write the result as JSON; - is standard output")
    add_more(parser)
    return parser.parse_args()


def load_subject(arguments: argparse.Namespace) -> Subject:
    """Load an artifact and a model in its dtype, and cut a held-out text to the length asked for."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    artifact = load_artifact(arguments.artifact)
    loaded = load_model(arguments.model, artifact.parameters.geometry.dtype)
    artifact.check_model(loaded.geometry, loaded.rope, loaded.fingerprint.weights_hash)
    text = HELDOUT_TEXTS[1].read_text(encoding="utf-8")[: 8 * arguments.tokens]
    token_ids = loaded.tokenizer(text, verbose=False)["input_ids"][: arguments.tokens]
    engine = HfEngine(loaded, num_blocks=2 * (len(token_ids) // BLOCK_SIZE + 1), block_size=BLOCK_SIZE)
    session = engine.session(token_ids)
    session.prefill()
    return Subject(loaded, artifact, session)


async def interleave(
    variants: Mapping[str, Callable[[], Awaitable[float]]], repetitions: int
) -> dict[str, list[float]]:
    """Run A B C A B C …, after one round that is not counted; each variant returns its own seconds.

    Whatever else the machine does then meets all variants alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repetition in range(repetitions + 1):
        for name, variant in variants.items():
            taken = await variant()
            if repetition:
                seconds[name].append(taken)
    return seconds


async def timed(work: Callable[[], Any]) -> float:
    """Return the seconds that a plain function takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def publish(
    arguments: argparse.Namespace,
    title: str,
    seconds: Mapping[str, list[float]],
    ratios: Mapping[str, tuple[float, str]],
    details: Mapping[str, Any],
) -> None:
    """Print a table and write the JSON.

    Parameters
    ----------
    seconds : Mapping[str, list[float]]
        Runs of each variant.
    ratios : Mapping[str, tuple[float, str]]
        What the benchmark is about: a ratio of medians and its target in words.
    details : Mapping[str, Any]
        Sizes and settings that the numbers hold for.
    """
    result = {
        "benchmark": title,
        "ratios": {name: {"value": value, "target": target} for name, (value, target) in ratios.items()},
        "seconds": {
            name: {"median": statistics.median(runs), "min": min(runs), "max": max(runs), "runs": len(runs)}
            for name, runs in seconds.items()
        },
        "details": {"nominal_ratio": arguments.ratio, "tokens": arguments.tokens, **details},
        "environment": describe_environment(),
    }
    if arguments.json == "-":
        print_json(result)
        return
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    rows = [
        (name, *(format_seconds(one) for one in (statistics.median(runs), min(runs), max(runs))))
        for name, runs in seconds.items()
    ]
    print_table(make_table(title, ("variant", "median", "min", "max"), rows))
    print_table(
        make_table(
            "Ratios of medians",
            ("ratio", "measured", "target"),
            [(name, f"{value:.2f}", target) for name, (value, target) in ratios.items()],
        )
    )
