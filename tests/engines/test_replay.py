"""`benchmarks.replay` in a real vLLM, one short conversation."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks.replay.run import PASSES, RECOMPUTE, ReplayPlan, run_all
from benchmarks.replay.summary import summarise
from benchmarks.replay.trace import TraceSettings
from dynamo_kvtc.calibration.artifact import load_artifact
from dynamo_kvtc.calibration.models import BUILTIN_SMOLLM2, resolve_model
from dynamo_kvtc.data import HELDOUT_TEXTS

pytest.importorskip("vllm", reason="needs an environment with vLLM (make engine)")


def test_a_restarted_engine_is_served_by_its_disk_tier(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raw tiers, which change nothing, and recomputing: who served, and that both say the same."""
    monkeypatch.setattr(ReplayPlan, "variants", lambda self: {RECOMPUTE: None, "raw tiers": "raw"})
    model = resolve_model(BUILTIN_SMOLLM2)
    shape = TraceSettings(conversations=1, turns=2, shared=64, first=640, growth=256)
    plan = ReplayPlan(artifact=load_artifact(artifact), model=model, trace=shape)
    corpus = AutoTokenizer.from_pretrained(model)(HELDOUT_TEXTS[0].read_text()[:20_000])["input_ids"]
    results = run_all(plan, corpus, 1, tmp_path, lambda line: None)
    summaries = summarise(results)
    total = 704 + 960
    for name in PASSES:
        one = summaries[name]
        assert one[RECOMPUTE]["computed"] == 1 and one[RECOMPUTE]["tokens"] == total
        assert one["raw tiers"]["tokens"] == total
        assert one["raw tiers"]["recompute_over_this"]["mean"] > 0
    cold, warm = (results[0][name]["raw tiers"]["answers"] for name in PASSES)
    # Cold: the second turn finds the first one in vLLM's own cache. Warm: the first turn comes from the disk.
    assert [answer["onboarded"] for answer in cold] == [0, 0]
    assert cold[1]["in_cache"] > 0
    assert warm[0]["onboarded"] == 512 and warm[0]["in_cache"] == 0
    assert summaries["warm"]["raw tiers"]["onboarded_bytes"] > 0
