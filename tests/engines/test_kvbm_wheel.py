"""Our `DynamoConnector` against the real kvbm wheel, as far as it goes without a CUDA driver.

`KvbmLeader` starts; `KvbmWorker` panics, and the connector's leader waits for one. So for `PdConnector`,
whose check needs connectors that exist, the leader's Rust half is a stand-in (see `kvbm_stand_in`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make engine has an environment with it")
pytest.importorskip("kvbm", reason="kvbm is not installed: make engine has an environment with it")

import kvbm_stand_in
from kvbm import KvbmLeader
from kvbm.vllm_integration.connector import DynamoConnector as KvbmConnector
from kvbm.vllm_integration.connector import PdConnector
from kvbm.vllm_integration.rust import KvbmRequest
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole, SupportsHMA
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

from dynamo_kvtc.adapters.kvbm import DynamoConnector
from dynamo_kvtc.adapters.vllm import KvtcConnector
from dynamo_kvtc.calibration.models import BUILTIN_SMOLLM2, resolve_model
from dynamo_kvtc.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")


def entry(tmp_path: Path, **extra: Any) -> dict[str, Any]:
    config = tmp_path / "kvtc.yaml"
    tiers = [{"kind": "host", "capacity": "64MiB"}]
    config.write_text(json.dumps({"codec": {"profile": "raw"}, "tiers": tiers}))
    return {
        "kv_connector": "DynamoConnector",
        "kv_connector_module_path": "dynamo_kvtc.adapters.kvbm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"config": str(config), **extra},
    }


NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}


def pd(*connectors: dict[str, Any]) -> dict[str, Any]:
    return {
        "kv_connector": "PdConnector",
        "kv_connector_module_path": "kvbm.vllm_integration.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": list(connectors)},
    }


def engine_config(transfer: dict[str, Any], **arguments: Any) -> Any:
    return EngineArgs(
        model=str(resolve_model(BUILTIN_SMOLLM2)),
        dtype="float32",
        max_model_len=2048,
        enforce_eager=True,
        kv_transfer_config=KVTransferConfig(**transfer),
        **arguments,
    ).create_engine_config()


def cache_config() -> KVCacheConfig:
    import torch

    spec = FullAttentionSpec(block_size=128, num_kv_heads=3, head_size=64, dtype=torch.float32)
    names = [f"model.layers.{layer}.self_attn.attn" for layer in range(30)]
    return KVCacheConfig(num_blocks=32, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(names, spec)])


@pytest.fixture(autouse=True)
def kvbm_host_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_KVBM_CPU_CACHE_GB", "0.1")


def test_the_leader_starts_and_takes_requests_with_a_salt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS", "1")  # there will be no worker
    monkeypatch.setenv("DYN_KVBM_LEADER_ZMQ_PUB_PORT", "26101")
    monkeypatch.setenv("DYN_KVBM_LEADER_ZMQ_ACK_PORT", "26102")
    assert KvbmLeader(1, drt=None) is not None
    KvbmRequest(request_id="a", lora_name=None, salt_hash="tenant")


def test_it_is_kvbms_connector_by_name_and_by_class(tmp_path: Path) -> None:
    found = KVConnectorFactory.get_connector_class(KVTransferConfig(**entry(tmp_path)))
    assert found is DynamoConnector
    assert found.__name__ == KvbmConnector.__name__
    assert issubclass(found, KvbmConnector)
    assert issubclass(found, SupportsHMA)
    # By this name PdConnector finds who can read its statistics.
    assert KVConnectorFactory.get_connector_class_by_name("DynamoConnector") is DynamoConnector


def test_every_hook_of_our_connector_is_passed_on() -> None:
    hooks = {name for name in vars(KvtcConnector) if not name.startswith("_")}
    assert hooks <= vars(DynamoConnector).keys()


def test_dynamo_takes_it_for_kvbm(tmp_path: Path) -> None:
    from dynamo.vllm.args import _uses_dynamo_connector
    from kvbm.vllm_integration.consolidator_config import should_enable_consolidator

    for transfer in (entry(tmp_path), pd(entry(tmp_path), NIXL)):
        config = engine_config(transfer)
        assert _uses_dynamo_connector(config)
        assert should_enable_consolidator(config)


def test_prefill_workers_hand_over_by_nixl(tmp_path: Path) -> None:
    from dynamo.vllm.kv_connector_protocols import NixlConnectorProtocol, make_kv_connector_protocol

    config = engine_config(pd(entry(tmp_path), NIXL))
    assert isinstance(make_kv_connector_protocol(config), NixlConnectorProtocol)


def test_pd_connector_accepts_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kvbm_stand_in.install(monkeypatch, blocks=4)
    config = engine_config(pd(entry(tmp_path), NIXL))
    assert PdConnector.all_children_support_hma(config.kv_transfer_config)
    connector = PdConnector(config, KVConnectorRole.SCHEDULER, cache_config())
    try:
        assert isinstance(connector.sub_connectors[0], DynamoConnector)
    finally:
        connector.shutdown()


def test_pd_connector_refuses_our_other_connector(tmp_path: Path) -> None:
    """The control: the check is about the class."""
    other = entry(tmp_path) | {
        "kv_connector": "KvtcConnector",
        "kv_connector_module_path": "dynamo_kvtc.adapters.vllm",
    }
    with pytest.raises(TypeError, match="Expected first connector to be DynamoConnector"):
        PdConnector(engine_config(pd(other, NIXL)), KVConnectorRole.SCHEDULER, cache_config())


def test_contradictions_are_refused_before_kvbm_takes_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_leader(*arguments: object, **named: object) -> None:
        raise AssertionError("KVBM was started")

    from kvbm.vllm_integration import connector_leader

    monkeypatch.setattr(connector_leader, "KvbmLeader", no_leader)

    def start(transfer: dict[str, Any], **arguments: Any) -> None:
        DynamoConnector(engine_config(transfer, **arguments), KVConnectorRole.SCHEDULER, cache_config())

    with pytest.raises(ConfigError, match='set "load": "async"'):
        start(entry(tmp_path, load="layerwise"))
    with pytest.raises(ConfigError, match="LoRA adapters"):
        start(entry(tmp_path), enable_lora=True)
    parallel = engine_config(entry(tmp_path))
    parallel.parallel_config.tensor_parallel_size = 2
    with pytest.raises(ConfigError, match=r"--tensor-parallel-size 2 is not supported yet.*Set"):
        DynamoConnector(parallel, KVConnectorRole.WORKER, cache_config())
    monkeypatch.setenv("DYN_KVBM_DISK_CACHE_GB", "10")
    with pytest.raises(ConfigError, match="unset DYN_KVBM_DISK_CACHE_GB"):
        start(entry(tmp_path))
    monkeypatch.delenv("DYN_KVBM_CPU_CACHE_GB")
    with pytest.raises(ConfigError, match="set DYN_KVBM_CPU_CACHE_GB"):
        start(entry(tmp_path))
