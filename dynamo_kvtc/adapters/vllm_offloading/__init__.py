"""vLLM's native offloading as a host: a compressed secondary tier for its `TieringOffloadingSpec`.

Named in vLLM's ``--kv-transfer-config``, inside ``secondary_tiers``, as ``"type": "KvtcTier"`` with
``"module_path": "dynamo_kvtc.adapters.vllm_offloading"``; see docs/vllm-offloading.md.

Owns: the translation of vLLM's jobs, keys and rows of host memory. Does not own: anything that moves,
encodes or keeps bytes; that is `pipeline.chunk_store` and what lies below it.
"""

from dynamo_kvtc.adapters.vllm.versions import require_vllm

require_vllm()

from dynamo_kvtc.adapters.vllm_offloading.tier import KvtcTier  # noqa: E402 (the check comes first)

__all__ = ["KvtcTier"]
