"""The real vLLM on a CPU with its real OffloadingConnector, and our tier below it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an environment with vLLM (make engine)")

from benchmarks.local_dynamo.vllm_cpu import VLLM_ON_CPU
from dynamo_kvtc.calibration.models import BUILTIN_SMOLLM2, resolve_model

HERE = Path(__file__).parent

#: Tokens of a chunk; vLLM's CPU blocks have 128 of them.
CHUNK = 256


@pytest.fixture(scope="session")
def model() -> Path:
    return resolve_model(BUILTIN_SMOLLM2)


@pytest.fixture(scope="session")
def prompts(model: Path) -> list[list[int]]:
    """Two prompts with the same beginning."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    text = "".join(
        (HERE.parents[1] / "docs" / name).read_text() for name in ("architecture.md", "bitstream.md")
    )
    ids = tokenizer(text)["input_ids"]
    return [ids[:1100], ids[:800] + ids[2000:2300]]


def serve(model: Path, prompts: list[list[int]], connector: dict[str, Any] | None, **asked: Any) -> Any:
    """Run vLLM in a process of its own and return what it answered."""
    environment = {
        **os.environ,
        **VLLM_ON_CPU,
        "PYTHONPATH": f"{HERE.parents[1]}:{HERE}",
        "OMP_NUM_THREADS": "2",
        "PYTHONHASHSEED": "0",
    }
    request = {
        "model": str(model),
        "connector": connector,
        "prompts": prompts,
        "rounds": 1,
        "tokens": 12,
        **asked,
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "serve.py")],
        input=json.dumps(request),
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    (answer,) = (line for line in done.stdout.splitlines() if line.startswith('{"rounds"'))
    return json.loads(answer)


def connector(folder: Path, **ours: Any) -> dict[str, Any]:
    path = folder / "kvtc.yaml"
    config = {
        "codec": {"profile": "raw"},
        "tiers": [{"kind": "disk", "path": str(folder / "disk"), "capacity": "1GiB"}],
        "transfer": {"staging": "64MiB"},
        **ours,
    }
    path.write_text(json.dumps(config))
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "cpu_tiering",
            "cpu_bytes_to_use": 512 << 20,
            "block_size": CHUNK,
            "secondary_tiers": [
                {
                    "type": "KvtcTier",
                    "module_path": "dynamo_kvtc.adapters.vllm_offloading",
                    "config": str(path),
                }
            ],
        },
    }


@pytest.fixture(scope="session")
def plain(model: Path, prompts: list[list[int]]) -> Any:
    """What vLLM answers without any connector."""
    return serve(model, prompts, None)["rounds"][0]


@pytest.fixture(scope="session")
def stored(model: Path, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with what one process stored raw, and what that process answered."""
    folder = tmp_path_factory.mktemp("raw")
    return folder, serve(model, prompts, connector(folder))


def assert_same(answers: list[Any], expected: list[Any], *, tolerance: float = 1e-4) -> None:
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer["tokens"] == wanted["tokens"]
        assert answer["logprobs"] == pytest.approx(wanted["logprobs"], abs=tolerance)


@pytest.mark.slow
@pytest.mark.model
def test_raw_chunks_change_no_answer(plain: Any, stored: Any) -> None:
    _, first = stored
    assert_same(first["rounds"][0], plain)
    # The prompts have 4 whole chunks each and share the first 3.
    assert first["metrics"]["vllm:kvtc_offloaded_blocks"] == 5


@pytest.mark.slow
@pytest.mark.model
def test_a_second_process_is_served_from_disk(
    model: Path, prompts: list[list[int]], plain: Any, stored: Any
) -> None:
    folder, _ = stored
    second = serve(model, prompts, connector(folder))
    assert_same(second["rounds"][0], plain)
    assert second["rounds"][0][0]["cached"] == 4 * CHUNK
    assert second["metrics"]["vllm:kvtc_onboarded_blocks"] == 5
    salted = serve(model, prompts, connector(folder), salt="another tenant")
    assert_same(salted["rounds"][0], plain)
    assert salted["rounds"][0][0]["cached"] == 0
    assert salted["metrics"].get("vllm:kvtc_onboarded_blocks", 0) == 0


def our_spec(folder: Path, **ours: Any) -> dict[str, Any]:
    """The connector with our spec in the place of vLLM's, and a host tier."""
    tiers = [
        {"kind": "host", "capacity": "256MiB"},
        {"kind": "disk", "path": str(folder / "disk"), "capacity": "1GiB"},
    ]
    settings = connector(folder, tiers=tiers, **ours)
    extra = settings["kv_connector_extra_config"]
    extra["spec_name"], extra["spec_module_path"] = (
        "KvtcOffloadingSpec",
        "dynamo_kvtc.adapters.vllm_offloading",
    )
    extra["config"] = extra.pop("secondary_tiers")[0]["config"]
    del extra["cpu_bytes_to_use"]
    return settings


@pytest.mark.slow
@pytest.mark.model
def test_our_spec_serves_the_second_turn(model: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    answered = serve(model, prompts, our_spec(tmp_path), rounds=2)
    computed, loaded = answered["rounds"]
    assert computed[0]["cached"] == 0 and loaded[0]["cached"] == 4 * CHUNK
    assert_same(loaded, computed)
    assert answered["metrics"]["vllm:kvtc_offloaded_blocks"] == 5
    assert answered["metrics"]["vllm:kvtc_onboarded_blocks"] >= 4


@pytest.mark.slow
@pytest.mark.model
def test_compressed_chunks_change_answers_little(
    model: Path, prompts: list[list[int]], tmp_path: Path, artifact: Path
) -> None:
    profile = json.loads((artifact / "artifact.json").read_text())["profile"]
    ours = {"artifact": str(artifact), "codec": {"profile": profile, "ratio": 20, "threads": 2}}
    answered = serve(model, prompts, our_spec(tmp_path, **ours), rounds=2, dtype="bfloat16")
    computed, loaded = answered["rounds"]
    metrics = answered["metrics"]
    # The fourth chunk ends inside the recent window.
    assert loaded[0]["cached"] == 3 * CHUNK
    ratio = metrics["vllm:kvtc_offloaded_raw_bytes"] / metrics["vllm:kvtc_offloaded_stored_bytes"]
    assert ratio > 10
    for answer, wanted in zip(loaded, computed, strict=True):
        assert answer["logprobs"][0] == pytest.approx(wanted["logprobs"][0], abs=0.5)
