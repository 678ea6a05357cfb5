"""Shapes of models, and the arithmetic of tiers, memory and volumes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dynamo_kvtc.cli.app import app
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.planning import KNOWN_MODELS, PlanRequest, chart_values, plan, read_model

GIB = 1 << 30
LLAMA = read_model("meta-llama/Llama-3.1-8B-Instruct")

runner = CliRunner()


@pytest.mark.parametrize(
    ("name", "token_kib", "billions"),
    [
        ("Llama-3.1-8B-Instruct", 128, 8.03),
        ("mistral-nemo-instruct-2407", 160, 12.2),
        ("Qwen/Qwen3-32B", 256, 32.8),
        ("Llama-3.3-70B-Instruct", 320, 70.6),
        ("SmolLM2-135M-Instruct", 22.5, 0.1345),
    ],
)
def test_known_models_have_their_published_shapes(name: str, token_kib: float, billions: float) -> None:
    model = read_model(name)
    assert model.geometry.token_bytes == token_kib * 1024
    assert model.weights / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_model_is_read_from_its_configuration(tmp_path: Path) -> None:
    config = KNOWN_MODELS["Qwen/Qwen3-32B"]
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config}))
    for spec in (str(tmp_path), str(tmp_path / "config.json")):
        model = read_model(spec, "float16")
        assert (model.geometry.num_layers, model.geometry.dtype, model.name) == (64, "float16", str(tmp_path))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"num_hidden_layers": None}, "lacks"),
        ({"num_hidden_layers": 0}, "positive"),
    ],
)
def test_what_cannot_be_planned_is_refused(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**KNOWN_MODELS["Qwen/Qwen3-8B"], **config}))
    with pytest.raises(ConfigError, match=said):
        read_model(str(path))


@pytest.mark.parametrize("text", ["[]", "{", '"x"'])
def test_a_broken_configuration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError):
        read_model(str(tmp_path))


def test_a_misspelt_name_gets_a_hint() -> None:
    with pytest.raises(ConfigError, match="did you mean mistralai/Mistral-Nemo-Instruct-2407"):
        read_model("mistral-nemo-instruct")


def test_tokens_follow_the_ratio() -> None:
    one = plan(PlanRequest(LLAMA, gpus=8, ratio=1))
    twenty = plan(PlanRequest(LLAMA, gpus=8, ratio=20))
    assert (twenty.workers, twenty.gpus_per_worker) == (8, 1)
    for place in ("host", "disk"):
        held = twenty.held[place]
        assert held.raw == held.capacity // LLAMA.geometry.token_bytes
        assert 19.8 < held.compressed / held.raw <= 20  # records are rounded up
        assert one.held[place].compressed == pytest.approx(one.held[place].raw, rel=0.001)
    # All tiers hold the same blocks, so the larger one says how many tokens there are.
    assert twenty.fleet_tokens[1] == 8 * twenty.held["disk"].compressed
    assert 15 < twenty.effective_ratio < 16  # as published: 15.4x at 8K tokens


def test_a_worker_has_one_gpu_that_holds_the_weights() -> None:
    for name, gpus in (("Qwen3-32B", 2), ("Llama-3.3-70B-Instruct", 4)):
        with pytest.raises(ConfigError, match=f"would need {gpus} GPUs of 80GiB a worker"):
            plan(PlanRequest(read_model(name), gpus=8, ratio=20))
    with pytest.raises(ConfigError, match="141 GB of weights"):
        plan(PlanRequest(read_model("Llama-3.3-70B-Instruct"), gpus=2, ratio=20))
    request = PlanRequest(read_model("Qwen3-32B"), gpus=8, ratio=20)
    assert plan(replace(request, gpu_memory=141 * GIB)).gpus_per_worker == 1
    tight = plan(replace(request, gpus_per_worker=1))
    assert 0 < tight.held["gpu"].raw < 40_000
    with pytest.raises(ConfigError, match="leave no room for its cache"):
        plan(replace(request, gpus_per_worker=1, gpu_memory=64 * GIB))


def test_a_disaggregated_plan_has_tiers_on_prefill_only() -> None:
    result = plan(PlanRequest(LLAMA, gpus=7, ratio=20, mode="disaggregated", prefill_share=0.3))
    assert (result.workers, result.tier_workers) == (7, 2)
    values = chart_values(result)
    assert values["prefill"]["replicas"] == 2 and values["decode"]["replicas"] == 5
    assert int(values["decode"]["memory"][:-2]) < int(values["prefill"]["memory"][:-2])
    with pytest.raises(ConfigError, match="need two workers"):
        plan(PlanRequest(LLAMA, gpus=1, ratio=20, mode="disaggregated"))


def test_shared_memory_holds_the_engines_own_pool() -> None:
    own = plan(PlanRequest(LLAMA, gpus=1, ratio=20))
    native = plan(PlanRequest(LLAMA, gpus=1, ratio=20, connector="offloading"))
    assert own.shared_memory == 8 * GIB and "pool" not in own.held
    pool = native.held["pool"].capacity
    assert native.shared_memory >= 1.2 * pool + 8 * GIB
    assert native.memory["shared memory"] == native.shared_memory
    kvbm = plan(PlanRequest(LLAMA, gpus=1, ratio=20, connector="kvbm"))
    assert kvbm.shared_memory == 8 * GIB and kvbm.memory["raw pool"] == kvbm.held["pool"].capacity


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"memory": 16 * GIB}, "leaves nothing for a host tier.*give a worker 2.GiB or more"),
        ({"ratio": 0.5}, "1 or more"),
        ({"gpu_share": 1.5}, "between 0 and 1"),
        ({"profile": "raw"}, "its ratio is 1"),
        ({"block_size": 48}, "multiple of the engine's"),
        ({"gpus_per_worker": 16}, "would need 16 GPUs"),
    ],
)
def test_impossible_plans_are_refused(change: dict[str, Any], said: str) -> None:
    request = PlanRequest(LLAMA, gpus=8, ratio=20)
    with pytest.raises(ConfigError, match=said):
        plan(replace(request, **change))


def test_the_memory_that_an_error_asks_for_is_enough() -> None:
    for connector in ("kvtc", "offloading", "kvbm"):
        request = PlanRequest(LLAMA, gpus=8, ratio=20, memory=GIB, connector=connector)  # type: ignore[arg-type]
        with pytest.raises(ConfigError) as caught:
            plan(request)
        needed = int(str(caught.value).split("give a worker ")[1].split("GiB")[0])
        plan(replace(request, memory=needed * GIB))


@settings(deadline=None)
@given(
    memory=st.integers(64, 2048),
    disk=st.integers(0, 8192),
    ratio=st.floats(1, 100),
    connector=st.sampled_from(("kvtc", "offloading", "kvbm")),
    name=st.sampled_from(sorted(KNOWN_MODELS)),
)
def test_a_plan_stays_within_what_it_was_given(
    memory: int, disk: int, ratio: float, connector: Any, name: str
) -> None:
    request = PlanRequest(
        read_model(name),
        gpus=8,
        gpu_memory=288 * GIB,
        ratio=ratio,
        memory=memory * GIB,
        disk=disk * GIB,
        connector=connector,
    )
    try:
        result = plan(request)
    except ConfigError as error:
        # The index of a large disk of small objects takes memory too, and may leave none for a tier.
        assert "leaves nothing for a host tier" in str(error)
        return
    assert result.memory_limit <= memory * GIB
    assert result.volume <= disk * GIB
    assert result.staging >= result.token_bytes * 256  # holds the largest object
    if disk > 1:
        assert result.held["disk"].capacity <= 0.95 * result.volume
    for held in result.held.values():
        assert held.compressed * result.stored_token_bytes <= held.capacity or held.compressed == held.raw


def test_the_command_prints_a_values_file() -> None:
    arguments = ["plan", "--model", "Qwen3-8B", "--gpus", "4", "--ratio", "20"]
    shown = runner.invoke(app, [*arguments, "--values"])
    assert shown.exit_code == 0, shown.output
    values = yaml.safe_load(shown.stdout)
    as_json = json.loads(runner.invoke(app, [*arguments, "--json"]).stdout)
    assert values == as_json["values"]
    assert as_json["memory_limit_bytes"] == int(values["worker"]["memory"][:-2]) * GIB
    table = runner.invoke(app, arguments)
    assert table.exit_code == 0 and "host tier (G2)" in table.stdout
    assert shown.stdout.strip() in table.stdout


@pytest.mark.parametrize(
    "arguments", [["--memory", "lots"], ["--connector", "lmcache"], ["--mode", "x"], ["--values", "--json"]]
)
def test_the_command_names_wrong_arguments(arguments: list[str]) -> None:
    shown = runner.invoke(app, ["plan", "--model", "Qwen3-8B", "--gpus", "4", "--ratio", "20", *arguments])
    assert shown.exit_code == 2
    assert arguments[0] in shown.output
