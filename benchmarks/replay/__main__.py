"""Replay a multi-turn trace: compressed tiers, raw tiers of the same bytes, no tier, recomputing everything.

    python -m benchmarks.replay --artifact demo-output/artifact --out replay-output

Cold: every tier is empty. Warm: the same trace again after a restart, which keeps the disk only. Each request
goes to all variants one after the other, so that whatever else the machine does meets them alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.replay.plots import plot_dashboard, plot_replay
from benchmarks.replay.server import Answer, Server
from benchmarks.replay.trace import TraceSettings, Turn, make_trace
from dynamo_kvtc.calibration.artifact import Artifact, load_artifact
from dynamo_kvtc.calibration.models import BUILTIN_SMOLLM2, LoadedModel, load_model
from dynamo_kvtc.cli.output import format_bytes, format_seconds, make_table, print_note, print_table
from dynamo_kvtc.config import Config
from dynamo_kvtc.data import HELDOUT_TEXTS
from dynamo_kvtc.evaluation.environment import describe_environment
from dynamo_kvtc.observability import metric_families
from dynamo_kvtc.pipeline.assemble import open_adapter

BLOCK_SIZE = 16
TIER_BLOCK_TOKENS = 128
PASSES = ("cold", "warm")


def main() -> None:
    """Run the benchmark as its arguments say."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    loaded = load_model(arguments.model)
    artifact = load_artifact(arguments.artifact)
    artifact.check_model(loaded.geometry, loaded.rope, loaded.fingerprint.weights_hash)
    text = "\n".join(path.read_text(encoding="utf-8") for path in HELDOUT_TEXTS)
    settings = TraceSettings(
        conversations=arguments.conversations, turns=arguments.turns, seed=arguments.seed
    )
    trace = make_trace(loaded.tokenizer(text, verbose=False)["input_ids"], settings)
    with tempfile.TemporaryDirectory(prefix="kvtc-replay-") as folder:
        result = asyncio.run(replay(arguments, loaded, artifact, trace, Path(folder)))
    result["trace"] = asdict(settings) | {"requests": len(trace)}
    publish(result, arguments.out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--artifact", type=Path, default=Path("demo-output/artifact"))
    parser.add_argument("--model", default=BUILTIN_SMOLLM2)
    parser.add_argument("--ratio", type=float, default=20.0, help="ratio of one of the artifact's plans")
    parser.add_argument("--conversations", type=int, default=6)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--host", default="8MiB", help="host tier, of both kinds")
    parser.add_argument("--disk", default="48MiB", help="disk tier, of both kinds")
    parser.add_argument("--threads", type=int, help="torch's threads; its own choice by default")
    parser.add_argument("--out", type=Path, default=Path("replay-output"))
    return parser.parse_args()


def configuration(artifact: Artifact, profile: str, arguments: argparse.Namespace, folder: Path) -> Config:
    codec: dict[str, object] = {"profile": profile}
    if profile != "raw":
        codec["ratio"] = arguments.ratio
    return Config.model_validate(
        {
            "artifact": artifact.folder,
            "codec": codec,
            "tiers": [
                {"kind": "host", "capacity": arguments.host},
                {
                    "kind": "disk",
                    "path": folder / profile,
                    "capacity": arguments.disk,
                    "segment_size": "4MiB",
                },
            ],
            "policy": {"tier_block_tokens": TIER_BLOCK_TOKENS, "minimum_tokens": 256},
            "transfer": {"staging": "64MiB"},
        }
    )


async def replay(
    arguments: argparse.Namespace,
    loaded: LoadedModel,
    artifact: Artifact,
    trace: Sequence[Turn],
    folder: Path,
) -> dict[str, Any]:
    """Serve the trace twice with every variant."""
    compressed = artifact.manifest.profile
    longest = max(len(turn.token_ids) for turn in trace)
    # Room for two of the longest conversations: the paged cache is what is short.
    blocks = 2 * (longest // BLOCK_SIZE + 1)
    servers = {
        "recompute": Server(loaded, num_blocks=blocks, block_size=BLOCK_SIZE, keep=False),
        "no tier": Server(loaded, num_blocks=blocks, block_size=BLOCK_SIZE),
        "raw tiers": Server(loaded, num_blocks=blocks, block_size=BLOCK_SIZE),
        f"{compressed} tiers": Server(loaded, num_blocks=blocks, block_size=BLOCK_SIZE),
    }
    profiles = {"raw tiers": "raw", f"{compressed} tiers": compressed}
    answers: dict[str, dict[str, list[Answer]]] = {name: {} for name in PASSES}
    tiers: dict[str, dict[str, Any]] = {name: {} for name in PASSES}
    scrapes: list[dict[str, Any]] = []
    began = time.monotonic()
    for number, name in enumerate(PASSES):
        async with AsyncExitStack() as opened:
            for variant, profile in profiles.items():
                adapter = await open_adapter(
                    configuration(artifact, profile, arguments, folder),
                    loaded.geometry,
                    BLOCK_SIZE,
                    loaded.rope,
                )
                servers[variant].adapter = await opened.enter_async_context(adapter)
            answers[name] = {variant: [] for variant in servers}
            for index, turn in enumerate(trace):
                for variant, server in servers.items():
                    answers[name][variant].append(await server.serve(turn))
                print_note(f"{name} {index + 1}/{len(trace)}")
                kept = servers[f"{compressed} tiers"].adapter
                if kept is not None:
                    scrapes.append(scrape(kept.status().to_dict(), time.monotonic() - began, number))
            for variant in profiles:
                adapter = servers[variant].adapter
                if adapter is not None:
                    tiers[name][variant] = adapter.status().to_dict()
            for server in servers.values():
                server.restart()
                server.adapter = None
    return {
        "benchmark": "replay of multi-turn conversations",
        "passes": {name: summary(answers[name], tiers[name]) for name in PASSES},
        "answers": {
            name: {variant: [asdict(one) for one in every] for variant, every in by_variant.items()}
            for name, by_variant in answers.items()
        },
        "scrapes": scrapes,
        "details": {
            "ratio": arguments.ratio,
            "host": arguments.host,
            "disk": arguments.disk,
            "paged_cache_blocks": blocks,
            "block_size": BLOCK_SIZE,
            "tier_block_tokens": TIER_BLOCK_TOKENS,
        },
        "environment": describe_environment(),
    }


def scrape(status: Mapping[str, Any], seconds: float, process: int) -> dict[str, Any]:
    """Return what Prometheus would read now, by series."""
    values = {
        f"{family.metric.name}{{{','.join(labels)}}}": value["sum"] if isinstance(value, dict) else value
        for family in metric_families(status)
        for labels, value in family.samples
    }
    return {"seconds": seconds, "process": process, "values": values}


def summary(
    answers: Mapping[str, Sequence[Answer]], statuses: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return percentiles, where tokens came from, and bytes, by variant, with ratios to recomputing."""
    base = [one.ttft_s for one in answers["recompute"]]
    exact = [one.first_token for one in answers["recompute"]]
    found = {}
    for variant, every in answers.items():
        times = [one.ttft_s for one in every]
        tokens = sum(one.in_cache + one.onboarded + one.computed for one in every)
        same = sum(one.first_token == token for one, token in zip(every, exact, strict=True))
        found[variant] = {
            "ttft_s": {"p50": percentile(times, 0.5), "p90": percentile(times, 0.9)}
            | {"p99": percentile(times, 0.99), "mean": statistics.mean(times)},
            "recompute_over_this": {
                "p50": percentile(base, 0.5) / percentile(times, 0.5),
                "mean": statistics.mean(base) / statistics.mean(times),
            },
            "tokens": tokens,
            "from_paged_cache": sum(one.in_cache for one in every) / tokens,
            "from_tiers": sum(one.onboarded for one in every) / tokens,
            "computed": sum(one.computed for one in every) / tokens,
            "same_first_token": same / len(every),
            **(bytes_of(statuses[variant]) if variant in statuses else {}),
        }
    return found


def bytes_of(status: Mapping[str, Any]) -> dict[str, Any]:
    counters = status["counters"]
    return {
        "ratio": counters["offload_ratio"],
        "offloaded_bytes": counters["offloaded_stored_bytes"],
        "onboarded_bytes": counters["onboarded_stored_bytes"],
        "evictions": {name: tier["evictions"] for name, tier in status["tiers"].items()},
        "stored_bytes": {name: tier["stored_bytes"] for name, tier in status["tiers"].items()},
    }


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def publish(result: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "replay.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    plot_replay(result, out / "replay.png")
    plot_dashboard(result["scrapes"], out / "dashboard.png")
    for name, variants in result["passes"].items():
        rows = [
            (
                variant,
                *(format_seconds(one["ttft_s"][key]) for key in ("p50", "p90", "p99")),
                f"{one['recompute_over_this']['p50']:.1f}x",
                f"{one['recompute_over_this']['mean']:.1f}x",
                f"{one['from_paged_cache']:.0%}",
                f"{one['from_tiers']:.0%}",
                f"{one['same_first_token']:.0%}",
                format_bytes(one["offloaded_bytes"]) if "offloaded_bytes" in one else "-",
                format_bytes(one["onboarded_bytes"]) if "onboarded_bytes" in one else "-",
            )
            for variant, one in variants.items()
        ]
        columns = (
            *("variant", "p50", "p90", "p99", "faster at p50", "in the mean", "from G1", "from tiers"),
            *("same token", "written", "read"),
        )
        print_table(make_table(f"Time to first token, {name}", columns, rows))


if __name__ == "__main__":
    main()
