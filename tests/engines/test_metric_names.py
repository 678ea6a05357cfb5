"""What each host says on vLLM's port is what our own endpoint says, and all that dashboard and alerts use.

Light: vLLM's registries and managers, no engine.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("vllm", reason="needs an environment with vLLM (make engine)")

from offloading_host import Host, offloading_config, open_host, write_config, write_model
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadPromMetrics

from dynamo_kvtc.adapters.vllm.stats import KvtcPromMetrics, WorkerStats
from dynamo_kvtc.observability import exposition, flat_series

CHART = Path(__file__).parents[2] / "k8s" / "chart"
ENGINE_LABELS = {"model_name": "m", "engine": "0"}
#: Of one host alone, so in no dashboard.
OWN_TO_A_HOST = {"failed_lookups_total", "refused_jobs_total", "pending_jobs"}

TIERING = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "spec_name": "TieringOffloadingSpec",
        "secondary_tiers": [{"type": "KvtcTier", "module_path": "dynamo_kvtc.adapters.vllm_offloading"}],
    },
}
OUR_SPEC = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {
        "spec_name": "KvtcOffloadingSpec",
        "spec_module_path": "dynamo_kvtc.adapters.vllm_offloading",
    },
}


class FakeConfig:
    """The one field of VllmConfig that vLLM's class reads here; the real one wants a model."""

    def __init__(self, transfer: Mapping[str, Any]) -> None:
        self.kv_transfer_config = KVTransferConfig(**transfer)


def registered(
    kind: type[KvtcPromMetrics] | type[OffloadPromMetrics], transfer: Mapping[str, Any]
) -> tuple[Any, CollectorRegistry]:
    """Make a host's metrics in a registry of their own."""
    registry = CollectorRegistry()
    types = {one: partial(one, registry=registry) for one in (Counter, Gauge, Histogram)}
    config: Any = FakeConfig(transfer)
    labels = list(ENGINE_LABELS)
    return kind(config, types, labels, {0: list(ENGINE_LABELS.values())}), registry


HOSTS = {
    "connector, KVBM": (KvtcPromMetrics, {"kv_connector": "KvtcConnector", "kv_role": "kv_both"}),
    "offloading, tier": (OffloadPromMetrics, TIERING),
    "offloading, spec": (OffloadPromMetrics, OUR_SPEC),
}


def renamed(name: str) -> str:
    """Do what the chart's PodMonitor tells Prometheus to do."""
    template = (CHART / "templates" / "monitoring.yaml").read_text()
    regex = re.search(r"regex: (vllm:\S+)", template)
    replacement = re.search(r"replacement: (\S+)", template)
    assert regex and replacement
    match = re.fullmatch(regex[1], name)
    return name if match is None else replacement[1].replace("${1}", match[1])


def names(registry: CollectorRegistry) -> set[str]:
    """Return the names under which our metrics will be scraped, after renaming."""
    found = set()
    for family in registry.collect():
        if family.name.startswith("vllm:kvtc_"):
            found.add(renamed(family.name + ("_total" if family.type == "counter" else "")))
    return found


def asked_for() -> set[str]:
    """Return every metric of the dashboards and the alerts."""
    texts = [path.read_text() for path in (CHART / "dashboards").glob("*.json")]
    rules = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
    texts += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    return {name for text in texts for name in re.findall(r"dynamo_kvtc_\w+", text)}


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_has_every_metric_of_the_reference_and_of_dashboard_and_alerts(host: str) -> None:
    _, registry = registered(*HOSTS[host])
    found = names(registry)
    reference = {f"dynamo_kvtc_{series.name}" for series in flat_series()}
    assert reference <= found
    assert found - reference <= {f"dynamo_kvtc_{name}" for name in OWN_TO_A_HOST}
    assert asked_for() and asked_for() <= found


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return our samples by name and labels, without what vLLM and prometheus_client add."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = renamed(sample.name)
            if name.startswith("dynamo_kvtc_") and not name.endswith("_created"):
                labels = {key: one for key, one in sample.labels.items() if key not in ENGINE_LABELS}
                found[name, tuple(sorted(labels.items()))] = sample.value
    return found


def settled(host: Host, adapter: Any) -> Mapping[str, Any]:
    """Store three chunks, load them, and return the status when it changes no more."""
    host.fill()
    context, keys = host.request("text/1", 3)
    host.store(context, keys)
    host.settle()
    deadline = time.monotonic() + 60
    while adapter.counters.snapshot().offloaded_blocks < 3:
        assert time.monotonic() < deadline, "chunks are not stored"
        time.sleep(0.01)
    if hasattr(host, "tier"):
        host.forget_primary()
    assert host.lookup(context, keys) == 3
    host.settle()
    status: Mapping[str, Any] = adapter.status().to_dict()
    return status


@pytest.mark.parametrize("ours", [False, True], ids=["tier", "spec"])
def test_native_offloading_says_on_vllms_port_what_our_endpoint_says(ours: bool, tmp_path: Path) -> None:
    model, config = write_model(tmp_path / "model"), write_config(tmp_path)
    changes: dict[str, Any] = {}
    if ours:
        changes["extra_config"] = {
            "spec_name": "KvtcOffloadingSpec",
            "config": str(config),
            "load_buffer": "4MiB",
        }
    metrics, registry = registered(OffloadPromMetrics, OUR_SPEC if ours else TIERING)
    with open_host(offloading_config(model, {"config": str(config)}, **changes)) as host:
        source = host.manager if ours else host.tier
        adapter = host.manager._shared.adapter if ours else host.tier._adapter
        first = source.get_stats()
        metrics.observe(first.data)
        status = settled(host, adapter)
        deadline = time.monotonic() + 30
        own = samples(exposition(status)[0].decode())
        while True:
            stats = source.get_stats()
            if stats is not None:
                metrics.observe(stats.data)
            said = samples(generate_latest(registry).decode())
            different = {key: (value, said.get(key)) for key, value in own.items() if said.get(key) != value}
            if not different:
                break
            assert time.monotonic() < deadline, different
            time.sleep(0.1)
        extra = {name for name, _ in said} - {name for name, _ in own}
        assert extra <= {f"dynamo_kvtc_{name}" for name in OWN_TO_A_HOST}
        assert own["dynamo_kvtc_lookup_hit_blocks_total", ()] >= 3
        # What has not happened yet is there as 0, so that its first time counts in a rate.
        assert said["dynamo_kvtc_dropped_blocks_total", (("reason", "queue_full"),)] == 0


def test_the_connector_says_on_vllms_port_what_our_endpoint_says(tmp_path: Path) -> None:
    """KVBM's connector passes the same objects on (`test_kvbm_connector.py`)."""
    metrics, registry = registered(*HOSTS["connector, KVBM"])
    model, config = write_model(tmp_path / "model"), write_config(tmp_path)
    with open_host(offloading_config(model, {"config": str(config)})) as host:
        status = settled(host, host.tier._adapter)
    worker, counters = WorkerStats(), host.tier._adapter.counters.snapshot()
    stats = worker.take(counters, status)
    assert stats is not None
    metrics.observe(stats.data)
    own = samples(exposition({**status, "counters": counters.to_dict()})[0].decode())
    assert samples(generate_latest(registry).decode()) == own
