"""The class that vLLM's ``kv_connector`` names: every hook, passed on to the side that it belongs to."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_events import KVCacheEvent
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.forward_context import ForwardContext
from vllm.v1.attention.backend import AttentionMetadata
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from dynamo_kvtc.adapters.vllm.metadata import KvtcConnectorMetadata, KvtcWorkerMetadata
from dynamo_kvtc.adapters.vllm.scheduler import KvtcScheduler
from dynamo_kvtc.adapters.vllm.settings import read_settings
from dynamo_kvtc.adapters.vllm.stats import KvtcConnectorStats, KvtcPromMetrics
from dynamo_kvtc.adapters.vllm.worker import KvtcWorker

__all__ = ["KvtcConnector"]


class KvtcConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Serves prefixes from compressed tiers and offloads to them. See docs/vllm.md."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        settings = read_settings(vllm_config, kv_cache_config)
        self._scheduler: KvtcScheduler | None = None
        self._worker: KvtcWorker | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = KvtcScheduler(settings)
        else:
            self._worker = KvtcWorker(settings, vllm_config, kv_cache_config)

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is dropped is a later miss, no more."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Waiting for single layers needs Python between them."""
        return extra_config.get("load") == "layerwise"

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Any layout will do."""
        return None

    def shutdown(self) -> None:
        """Release everything."""
        if self._worker is not None:
            self._worker.shutdown()
        if self._scheduler is not None:
            self._scheduler.shutdown()

    # --- worker ------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """See `KvtcWorker.register_kv_caches`."""
        self._worker_side.register_kv_caches(kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Take in what the scheduler says of this step, which begins now."""
        super().bind_connector_metadata(connector_metadata)
        self._worker_side.begin_step(self._metadata)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """See `KvtcWorker.handle_preemptions`."""
        assert isinstance(kv_connector_metadata, KvtcConnectorMetadata)
        self._worker_side.handle_preemptions(kv_connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """See `KvtcWorker.start_load_kv`."""
        self._worker_side.start_load_kv(self._metadata)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """See `KvtcWorker.wait_for_layer_load`."""
        self._worker_side.wait_for_layer_load(layer_name)

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Do nothing: tier blocks hold all layers and are saved after the last one."""

    def wait_for_save(self) -> None:
        """See `KvtcWorker.wait_for_save`."""
        self._worker_side.wait_for_save(self._metadata)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """See `KvtcWorker.get_finished`."""
        return self._worker_side.get_finished(finished_req_ids)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return blocks whose load failed."""
        return self._worker_side.take_failed_blocks()

    def build_connector_worker_meta(self) -> KvtcWorkerMetadata | None:
        """See `KvtcWorker.report`."""
        return self._worker_side.report()

    def get_kv_connector_stats(self) -> KvtcConnectorStats | None:
        """Return what this side has counted since the last call."""
        side = self._worker or self._scheduler
        return side.stats() if side is not None else None

    # --- scheduler ---------------------------------------------------------------------------------

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """See `KvtcScheduler.get_num_new_matched_tokens`."""
        return self._scheduler_side.get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """See `KvtcScheduler.update_state_after_alloc`."""
        self._scheduler_side.update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """See `KvtcScheduler.build_connector_meta`."""
        return self._scheduler_side.build_connector_meta(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """See `KvtcScheduler.update_connector_output`."""
        self._scheduler_side.update_connector_output(connector_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """See `KvtcScheduler.request_finished`."""
        return self._scheduler_side.request_finished(request), None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See `KvtcScheduler.request_finished`; there is only one group."""
        return self._scheduler_side.request_finished(request), None

    def has_pending_push_work(self) -> bool:
        """See `KvtcScheduler.has_pending_push_work`."""
        return self._scheduler_side.has_pending_push_work()

    def take_events(self) -> list[KVCacheEvent]:
        """See `KvtcScheduler.take_events`."""
        return self._scheduler_side.take_events()

    def reset_cache(self) -> bool | None:
        """See `KvtcScheduler.reset_cache`."""
        return self._scheduler_side.reset_cache()

    # --- metrics -----------------------------------------------------------------------------------

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KvtcConnectorStats:
        """Make statistics of what another process has sent."""
        return KvtcConnectorStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KvtcPromMetrics:
        """Register the counters ``vllm:kvtc_…``."""
        return KvtcPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # --- helpers -----------------------------------------------------------------------------------

    @property
    def _metadata(self) -> KvtcConnectorMetadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, KvtcConnectorMetadata)
        return metadata

    @property
    def _worker_side(self) -> KvtcWorker:
        assert self._worker is not None, "a worker's hook was called on the scheduler's connector"
        return self._worker

    @property
    def _scheduler_side(self) -> KvtcScheduler:
        assert self._scheduler is not None, "a scheduler's hook was called on the worker's connector"
        return self._scheduler


# MultiConnector looks up the classes of what its children report by name.
if KvtcConnector.__name__ not in KVConnectorFactory._registry:
    KVConnectorFactory.register_connector(
        KvtcConnector.__name__, "dynamo_kvtc.adapters.vllm", KvtcConnector.__name__
    )
