"""What the scheduler's side tells the worker's side in every step, and the other way round."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from dynamo_kvtc.pipeline.events import TierEvent

__all__ = ["KvtcConnectorMetadata", "KvtcWorkerMetadata", "LoadJob", "SaveJob"]


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Onboard a run of whole tier blocks of one request.

    Attributes
    ----------
    first_block : int
        Index in the request of the run's first block.
    block_ids : tuple[int, ...]
        -1 for blocks that vLLM has already.
    layerwise : bool
        The step that carries this job waits for it layer by layer; otherwise the request waits for all of it.
    """

    req_id: str
    first_block: int
    hashes: tuple[bytes, ...]
    block_ids: tuple[int, ...]
    salt: bytes
    layerwise: bool
    priority: int = 0


@dataclass(frozen=True, slots=True)
class SaveJob:
    """Offload a run of whole tier blocks of one request; their KV is complete after this step."""

    req_id: str
    first_block: int
    hashes: tuple[bytes, ...]
    block_ids: tuple[int, ...]
    salt: bytes
    num_tokens: int
    priority: int = 0


@dataclass
class KvtcConnectorMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """Jobs of one step.

    Attributes
    ----------
    preempted : set[str]
        Requests whose blocks are about to be reused.
    finishing : set[str]
        Finished requests whose blocks vLLM keeps until the worker reports that they are copied out.
    failures_seen : int
        How many failed layer-wise loads the scheduler knows of and has rolled back.
    computes : bool
        Whether the step computes anything, or only waits.
    prefill_tokens : int
        Prompt tokens that the step computes, if it computes nothing else and has no part in loads.
    """

    loads: list[LoadJob] = field(default_factory=list)
    saves: list[SaveJob] = field(default_factory=list)
    preempted: set[str] = field(default_factory=set)
    finishing: set[str] = field(default_factory=set)
    failures_seen: int = 0
    computes: bool = False
    prefill_tokens: int = 0


@dataclass
class KvtcWorkerMetadata(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What happened in the worker since the last step.

    Attributes
    ----------
    pending : int
        Offload calls under way; counted only where KV events are on.
    failures : int
        Failed layer-wise loads since the start.
    copied : dict[str, int]
        For requests of which more was copied out since the last report: how many of their save jobs need
        their blocks no more.
    events : tuple[TierEvent, ...]
        In the order in which they happened; complete when nothing is pending.
    """

    pending: int = 0
    failures: int = 0
    copied: dict[str, int] = field(default_factory=dict)
    events: tuple[TierEvent, ...] = ()

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Join what two workers report (one worker at present)."""
        assert isinstance(other, KvtcWorkerMetadata)
        return KvtcWorkerMetadata(
            self.pending + other.pending,
            max(self.failures, other.failures),
            {**self.copied, **other.copied},
            self.events + other.events,
        )
