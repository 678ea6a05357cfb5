"""What the manifests tell Dynamo's processes, read by Dynamo's and vLLM's own parsers. Nothing is started."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

MANIFESTS = Path(__file__).parents[2] / "k8s" / "manifests"

pytestmark = pytest.mark.e2e_ci


def components() -> list[Any]:
    found = []
    for path in sorted(MANIFESTS.glob("*/manifests.yaml")):
        for resource in yaml.safe_load_all(path.read_text()):
            if resource["kind"] == "DynamoGraphDeployment":
                for entry in resource["spec"]["components"]:
                    (container,) = entry["podTemplate"]["spec"]["containers"]
                    name = f"{path.parent.name}-{entry['type']}"
                    found.append(pytest.param(entry["type"], container, id=name))
    return found


def set_environment(container: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for entry in container["env"]:
        if "value" in entry:
            monkeypatch.setenv(entry["name"], entry["value"])


WORKERS = [entry for entry in components() if entry.values[0] != "frontend"]
FRONTENDS = [pytest.param(entry.values[1], id=entry.id) for entry in components() if entry not in WORKERS]


@pytest.mark.parametrize(("kind", "container"), WORKERS)
def test_workers_are_told_what_they_understand(
    kind: str, container: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynamo.vllm import args
    from dynamo.vllm.kv_connector_protocols import make_kv_connector_protocol
    from vllm.config import KVTransferConfig

    set_environment(container, monkeypatch)
    config, engine = args._parse_cli_args(container["args"])
    mode = getattr(config.disaggregation_mode, "value", config.disaggregation_mode)
    assert mode == (None if kind == "worker" else kind)
    assert (engine.block_size, engine.gpu_memory_utilization) == (16, 0.9)
    assert isinstance(engine.kv_transfer_config, KVTransferConfig)
    assert engine.kv_transfer_config.kv_load_failure_policy == "recompute"
    if kind != "decode":
        assert engine.kv_events_config.enable_kv_cache_events
    if kind == "prefill":
        make_kv_connector_protocol(SimpleNamespace(kv_transfer_config=engine.kv_transfer_config))


@pytest.mark.parametrize("container", FRONTENDS)
def test_frontends_are_told_what_they_understand(
    container: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynamo.frontend.main import parse_args

    set_environment(container, monkeypatch)
    monkeypatch.setattr(sys, "argv", ["frontend"])
    config, *_ = parse_args()
    assert (config.router_mode, config.use_kv_events, config.kv_cache_block_size) == ("kv", True, 16)
    assert (config.host_cache_hit_weight, config.disk_cache_hit_weight) == (0.75, 0.25)
