"""What the tiers gained and lost, as vLLM's KV events, for routers that look for the worker with a prefix."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_events import (
    MEDIUM_CPU,
    MEDIUM_STORAGE,
    BlockRemoved,
    BlockStored,
    KVCacheEvent,
)
from vllm.v1.core.kv_cache_utils import (
    generate_block_hash_extra_keys,
    maybe_convert_block_hash,
    to_event_extra_keys,
)
from vllm.v1.request import Request

from dynamo_kvtc.pipeline.events import TierEvent

__all__ = ["EventTranslator"]

#: Tier blocks whose tokens are remembered: one or two KiB each.
_MOST_DESCRIBED = 16_384


@dataclass(frozen=True, slots=True)
class _Described:
    """What vLLM's events say of one tier block."""

    hashes: tuple[bytes, ...]
    parent: bytes | None
    tokens: array[int]
    extra_keys: tuple[tuple[Any, ...] | None, ...]
    lora_id: int | None
    lora_name: str | None


class EventTranslator:
    """Remembers what requests said about their tier blocks, and makes events of it.

    Parameters
    ----------
    block_size, tier_block_tokens : int
        Tokens of a block, and of a tier block. An event names the blocks of one tier block.
    """

    def __init__(self, block_size: int, tier_block_tokens: int, *, limit: int = _MOST_DESCRIBED) -> None:
        self._block_size, self._tokens, self._limit = block_size, tier_block_tokens, limit
        self._step = tier_block_tokens // block_size
        self._described: OrderedDict[bytes, _Described] = OrderedDict()
        self._events: list[KVCacheEvent] = []

    def describe(self, request: Request, tier_blocks: range) -> None:
        """Remember these tier blocks of a request; their hashes are known."""
        for index in tier_blocks:
            last = request.block_hashes[(index + 1) * self._step - 1]
            if last in self._described:
                self._described.move_to_end(last)
                continue
            self._described[last] = self._describe(request, index)
            if len(self._described) > self._limit:
                self._described.popitem(last=False)

    def _describe(self, request: Request, index: int) -> _Described:
        first = index * self._step
        start = index * self._tokens
        extra_keys = []
        for block in range(first, first + self._step):
            begin = block * self._block_size
            keys, _ = generate_block_hash_extra_keys(request, begin, begin + self._block_size, 0)
            extra_keys.append(keys)
        lora = request.lora_request
        return _Described(
            tuple(request.block_hashes[first : first + self._step]),
            request.block_hashes[first - 1] if first else None,
            array("I", request.all_token_ids[start : start + self._tokens]),
            tuple(extra_keys),
            None if lora is None else lora.adapter_id,
            None if lora is None else lora.lora_name,
        )

    def add(self, events: Iterable[TierEvent]) -> None:
        """Translate events of the tiers; of tier blocks that are not remembered nothing can be said."""
        for event in events:
            described = self._described.get(event.sequence_hash)
            if described is None:
                continue
            medium = MEDIUM_CPU if event.tier.startswith("host") else MEDIUM_STORAGE
            hashes = _external(described.hashes)
            if not event.stored:
                self._events.append(BlockRemoved(block_hashes=hashes, medium=medium, group_idx=0))
                continue
            parent = None if described.parent is None else _external([described.parent])[0]
            self._events.append(
                BlockStored(
                    block_hashes=hashes,
                    parent_block_hash=parent,
                    token_ids=described.tokens.tolist(),
                    block_size=self._block_size,
                    lora_id=described.lora_id,
                    medium=medium,
                    lora_name=described.lora_name,
                    extra_keys=to_event_extra_keys(described.extra_keys),
                    group_idx=0,
                )
            )

    def take(self) -> list[KVCacheEvent]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events


def _external(hashes: Sequence[bytes]) -> list[Any]:
    return [maybe_convert_block_hash(one) for one in hashes]
