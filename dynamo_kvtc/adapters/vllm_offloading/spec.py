"""`KvtcOffloadingSpec`: vLLM's OffloadingConnector straight in front of compressed tiers."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    Medium,
    OffloadingManager,
    OffloadingMetricMetadata,
    OffloadingSpec,
    OffloadingWorker,
)
from vllm.v1.kv_offload.config import OffloadingConfig

from dynamo_kvtc.adapters.vllm_offloading.manager import KvtcOffloadingManager
from dynamo_kvtc.adapters.vllm_offloading.metrics import metric_definitions
from dynamo_kvtc.adapters.vllm_offloading.settings import (
    ModelCache,
    check_layout,
    model_cache,
    page_places,
    read_config,
)
from dynamo_kvtc.adapters.vllm_offloading.shared import SharedTiers, find_shared, publish_shared
from dynamo_kvtc.adapters.vllm_offloading.worker import KvtcOffloadingWorker
from dynamo_kvtc.config.units import parse_size
from dynamo_kvtc.errors import ConfigError, LayoutError
from dynamo_kvtc.pipeline.assemble import offload_policy, open_adapter
from dynamo_kvtc.pipeline.chunk_store import ChunkStore
from dynamo_kvtc.pipeline.load_buffer import open_load_buffer
from dynamo_kvtc.pipeline.permuted import PermutedKvCache
from dynamo_kvtc.pipeline.threaded import ThreadedTierAdapter

__all__ = ["KvtcOffloadingSpec"]

_OPEN_TIMEOUT_S = 300.0

#: Streams are taken to be no smaller than this part of their KV.
_MOST_RATIO = 256


class KvtcOffloadingSpec(OffloadingSpec):  # type: ignore[misc]  # untyped where vLLM is not installed
    """Encodes at the engine's cache; host memory and disk hold compressed objects.

    Settings in ``kv_connector_extra_config``: ``config`` and ``attention_backend`` as for `KvtcTier`, and
    ``load_buffer``, bytes of host memory in which promised chunks wait to be loaded (default 1GiB).

    Raises
    ------
    ConfigError, LayoutError, ArtifactError, RopeError
        If this cache cannot be served; vLLM does not start then.
    """

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        """Return the definitions of the metrics."""
        return metric_definitions()

    def __init__(self, config: OffloadingConfig) -> None:
        super().__init__(config)
        check_layout(self)
        tokens = config.groups[0].tokens_per_block * config.cache.blocks_per_chunk
        self._settings = read_config(self.extra_config.get("config"), tokens)
        try:
            self._buffer_bytes = parse_size(self.extra_config.get("load_buffer", "1GiB"))
        except ValueError as error:
            raise ConfigError(f"kv_connector_extra_config: load_buffer: {error}") from error
        self._manager: KvtcOffloadingManager | None = None
        self._worker: KvtcOffloadingWorker | None = None

    def get_manager(self) -> OffloadingManager:
        """Return the scheduler's side; the worker's side of the same process comes first."""
        if self._manager is None:
            shared = find_shared(self.config.engine_id)
            events = self.kv_events_config.enable_kv_cache_events
            medium = Medium.CPU if self._settings.tiers[0].kind == "host" else Medium.STORAGE
            self._manager = KvtcOffloadingManager(shared, medium=medium, events=events)
        return self._manager

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """Open the tiers for these caches and return the worker's side."""
        if self._worker is None:
            self._worker = KvtcOffloadingWorker(self._open(kv_caches))
        return self._worker

    def _open(self, kv_caches: CanonicalKVCaches) -> SharedTiers:
        settings = self._settings
        model = model_cache(self, needs_rope=settings.codec.profile != "raw")
        cache = self._engine_cache(kv_caches, model)
        chunk_bytes = model.chunk_tokens * model.geometry.token_bytes
        if self._buffer_bytes < chunk_bytes:
            raise ConfigError(f"load_buffer must hold at least one chunk of {chunk_bytes} bytes")
        adapter = ThreadedTierAdapter(
            lambda: open_adapter(settings, model.geometry, model.block_size, model.rope, device=cache.device),
            timeout_s=_OPEN_TIMEOUT_S,
        )
        try:
            buffer = open_load_buffer(adapter, cache, self._buffer_bytes, chunk_bytes, salt=model.salt)
        except BaseException:
            adapter.close()
            raise
        store = ChunkStore(
            adapter,
            cache,
            salt=model.salt,
            # What is on its way has its room in the buffer already.
            max_pending=self._buffer_bytes // chunk_bytes * _MOST_RATIO,
            load_timeout_s=settings.pipeline.onboard_timeout,
            fill=buffer.fill,
        )
        policy = offload_policy(settings)
        shared = SharedTiers(adapter, cache, buffer, store, policy, model.salt, model.blocks_per_chunk)
        publish_shared(self.config.engine_id, shared)
        return shared

    def _engine_cache(self, kv_caches: CanonicalKVCaches, model: ModelCache) -> PermutedKvCache:
        geometry = model.geometry
        page_bytes = model.block_size * geometry.token_bytes // geometry.num_layers
        refs = kv_caches.group_data_refs
        if (
            len(refs) != 1
            or len(refs[0]) != geometry.num_layers
            or len({ref.tensor_idx for ref in refs[0]}) != geometry.num_layers
            or any(ref.page_size_bytes != page_bytes for ref in refs[0])
            or any(tensor.page_size_bytes != page_bytes for tensor in kv_caches.tensors)
        ):
            raise LayoutError("vLLM's cache is not one page per layer and block; not supported")
        pages: dict[int, torch.Tensor] = {}
        for layer, ref in zip(model.layer_order, refs[0], strict=True):
            tensor = kv_caches.tensors[ref.tensor_idx].tensor
            pages[layer] = tensor.view(torch.int8).view(-1, page_bytes).view(geometry.torch_dtype)
        places = page_places(model, self.extra_config.get("attention_backend"), blocks=1)
        return PermutedKvCache([pages[layer] for layer in range(geometry.num_layers)], *places)
