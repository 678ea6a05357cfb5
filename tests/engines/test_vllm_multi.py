"""`MultiConnector[NixlConnector, ours]`, as on prefill workers: vLLM's real wrapper, the scheduler's side.

Its worker's side runs under a real Dynamo in tests/e2e.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an environment with vLLM (make engine)")

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request
from vllm_configs import TOKENS, cache_config, engine_config

from dynamo_kvtc.adapters.vllm import KvtcConnector
from dynamo_kvtc.adapters.vllm.metadata import KvtcConnectorMetadata, KvtcWorkerMetadata
from dynamo_kvtc.errors import ConfigError

NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}


def multi(tmp_path: Path, **changes: Any) -> Any:
    path = tmp_path / "kvtc.yaml"
    path.write_text("codec: {profile: raw}\ntiers:\n  - {kind: host, capacity: 1MiB}\n")
    extra = changes.pop("extra", {})
    ours = {
        "kv_connector": "KvtcConnector",
        "kv_connector_module_path": "dynamo_kvtc.adapters.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"config": str(path), **extra},
        **changes,
    }
    return engine_config(
        tmp_path,
        path,
        {"connectors": [NIXL, ours]},
        kv_connector="MultiConnector",
        kv_connector_module_path=None,
    )


@pytest.fixture
def connector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MultiConnector]:
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_HOST", "127.0.0.1")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    made = MultiConnector(multi(tmp_path), KVConnectorRole.SCHEDULER, cache_config())
    yield made
    made.shutdown()


def ours_of(connector: MultiConnector) -> KvtcConnector:
    (found,) = (one for one in connector.sub_connectors if isinstance(one, KvtcConnector))
    return found


def request(tokens: int = 600) -> Request:
    init_none_hash(sha256)
    return Request(
        "r",
        list(range(tokens)),
        SamplingParams(max_tokens=4),
        None,
        block_hasher=get_request_block_hasher(TOKENS, sha256),
    )


def test_it_takes_part_as_vllm_wants(connector: MultiConnector, tmp_path: Path) -> None:
    config = multi(tmp_path)
    assert MultiConnector.all_children_support_hma(config.kv_transfer_config)
    nixl = connector.sub_connectors[0]
    assert MultiConnector.get_required_kvcache_layout(config) == nixl.get_required_kvcache_layout(config)
    extra = config.kv_transfer_config.kv_connector_extra_config
    assert not MultiConnector.requires_piecewise_for_cudagraph(extra)
    extra["connectors"][1]["kv_connector_extra_config"]["load"] = "layerwise"
    assert MultiConnector.requires_piecewise_for_cudagraph(extra)
    assert nixl.requires_kv_delivery == connector.requires_kv_delivery


def test_its_own_entry_has_to_say_recompute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_HOST", "127.0.0.1")
    with pytest.raises(ConfigError, match="MultiConnector also in this connector's own entry"):
        MultiConnector(
            multi(tmp_path, kv_load_failure_policy="fail"), KVConnectorRole.SCHEDULER, cache_config()
        )


def test_what_nixl_does_not_bring_ours_is_asked_for(
    connector: MultiConnector, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = ours_of(connector)
    assert ours._scheduler is not None
    asked: list[int] = []

    def found(name: str, hashes: Any, **named: Any) -> int | None:
        asked.append(len(hashes))
        return None if len(asked) == 1 else 512

    monkeypatch.setattr(ours._scheduler._lookups, "get", found)  # there is no worker to answer
    one = request()
    assert connector.get_num_new_matched_tokens(one, 0) == (None, False)
    assert connector.get_num_new_matched_tokens(one, 0) == (512, True)
    assert asked == [512 // TOKENS, 512 // TOKENS]


def test_metadata_and_reports_find_their_way(connector: MultiConnector) -> None:
    metadata = connector.build_connector_meta(SchedulerOutput.make_empty())
    assert [type(one) for one in metadata.metadata].count(KvtcConnectorMetadata) == 1
    index = connector.sub_connectors.index(ours_of(connector))
    report: list[Any] = [None] * len(connector.sub_connectors)
    report[index] = KvtcWorkerMetadata(pending=1)
    output = KVConnectorOutput(kv_connector_worker_meta=type_of_reports()(metadata=tuple(report)))
    connector.update_connector_output(output)
    assert connector.has_pending_push_work()  # events of an offload under way


def type_of_reports() -> Any:
    from vllm.distributed.kv_transfer.kv_connector.v1 import multi_connector

    return multi_connector.MultiKVConnectorWorkerMetadata


def test_statistics_of_both_arrive(connector: MultiConnector, tmp_path: Path) -> None:
    sent = {"KvtcConnector": {"grown": {"offloaded_tokens_total": 256}, "now": {"onboards_active": 1}}}
    stats = MultiConnector.build_kv_connector_stats(json.loads(json.dumps(sent)))
    again = MultiConnector.build_kv_connector_stats(json.loads(json.dumps(sent)))
    both = stats.aggregate(again)
    assert both.to_dict()["KvtcConnector"]["grown"] == {"offloaded_tokens_total": 512}
    made: dict[str, list[float]] = {}

    class Recorded:
        """In place of the metric classes, whose registry other tests have filled."""

        def __init__(self, name: str, **options: Any) -> None:
            self.name = name

        def labels(self, *values: Any) -> Recorded:
            return self

        def inc(self, value: float = 1) -> None:
            made.setdefault(self.name, []).append(value)

        set = observe = inc

    metrics = MultiConnector.build_prom_metrics(
        multi(tmp_path), {Counter: Recorded, Gauge: Recorded, Histogram: Recorded}, ["engine"], {0: ["0"]}
    )
    metrics.observe(both.to_dict())
    assert made == {"vllm:kvtc_offloaded_tokens": [512], "vllm:kvtc_onboards_active": [1]}
