"""vLLM's tiering spec with the one part replaced that vLLM has for GPUs only: the copy to host memory."""

from __future__ import annotations

import time

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CopyWorker(OffloadingWorker):
    """Copies pages between a CPU's cache and rows of host memory, at once."""

    def __init__(
        self, kv_caches: CanonicalKVCaches, blocks_per_chunk: int, region: SharedOffloadRegion
    ) -> None:
        assert len(kv_caches.group_data_refs) == 1
        self._region, self._blocks_per_chunk = region, blocks_per_chunk
        self._pairs = []
        for entry in kv_caches.tensors:
            pages = entry.tensor.view(torch.int8).view(-1, entry.page_size_bytes)
            rows = region.create_next_worker_view(entry.page_size_bytes * blocks_per_chunk)
            self._pairs.append((pages, rows))
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        self._copy(job_id, src_spec, dst_spec, store=True)
        return True

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        self._copy(job_id, dst_spec, src_spec, store=False)
        return True

    def _copy(self, job_id: int, gpu: GPULoadStoreSpec, cpu: LoadStoreSpec, *, store: bool) -> None:
        assert isinstance(cpu, CPULoadStoreSpec)
        started = time.monotonic()
        skipped = gpu.block_indices[0] % self._blocks_per_chunk
        moved = 0
        for pages, rows in self._pairs:
            size = pages.shape[1]
            for count, block in enumerate(gpu.block_ids, skipped):
                chunk, part = divmod(count, self._blocks_per_chunk)
                place = rows[int(cpu.chunk_ids[chunk]), part * size : (part + 1) * size]
                page = pages[int(block)]
                place.copy_(page) if store else page.copy_(place)
                moved += size
        self._finished.append(TransferResult(job_id, True, moved, time.monotonic() - started))

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is ever on its way."""

    def shutdown(self) -> None:
        self._pairs.clear()
        self._region.cleanup()


class CpuTieringSpec(TieringOffloadingSpec):
    """`TieringOffloadingSpec` whose worker runs on a CPU; all else is vLLM's own."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._worker is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=0,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = CopyWorker(kv_caches, self.blocks_per_chunk, region)
        return self._worker
