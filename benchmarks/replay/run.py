"""The variants that are compared, and how a pass of each is run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.replay.trace import TraceSettings, Turn, make_trace
from dynamo_kvtc.calibration.artifact import Artifact

__all__ = ["PASSES", "RECOMPUTE", "ReplayPlan", "run_all"]

#: Cold begins with empty tiers; warm is the same trace after a restart, which leaves the disk.
PASSES = ("cold", "warm")

RECOMPUTE = "recompute"

#: Of one pass, start of the engine included.
_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class ReplayPlan:
    """What is replayed, and with how much memory.

    Attributes
    ----------
    host, disk : str
        Capacities of the tiers, the same for raw and compressed ones.
    conversations_in_cache : int
        Of the longest conversations, how many vLLM's paged cache has room for.
    """

    artifact: Artifact
    model: Path
    trace: TraceSettings
    ratio: float = 20.0
    host: str = "32MiB"
    disk: str = "96MiB"
    conversations_in_cache: int = 2
    block_size: int = 32
    tier_block_tokens: int = 256

    @property
    def dtype(self) -> str:
        """What the engine computes in: the artifact is of a cache in it."""
        return self.artifact.parameters.geometry.dtype

    def variants(self) -> dict[str, str | None]:
        """Return each variant's name, and the profile of its tiers if it has any."""
        profile = self.artifact.manifest.profile
        return {RECOMPUTE: None, "no tier": None, "raw tiers": "raw", f"{profile} tiers": profile}

    def blocks(self) -> int:
        """Return the blocks of the paged cache, the one included that vLLM keeps to itself."""
        return self.conversations_in_cache * (self.trace.longest // self.block_size + 2) + 1


def run_all(
    plan: ReplayPlan, corpus: Sequence[int], repetitions: int, folder: Path, note: Callable[[str], None]
) -> list[dict[str, dict[str, Any]]]:
    """Serve a trace per repetition twice with every variant.

    The variants of a pass follow one another, in an order that turns with each repetition.

    Returns
    -------
    list of dict
        Per repetition, by pass and variant: ``answers``, ``status`` and ``scrapes`` as the engine gave them.
    """
    results = []
    for repetition in range(repetitions):
        trace = make_trace(corpus, plan.trace.with_seed(plan.trace.seed + repetition))
        names = list(plan.variants())
        names = names[repetition % len(names) :] + names[: repetition % len(names)]
        passes: dict[str, dict[str, Any]] = {}
        for name in PASSES:
            passes[name] = {}
            for variant in names:
                note(f"repetition {repetition + 1} of {repetitions}, {name}, {variant}")
                place = folder / f"{repetition}" / variant.replace(" ", "-")
                passes[name][variant] = _serve(plan, variant, trace, place)
        results.append(passes)
    return results


def _serve(plan: ReplayPlan, variant: str, trace: Sequence[Turn], folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    asked = {
        "model": str(plan.model),
        "dtype": plan.dtype,
        "connector": _connector(plan, plan.variants()[variant], folder),
        "prefix_caching": variant != RECOMPUTE,
        "blocks": plan.blocks(),
        "block_size": plan.block_size,
        "longest": plan.trace.longest,
        "requests": [turn.token_ids for turn in trace],
    }
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.replay.engine"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    if ended.returncode:
        raise RuntimeError(f"{variant}: the engine ended with {ended.returncode}:\n{ended.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
    return result


def _connector(plan: ReplayPlan, profile: str | None, folder: Path) -> dict[str, Any] | None:
    if profile is None:
        return None
    codec: dict[str, Any] = {"profile": profile}
    if profile != "raw":
        codec["ratio"] = plan.ratio
    config = {
        "artifact": str(plan.artifact.folder),
        "codec": codec,
        "tiers": [
            {"kind": "host", "capacity": plan.host},
            {"kind": "disk", "path": str(folder / "disk"), "capacity": plan.disk, "segment_size": "8MiB"},
        ],
        "policy": {"tier_block_tokens": plan.tier_block_tokens},
    }
    path = folder / "kvtc.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return {
        "kv_connector": "KvtcConnector",
        "kv_connector_module_path": "dynamo_kvtc.adapters.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"config": str(path), "lookup_timeout": "5s"},
    }
