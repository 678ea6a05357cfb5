"""vLLM's real TieringOffloadingManager with our tier below it, driven as its connector drives it."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from cpu_tiering import CpuTieringSpec
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
    LookupResult,
    OffloadingSpec,
    OffloadKey,
    ReqContext,
    ScheduleEndContext,
    make_offload_key,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)

from dynamo_kvtc.adapters.vllm_offloading import KvtcOffloadingSpec

LAYERS, HEADS, HEAD_SIZE, BLOCK = 3, 2, 32, 32
DTYPE = torch.float32
BLOCKS_PER_CHUNK = 2
CHUNK = BLOCK * BLOCKS_PER_CHUNK
BLOCKS = 64
BLOCK_BYTES = 2 * LAYERS * HEADS * HEAD_SIZE * BLOCK * DTYPE.itemsize


def write_model(folder: Path, **changes: Any) -> Path:
    """Write the configuration of a model of this shape; there are no weights."""
    folder.mkdir(exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": HEADS,
        "hidden_size": 4 * HEAD_SIZE,
        "head_dim": HEAD_SIZE,
        "intermediate_size": 64,
        "vocab_size": 128,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_config(folder: Path, **changes: Any) -> Path:
    """Write a configuration of ours with one disk tier."""
    path = folder / "kvtc.yaml"
    config = {
        "codec": {"profile": "raw"},
        "tiers": [{"kind": "disk", "path": str(folder / "disk"), "capacity": "256MiB"}],
        "transfer": {"staging": "16MiB"},
        **changes,
    }
    path.write_text(json.dumps(config))
    return path


def offloading_config(model: Path, tier: dict[str, Any], **changes: Any) -> OffloadingConfig:
    """Return what vLLM would make of its settings for this model."""
    settings: dict[str, Any] = {
        "groups": (
            OffloadingGroupConfig(BLOCK, tuple(f"model.layers.{n}.self_attn.attn" for n in range(LAYERS)), 0),
        ),
        "worker_kv_bytes_per_block": BLOCK_BYTES,
        "enable_kv_cache_events": True,
        "extra_config": {
            "cpu_bytes_to_use": 16 * BLOCKS_PER_CHUNK * BLOCK_BYTES,
            "secondary_tiers": [
                {"type": "KvtcTier", "module_path": "dynamo_kvtc.adapters.vllm_offloading", **tier}
            ],
        },
        "engine_id": f"test-{uuid.uuid4().hex}",
        "model": OffloadingModelConfig(str(model), "float32"),
        "cache": OffloadingCacheConfig(BLOCK, BLOCKS_PER_CHUNK),
        "parallel": OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, True),
        "kv_cache_layout": "LBHNC",
        **changes,
    }
    return OffloadingConfig(**settings)


class Host:
    """A scheduler and a worker around one paged cache of a CPU."""

    def __init__(self, config: OffloadingConfig) -> None:
        ours = config.extra_config.get("spec_name") == "KvtcOffloadingSpec"
        self.spec: OffloadingSpec = (KvtcOffloadingSpec if ours else CpuTieringSpec)(config)
        if not ours:  # as vLLM's order does not matter to it, the one that refuses first
            self.manager = self.spec.get_manager()
            (self.tier,) = self.manager.secondary_tiers
        self.layers = [torch.zeros((BLOCKS, HEADS, BLOCK, 2 * HEAD_SIZE), dtype=DTYPE) for _ in range(LAYERS)]
        page = BLOCK_BYTES // LAYERS
        tensors = [
            CanonicalKVCacheTensor(layer.view(torch.int8).view(BLOCKS, page), page) for layer in self.layers
        ]
        refs = [CanonicalKVCacheRef(index, page) for index in range(LAYERS)]
        self.worker = self.spec.get_worker(CanonicalKVCaches(tensors, [refs]))
        self.manager = self.spec.get_manager()
        self._jobs = 0

    def fill(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers:
            layer.copy_(torch.randn(layer.shape, generator=generator))

    def request(
        self, name: str, chunks: int, *, positions: bool = True
    ) -> tuple[ReqContext, list[OffloadKey]]:
        """Begin a request whose prompt has some whole chunks; `name` before ``/`` is what the text is."""
        context = ReqContext(name)
        keys = []
        for index in range(chunks):
            key = make_offload_key(hashlib.sha256(f"{name.split('/')[0]}:{index}".encode()).digest(), 0)
            keys.append(key)
            if positions:
                context.set_offload_key_position(key, (index + 1) * CHUNK)
        self.manager.on_new_request(context)
        return context, keys

    def store(self, context: ReqContext, keys: Sequence[OffloadKey], first_block: int = 0) -> None:
        """Store chunks whose blocks lie one after the other in the cache."""
        output = self.manager.prepare_store(keys, context)
        assert output is not None
        if output.keys_to_store:
            wanted = [index for index, key in enumerate(keys) if key in output.keys_to_store]
            blocks = [
                first_block + index * BLOCKS_PER_CHUNK + part
                for index in wanted
                for part in range(BLOCKS_PER_CHUNK)
            ]
            self._jobs += 1
            first = wanted[0] * BLOCKS_PER_CHUNK
            source = GPULoadStoreSpec(blocks, group_sizes=[len(blocks)], block_indices=[first])
            self.worker.submit_store(self._jobs, source, output.store_spec)
            self.finish()
            self.manager.complete_store(set(output.keys_to_store), context)

    def finish(self) -> None:
        """Wait for the worker's job, as vLLM does from step to step."""
        deadline = time.monotonic() + 60
        while not (results := self.worker.get_finished()):
            assert time.monotonic() < deadline, "a job of the worker does not end"
            time.sleep(0.002)
        assert [(result.job_id, result.success) for result in results] == [(self._jobs, True)]

    def step(self) -> None:
        self.manager.on_schedule_end(ScheduleEndContext((), ()))

    def settle(self) -> None:
        """Step until nothing is on its way."""
        deadline = time.monotonic() + 60
        self.step()
        while self.manager.has_pending_work():
            assert time.monotonic() < deadline, "jobs do not end"
            time.sleep(0.002)
            self.step()

    def lookup(self, context: ReqContext, keys: Sequence[OffloadKey]) -> int:
        """Look up chunks in order, waiting for promotions; return how many leading ones are ready."""
        while any(self.manager.lookup(key, context) is LookupResult.HIT_PENDING for key in keys):
            self.settle()
        results = [self.manager.lookup(key, context) for key in keys]
        hits = [result is LookupResult.HIT for result in results]
        return hits.index(False) if False in hits else len(hits)

    def load(self, context: ReqContext, keys: Sequence[OffloadKey], first_block: int, skip: int = 0) -> None:
        """Load chunks, but for their first `skip` blocks, which vLLM has already."""
        spec = self.manager.prepare_load(keys, context)
        count = len(keys) * BLOCKS_PER_CHUNK
        blocks = list(range(first_block, first_block + count))
        self._jobs += 1
        blocks = blocks[skip:]
        destination = GPULoadStoreSpec(blocks, group_sizes=[len(blocks)], block_indices=[skip])
        self.worker.submit_load(self._jobs, spec, destination)
        self.finish()
        self.manager.complete_load(keys, context)

    def forget_primary(self) -> None:
        """Empty vLLM's own host memory, as if other requests had pushed everything out."""
        self.manager.reset_cache()

    def close(self) -> None:
        self.worker.shutdown()
        self.manager.shutdown()


@contextmanager
def open_host(config: OffloadingConfig) -> Iterator[Host]:
    host = None
    try:
        host = Host(config)
        yield host
    finally:
        if host is not None:
            host.close()
        with suppress(FileNotFoundError):
            Path(f"/dev/shm/vllm_offload_{config.engine_id}.mmap").unlink()
