"""Replay a multi-turn trace in vLLM: compressed tiers, raw tiers of the same bytes, no tier, recomputing.

    make replay

Runs in the environment of `make engine`. Every pass is an engine in a process of its own; the passes of the
variants follow one another, several times over with other text, so that whatever else the machine does meets
them alike.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.replay.plots import plot_dashboard, plot_replay
from benchmarks.replay.run import PASSES, ReplayPlan, run_all
from benchmarks.replay.summary import summarise
from benchmarks.replay.trace import TraceSettings
from dynamo_kvtc.calibration.artifact import load_artifact
from dynamo_kvtc.calibration.models import BUILTIN_SMOLLM2, resolve_model
from dynamo_kvtc.calibration.run import calibrate
from dynamo_kvtc.cli.demo import calibration_settings
from dynamo_kvtc.cli.output import format_bytes, make_table, print_note, print_table
from dynamo_kvtc.data import HELDOUT_TEXTS
from dynamo_kvtc.evaluation.environment import describe_environment


def main() -> None:
    """Run the benchmark as its arguments say."""
    arguments = parse_arguments()
    folder = arguments.artifact
    if folder is None:
        print_note("the demo's artifact, made now if it is not there")
        folder = calibrate(calibration_settings(Path("demo-output"), "rd", short=False)).folder
    model = resolve_model(arguments.model)
    plan = ReplayPlan(
        # The engines run in folders of their own.
        artifact=load_artifact(folder.resolve()),
        model=model,
        trace=TraceSettings(
            conversations=arguments.conversations, turns=arguments.turns, seed=arguments.seed
        ),
        ratio=arguments.ratio,
        host=arguments.host,
        disk=arguments.disk,
    )
    text = "\n".join(path.read_text(encoding="utf-8") for path in HELDOUT_TEXTS)
    corpus = AutoTokenizer.from_pretrained(model)(text, verbose=False)["input_ids"]
    with tempfile.TemporaryDirectory(prefix="kvtc-replay-") as place:
        repetitions = run_all(plan, corpus, arguments.repetitions, Path(place), print_note)
    publish(plan, repetitions, arguments.out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--artifact", type=Path, help="of a cache in the engine's type; else the demo's")
    parser.add_argument("--model", default=BUILTIN_SMOLLM2)
    parser.add_argument("--ratio", type=float, default=20.0, help="ratio of one of the artifact's plans")
    parser.add_argument("--conversations", type=int, default=6)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the first repetition")
    parser.add_argument("--host", default="32MiB", help="host tier, of both kinds")
    parser.add_argument("--disk", default="96MiB", help="disk tier, of both kinds")
    parser.add_argument("--out", type=Path, default=Path("replay-output"))
    return parser.parse_args()


def publish(plan: ReplayPlan, repetitions: list[dict[str, dict[str, Any]]], out: Path) -> None:
    """Write results and plots, and print a table for each pass."""
    out.mkdir(parents=True, exist_ok=True)
    compressed = list(plan.variants())[-1]
    first = repetitions[0]
    result = {
        "benchmark": "replay of multi-turn conversations in vLLM",
        "trace": asdict(plan.trace) | {"repetitions": len(repetitions)},
        "details": {
            "ratio": plan.ratio,
            "dtype": plan.dtype,
            "host": plan.host,
            "disk": plan.disk,
            "paged_cache_blocks": plan.blocks(),
            "block_size": plan.block_size,
            "tier_block_tokens": plan.tier_block_tokens,
        },
        "passes": summarise(repetitions),
        "answers": {
            name: {
                variant: [answer for one in repetitions for answer in one[name][variant]["answers"]]
                for variant in plan.variants()
            }
            for name in PASSES
        },
        "environment": describe_environment(),
    }
    (out / "replay.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    plot_replay(result, out / "replay.png")
    plot_dashboard([first[name][compressed]["scrapes"] for name in PASSES], out / "dashboard.png")
    for name in PASSES:
        print_table(_table(name, result["passes"][name]))


def _table(name: str, variants: Mapping[str, Mapping[str, Any]]) -> Any:
    rows = [
        (
            variant,
            *(f"{one['recompute_over_this'][key]:.2f}x" for key in ("p50", "p90", "p99", "mean")),
            " to ".join(f"{one['recompute_over_this'][key]:.2f}x" for key in ("mean_least", "mean_most")),
            f"{one['recompute_over_this_with_offload']:.2f}x",
            f"{one['from_paged_cache']:.0%}",
            f"{one['from_tiers']:.0%}",
            f"{one['same_first_token']:.0%}",
            format_bytes(one["offloaded_bytes"]) if "offloaded_bytes" in one else "-",
            format_bytes(one["onboarded_bytes"]) if "onboarded_bytes" in one else "-",
        )
        for variant, one in variants.items()
    ]
    columns = (
        *("variant", "p50", "p90", "p99", "mean", "over repetitions", "offload included"),
        *("from G1", "from tiers", "same token", "written", "read"),
    )
    return make_table(f"Time to first token, {name}: how much faster than recomputing", columns, rows)


if __name__ == "__main__":
    main()
