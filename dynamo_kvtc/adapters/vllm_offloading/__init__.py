"""vLLM's native offloading as a host, in two ways; see docs/vllm-offloading.md.

`KvtcTier` is a secondary tier below vLLM's own `TieringOffloadingSpec` (``"type": "KvtcTier"``,
``"module_path": "dynamo_kvtc.adapters.vllm_offloading"``): rows of host memory in, compressed objects out.
`KvtcOffloadingSpec` stands in that spec's place (``"spec_name"`` and ``"spec_module_path"``): what leaves the
engine's cache is compressed at once.

Owns: the translation of vLLM's jobs, keys, pages and rows. Does not own: anything that moves,
encodes or keeps bytes; that is `pipeline.chunk_store` and what lies below it.
"""

from dynamo_kvtc.adapters.vllm.versions import require_vllm

require_vllm()

from dynamo_kvtc.adapters.vllm_offloading.spec import KvtcOffloadingSpec  # noqa: E402
from dynamo_kvtc.adapters.vllm_offloading.tier import KvtcTier  # noqa: E402 (the check comes first)

__all__ = ["KvtcOffloadingSpec", "KvtcTier"]
