"""vLLM as a host: a KV connector in front of `pipeline.TierAdapter`.

Named in vLLM's ``--kv-transfer-config`` as ``"kv_connector": "KvtcConnector"`` with
``"kv_connector_module_path": "dynamo_kvtc.adapters.vllm"``; see docs/vllm.md.

Owns: the translation of vLLM's hooks, block hashes and cache layouts. Does not own: anything that moves,
encodes or keeps bytes. The scheduler's side (`scheduler`) decides what to load and save; the worker's side
(`worker`) owns the tiers and does it. The two talk through vLLM's step metadata (`metadata`) and, for
lookups, through `pipeline.lookup_service`.
"""

from dynamo_kvtc.adapters.vllm.versions import require_vllm

require_vllm()

from dynamo_kvtc.adapters.vllm.connector import KvtcConnector  # noqa: E402 (the check comes first)

__all__ = ["KvtcConnector"]
