"""KVBM's vLLM connector with our tiers behind it.

KVBM keeps its own books and its raw pool in host memory, the hot tier. Our part is the vLLM adapter of this
package, whole: it is asked for what follows KVBM's match, and both take what vLLM computes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvbm.vllm_integration.connector import DynamoConnector as KvbmConnector
from kvbm.vllm_integration.connector import DynamoConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from dynamo_kvtc.adapters.kvbm.joined import JoinedTransfers
from dynamo_kvtc.adapters.kvbm.settings import KvbmSettings, memory_limit, reconcile
from dynamo_kvtc.adapters.vllm import KvtcConnector
from dynamo_kvtc.adapters.vllm.settings import ConnectorSettings, read_settings
from dynamo_kvtc.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

__all__ = ["DynamoConnector", "KvbmTierMetadata"]

_log = logging.getLogger(__name__)


class KvbmTierMetadata(DynamoConnectorMetadata):  # type: ignore[misc]
    """What the scheduler tells the worker: KVBM's bytes, ours, and which transfers both make.

    Attributes
    ----------
    tier : KVConnectorMetadata
        Of our connector.
    loads, saves : set of str
        Requests whose loads, or saves, end when both parties have reported them.
    """

    def __init__(self, kvbm: bytes, tier: KVConnectorMetadata, loads: set[str], saves: set[str]) -> None:
        super().__init__(kvbm)
        self.tier, self.loads, self.saves = tier, loads, saves


@dataclass(slots=True)
class _Match:
    """What was found for a request, in tokens: `hot` of KVBM's from `computed` on, then ours."""

    computed: int
    hot: int
    loads_async: bool


def _to_tier(name: str) -> Callable[..., Any]:
    """Return a method that is our connector's alone."""

    def method(self: DynamoConnector, *arguments: Any, **named: Any) -> Any:
        return getattr(self._tier, name)(*arguments, **named)

    method.__name__ = name
    return method


def _to_tier_class(name: str) -> Any:
    def method(cls: type[DynamoConnector], *arguments: Any, **named: Any) -> Any:
        return getattr(KvtcConnector, name)(*arguments, **named)

    method.__name__ = name
    return classmethod(method)


class DynamoConnector(KvbmConnector, SupportsHMA):  # type: ignore[misc]
    """KVBM's connector, under its own name so that Dynamo and `PdConnector` know it, with our tiers.

    Parameters
    ----------
    vllm_config : VllmConfig
        ``kv_connector_extra_config`` names our configuration under ``config``, as for our vLLM connector.

    Raises
    ------
    ConfigError
        If KVBM's environment variables contradict the configuration.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        role: KVConnectorRole,
        kv_cache_config: KVCacheConfig,
    ) -> None:
        # Before KVBM takes its memory.
        _check(vllm_config, read_settings(vllm_config, kv_cache_config))
        super().__init__(vllm_config, role, kv_cache_config)
        self._tier = KvtcConnector(vllm_config, role, kv_cache_config)
        self._block_size = vllm_config.cache_config.block_size
        self._matches: dict[str, _Match] = {}
        self._staged_at: dict[str, int] = {}
        self._scheduled: set[str] = set()
        self._joined_loads: set[str] = set()
        self._joined_saves: set[str] = set()
        self._loads, self._saves = JoinedTransfers(), JoinedTransfers()

    @property
    def requires_kv_delivery(self) -> bool:
        """Both are caches: a save that is dropped is a later miss."""
        return False

    # --- scheduler --------------------------------------------------------------------------------

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Return KVBM's match and ours beyond it.

        Ours is asked first: it may have to look again, and KVBM's match must not wait for it, staged, while
        the engine's own cache grows.
        """
        found, loads_async = self._tier.get_num_new_matched_tokens(request, num_computed_tokens)
        if found is None:
            return None, False
        hot = self._hot_tokens(request, num_computed_tokens)
        if hot is None:
            return None, False
        if hot:
            found, ours_async = self._tier.get_num_new_matched_tokens(request, num_computed_tokens + hot)
            # KVBM loads between steps; a load inside one cannot go on from there.
            found = found if found and ours_async else 0
            loads_async = True
        self._matches[request.request_id] = _Match(num_computed_tokens, hot, loads_async)
        return hot + found, loads_async and hot + found > 0

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Give each party its part of the blocks to load into."""
        match = self._matches.pop(request.request_id, None)
        hot = match.hot if match is not None and num_external_tokens else 0
        ours = num_external_tokens - hot
        self._tier.update_state_after_alloc(request, blocks, ours)
        if match is not None and ours:
            if not hot and match.loads_async:
                return  # vLLM comes again when the blocks are loaded; to KVBM they are computed ones then
            if hot:
                # KVBM takes the last of the blocks as its own to fill.
                end = (match.computed + hot) // self._block_size
                blocks = type(blocks)(tuple(group[:end] for group in blocks.blocks))
                self._joined_loads.add(request.request_id)
        if hot:
            self._staged_at.pop(request.request_id, None)
        super().update_state_after_alloc(request, blocks, hot)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Return what the worker must know of this step."""
        self._scheduled.update(scheduler_output.num_scheduled_tokens)
        kvbm = super().build_connector_meta(scheduler_output)
        tier = self._tier.build_connector_meta(scheduler_output)
        loads, self._joined_loads = self._joined_loads, set()
        saves, self._joined_saves = self._joined_saves, set()
        return KvbmTierMetadata(kvbm.metadata, tier, loads, saves)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Tell both; the blocks are free when both have reported their saves."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished`. Models with one group of layers only, as KVBM itself."""
        self._matches.pop(request.request_id, None)
        self._staged_at.pop(request.request_id, None)
        kvbm_saves, _ = super().request_finished(request, block_ids[0])
        # KVBM always says yes. Of a request that never ran its worker knows nothing, and reports nothing.
        kvbm_saves = kvbm_saves and request.request_id in self._scheduled
        self._scheduled.discard(request.request_id)
        tier_saves, parameters = self._tier.request_finished_all_groups(request, block_ids)
        if kvbm_saves and tier_saves:
            self._joined_saves.add(request.request_id)
        return kvbm_saves or tier_saves, parameters

    def reset_cache(self) -> bool | None:
        """Empty KVBM's pools and our tiers."""
        results = (super().reset_cache(), self._tier.reset_cache())
        return all(result is not False for result in results)

    on_new_request = _to_tier("on_new_request")
    update_connector_output = _to_tier("update_connector_output")
    bind_kv_cache_manager = _to_tier("bind_kv_cache_manager")
    bind_gpu_block_pool = _to_tier("bind_gpu_block_pool")
    has_pending_block_frees = _to_tier("has_pending_block_frees")
    has_pending_push_work = _to_tier("has_pending_push_work")
    take_events = _to_tier("take_events")

    # --- worker -----------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Show the paged cache to both."""
        super().register_kv_caches(kv_caches)
        self._tier.register_kv_caches(kv_caches)

    def bind_connector_metadata(self, connector_metadata: KvbmTierMetadata) -> None:
        """Take what the scheduler says of this step."""
        super().bind_connector_metadata(connector_metadata)
        self._tier.bind_connector_metadata(connector_metadata.tier)
        self._loads.expect(connector_metadata.loads)
        self._saves.expect(connector_metadata.saves)

    def clear_connector_metadata(self) -> None:
        """Forget it."""
        super().clear_connector_metadata()
        self._tier.clear_connector_metadata()

    def handle_preemptions(self, kv_connector_metadata: KvbmTierMetadata) -> None:
        """Tell our connector of preempted requests; KVBM takes them from its own metadata."""
        self._tier.handle_preemptions(kv_connector_metadata.tier)

    def start_load_kv(self, forward_context: Any, **named: Any) -> None:
        """Begin loads."""
        super().start_load_kv(forward_context, **named)
        self._tier.start_load_kv(forward_context, **named)

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **named: Any
    ) -> None:
        """Tell both that a layer is computed."""
        super().save_kv_layer(layer_name, kv_layer, attn_metadata, **named)
        self._tier.save_kv_layer(layer_name, kv_layer, attn_metadata, **named)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """As `get_transfer_results`, for callers that know no failures."""
        results = self.get_transfer_results(finished_req_ids)
        return results.finished_sending or None, results.finished_recving or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Return requests whose saves or loads have ended for all who made them."""
        sent, received = super().get_finished(finished_req_ids)
        ours = self._tier.get_transfer_results(finished_req_ids)
        return KVConnectorTransferResults(
            finished_sending=self._saves.report(sent or (), ours.finished_sending),
            finished_recving=self._loads.report(received or (), ours.finished_recving),
            failed_recving=set(ours.failed_recving),
        )

    wait_for_layer_load = _to_tier("wait_for_layer_load")
    wait_for_save = _to_tier("wait_for_save")
    get_block_ids_with_load_errors = _to_tier("get_block_ids_with_load_errors")
    build_connector_worker_meta = _to_tier("build_connector_worker_meta")
    get_kv_connector_stats = _to_tier("get_kv_connector_stats")
    get_kv_connector_kv_cache_events = _to_tier("get_kv_connector_kv_cache_events")
    set_host_xfer_buffer_ops = _to_tier("set_host_xfer_buffer_ops")
    finish_forward = _to_tier("finish_forward")
    reset_capture_state = _to_tier("reset_capture_state")
    shutdown = _to_tier("shutdown")

    # --- before there is a connector --------------------------------------------------------------

    get_required_kvcache_layout = _to_tier_class("get_required_kvcache_layout")
    requires_piecewise_for_cudagraph = _to_tier_class("requires_piecewise_for_cudagraph")
    build_kv_connector_stats = _to_tier_class("build_kv_connector_stats")
    build_prom_metrics = _to_tier_class("build_prom_metrics")

    def _hot_tokens(self, request: Request, num_computed_tokens: int) -> int | None:
        """Ask KVBM, once per place: it keeps a match staged, whatever the engine has computed since."""
        hot, _ = super().get_num_new_matched_tokens(request, num_computed_tokens)
        if not hot:
            return None if hot is None else 0
        staged_at = self._staged_at.setdefault(request.request_id, num_computed_tokens)
        if staged_at != num_computed_tokens:
            _log.debug("KVBM's match of %s begins elsewhere; left out", request.request_id)
            return 0
        return int(hot)


def _check(vllm_config: VllmConfig, settings: ConnectorSettings) -> None:
    reconcile(KvbmSettings.read(), settings.config, memory_limit())
    if settings.layerwise:
        raise ConfigError(
            'kv_connector_extra_config: set "load": "async"; with "layerwise" KVBM would store what a step '
            "computed on top of a load that failed"
        )
    if vllm_config.lora_config is not None:
        raise ConfigError(
            "kvbm fails on requests of LoRA adapters: serve them without KVBM, with kv_connector "
            "KvtcConnector and kv_connector_module_path dynamo_kvtc.adapters.vllm"
        )


# PdConnector looks up the classes of what its children report by name.
if DynamoConnector.__name__ not in KVConnectorFactory._registry:
    KVConnectorFactory.register_connector(
        DynamoConnector.__name__, "dynamo_kvtc.adapters.kvbm", DynamoConnector.__name__
    )
