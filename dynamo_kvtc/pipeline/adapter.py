"""`TierAdapter`: the one asynchronous object that every host adapter drives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from types import TracebackType
from typing import Any

from dynamo_kvtc.codec.base import KvCodec
from dynamo_kvtc.codec.bitstream import StreamHeader
from dynamo_kvtc.codec.paged_codec import PagedCodec
from dynamo_kvtc.errors import ArtifactMismatchError, TierClosedError
from dynamo_kvtc.observability import Counters, MetricsEndpoint
from dynamo_kvtc.pipeline.blocks import SequenceBlocks, split_tier_blocks, tier_keys
from dynamo_kvtc.pipeline.boundary import Boundaries, Boundary
from dynamo_kvtc.pipeline.choosing import Chooser
from dynamo_kvtc.pipeline.device_staging import DeviceStaging
from dynamo_kvtc.pipeline.encoders import Encoders
from dynamo_kvtc.pipeline.events import EventLog
from dynamo_kvtc.pipeline.handle import OnboardHandle
from dynamo_kvtc.pipeline.offload import Offloader
from dynamo_kvtc.pipeline.onboard import Onboarder, OnboardSettings
from dynamo_kvtc.pipeline.paged import PagedKvCache
from dynamo_kvtc.pipeline.pins import Pins
from dynamo_kvtc.pipeline.status import AdapterStatus
from dynamo_kvtc.pipeline.threads import single_threaded_pool
from dynamo_kvtc.pipeline.ticket import OffloadTicket
from dynamo_kvtc.policy import (
    RAW,
    CostPolicy,
    OffloadPolicy,
    Piece,
    PrefixDecision,
    Speeds,
    StorePolicy,
)
from dynamo_kvtc.tiers.base import Namespace, ReadRequest, TierKey
from dynamo_kvtc.tiers.stack import TierStack
from dynamo_kvtc.transfer.agent import TransferAgent
from dynamo_kvtc.transfer.staging import StagingPool

__all__ = ["AdapterStatus", "TierAdapter"]

_log = logging.getLogger(__name__)


class TierAdapter:
    """Looks up, offloads and onboards the blocks of an engine's sequences.

    Owns everything behind it (agent, staging memory, tiers, threads) and closes it. Belongs to the
    event loop it was made on; `ThreadedTierAdapter` serves hosts that are not asyncio.

    Parameters
    ----------
    codec : KvCodec
        Decodes, and encodes at the boundary between the engine and the first tier unless `encoders` do.
    artifact_id : bytes
        Part of every key; objects of another artifact are misses.
    block_size : int
        Tokens per block of the engine.
    salt : bytes
        Part of every key besides a request's own salt.
    queue_limit : int
        Tier blocks that may wait to be offloaded; more are dropped and counted.
    offload_batch : int
        Tier blocks gathered and encoded in one go.
    stores_at_once : int
        Tier blocks of such a batch that are stored side by side: of use where each waits for a remote store.
    decode_threads : int
        Threads that decode while onboarding, each on one core.
    store_timeout_s : float
        Deadline for storing one tier block.
    costs : CostPolicy, optional
        Decides by cost what is promised; by default with nothing but what is measured. What is stored, and
        with what, is decided with the same speeds and settings.
    encoders : Encoders, optional
        What may be encoded with, under the quality guard; `codec` decodes all of it. By default `codec`.
    device_codec : PagedCodec, optional
        Serves caches on its device in place of `codec`; its streams are the same.
    device_staging : DeviceStaging, optional
        Memory of that device, which stored bytes are read into where that can be.
    """

    def __init__(
        self,
        codec: KvCodec,
        artifact_id: bytes,
        agent: TransferAgent,
        staging: StagingPool,
        tiers: TierStack,
        policy: OffloadPolicy,
        block_size: int,
        *,
        salt: bytes = b"",
        onboard: OnboardSettings | None = None,
        queue_limit: int = 256,
        offload_batch: int = 4,
        stores_at_once: int = 1,
        decode_threads: int = 2,
        store_timeout_s: float = 30.0,
        costs: CostPolicy | None = None,
        encoders: Encoders | None = None,
        device_codec: PagedCodec | None = None,
        device_staging: DeviceStaging | None = None,
    ) -> None:
        policy.check_block_size(block_size)
        self.codec, self.policy, self.block_size, self.tiers = codec, policy, block_size, tiers
        self.counters = Counters()
        self.costs = costs or CostPolicy(Speeds())
        self.encoders = encoders or Encoders.single(codec)
        self._chooser = Chooser(
            self.encoders,
            StorePolicy(self.costs.speeds, self.costs.settings),
            tiers,
            self.counters,
            policy.tier_block_tokens,
        )
        self._pins = Pins(tiers)
        tiers.on_read = self.costs.speeds.read
        self.agent, self._staging = agent, staging
        self._artifact_id, self._salt = artifact_id, salt
        self._store_timeout_s = store_timeout_s
        # Threads of their own: offloading must not delay onboarding.
        self._offload_threads = ThreadPoolExecutor(2, thread_name_prefix="kvtc-encode")
        self.decode_threads = single_threaded_pool(decode_threads, "kvtc-decode")
        self.boundaries = Boundaries(codec, self.encoders, device_codec, device_staging)
        self._offloader = Offloader(
            self.encoders,
            self.boundaries,
            tiers,
            staging,
            policy,
            self.counters,
            self._offload_threads,
            queue_limit=queue_limit,
            batch=offload_batch,
            at_once=stores_at_once,
            timeout_s=store_timeout_s,
            speeds=self.costs.speeds,
        )
        self._onboarder = Onboarder(
            codec,
            self.boundaries,
            tiers,
            staging,
            policy,
            self.counters,
            self.decode_threads,
            onboard,
            self.costs.speeds,
            self.encoders,
        )
        self._onboards: set[OnboardHandle] = set()
        self._closing: list[Callable[[], Awaitable[None]]] = []
        self._queue_limit = queue_limit
        #: What the tiers gain and lose, once a host has asked for it.
        self.events: EventLog | None = None
        #: The HTTP endpoint, if one was opened.
        self.endpoint: MetricsEndpoint | None = None
        #: What blocks are encoded with, for the status.
        self.artifact: Mapping[str, Any] = {"id": artifact_id.hex()}
        self._closed = False

    def namespace(self, salt: bytes = b"") -> Namespace:
        """Return what the keys of sequences with this salt have in common."""
        geometry = self.codec.geometry
        layout = (
            f"layers={geometry.num_layers} kv_heads={geometry.num_kv_heads} head_size={geometry.head_size} "
            f"dtype={geometry.dtype} tier_block_tokens={self.policy.tier_block_tokens} "
            f"sinks={self.policy.sink_tokens} head_shard=0/1"
        )
        # The length in front keeps two pairs of salts with the same concatenation apart.
        return Namespace(self._artifact_id, layout, b"%d:%s%s" % (len(self._salt), self._salt, salt))

    def keys(self, hashes: Sequence[bytes], *, salt: bytes = b"") -> list[TierKey]:
        """Return the tier keys of a sequence's whole tier blocks, first to last."""
        return tier_keys(hashes, self.namespace(salt), self.block_size, self.policy.tier_block_tokens)

    async def lookup(self, hashes: Sequence[bytes], *, salt: bytes = b"", have_tokens: int = 0) -> int:
        """Return how many leading tokens of a sequence the tiers hold and are worth onboarding.

        Parameters
        ----------
        hashes : Sequence[bytes]
            Sequence hash of each whole block of the sequence, from the first on.
        have_tokens : int
            Leading tokens that the engine has: only what follows would be onboarded, and is decided about.

        Returns
        -------
        int
            A multiple of the policy's `tier_block_tokens`. A later `onboard` may still fail and say so.
        """
        self._check_open()
        keys = self.keys(hashes, salt=salt)
        tiers = await self.tiers.lookup_prefix(keys)
        found, step = len(tiers), self.policy.tier_block_tokens
        if self.events is not None:
            self.events.found(keys[:found], self._last_hashes(hashes)[:found])
        self.counters.looked_up(len(keys), found, len(hashes) * self.block_size, found * step)
        first = have_tokens // step
        if found <= first:
            return 0
        # A tier may lose an object meanwhile; onboarding says so then.
        raw_size = self.encoders.raw_bytes(step)
        pieces = []
        for key, tier in zip(keys[first:found], tiers[first:], strict=True):
            size = tier.size_of(key) or 0
            pieces.append(Piece(step, size, tier.name, RAW if size == raw_size else None))
        self.costs.speeds.found([tier.name for tier in tiers])
        decision = self.costs.prefix(pieces)
        self.counters.decided("onboard", decision.action)
        tokens = (first + decision.blocks) * step if decision.blocks else 0
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("looked up", extra={"kvtc": _fields(found * step, tokens, decision)})
        return tokens

    def offload(
        self, blocks: SequenceBlocks, source: PagedKvCache, *, num_tokens: int | None = None
    ) -> OffloadTicket:
        """Queue the tier blocks that the policy wants stored and return at once.

        Parameters
        ----------
        num_tokens : int, optional
            Length of the sequence, from which the recent window counts; by default that of `blocks`.
        """
        self._check_source(source)
        source.check_blocks(blocks.block_ids)
        known = (blocks.first_block + len(blocks.hashes)) * self.block_size
        refs = split_tier_blocks(
            blocks, self.namespace(blocks.salt), self.block_size, self.policy.tier_block_tokens
        )
        count = self.policy.tier_blocks_to_offload(known if num_tokens is None else num_tokens)
        stop = count * self.policy.tier_block_tokens
        if self.events is not None:
            self.events.name([ref.key for ref in refs], self._last_hashes(blocks.hashes))
        refs = [ref for ref in refs if ref.first_position < stop]
        pending = self._offloader.pending
        choice = self._chooser.choose(len(refs), count, pending) if refs else None
        if choice is None:
            return self._offloader.submit([], source)
        return self._offloader.submit(refs, source, choice.encoder, choice.depth)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """Tell how long the engine took to compute the KV of `tokens` tokens, for decisions by cost."""
        self.costs.speeds.prefilled(tokens, seconds)

    def onboard(
        self, blocks: SequenceBlocks, destination: PagedKvCache, *, boundary: Boundary | None = None
    ) -> OnboardHandle:
        """Begin to put the KV of whole tier blocks into the engine's blocks and return at once.

        Parameters
        ----------
        blocks : SequenceBlocks
            Whole tier blocks among those that `lookup` found, from any one on; a rest that fills no tier
            block is left out. Blocks with id -1 are decoded but not written.
        boundary : Boundary, optional
            Takes what is read, in place of the one that `destination` has.
        """
        self._check_source(destination)
        destination.check_blocks(blocks.block_ids)
        refs = split_tier_blocks(
            blocks, self.namespace(blocks.salt), self.block_size, self.policy.tier_block_tokens
        )
        handle = self._onboarder.start(refs, destination, boundary)
        self._onboards.add(handle)
        handle.on_done(self._onboards.discard)
        return handle

    def pin(self, hashes: Sequence[bytes], *, salt: bytes = b"") -> int:
        """Keep a stored prefix from eviction until `unpin`; returns how many leading tokens are kept.

        Fewer than are stored if pinned objects would take more than half of the largest tier.
        """
        self._check_open()
        return self._pins.pin(self.keys(hashes, salt=salt)) * self.policy.tier_block_tokens

    def unpin(self, hashes: Sequence[bytes], *, salt: bytes = b"") -> int:
        """Undo `pin`; returns how many tokens were kept until now."""
        self._check_open()
        return self._pins.unpin(self.keys(hashes, salt=salt)) * self.policy.tier_block_tokens

    async def headers(self, hashes: Sequence[bytes], *, salt: bytes = b"") -> list[StreamHeader]:
        """Read and verify the headers of the leading tier blocks that are stored, for inspection.

        Raises
        ------
        BitstreamError, TierError, TransferError
            If a header is damaged or cannot be read.
        """
        self._check_open()
        keys = self.keys(hashes, salt=salt)
        tokens = self.policy.tier_block_tokens
        headers = []
        for index in range(await self.tiers.contains_prefix(keys)):
            bound = self.codec.max_header_bytes(tokens, self.policy.sinks_in(index * tokens))
            size = min(bound, self.tiers.size_of(keys[index]) or bound)
            async with self._staging.lease(size, timeout_s=self._store_timeout_s) as span:
                await self.tiers.get([ReadRequest(keys[index], 0, span)], timeout_s=self._store_timeout_s)
                headers.append(self.codec.read_header(span.view, binding=keys[index]))
        return headers

    async def reset(self) -> None:
        """Forget every stored object, and everything that was on its way in or out.

        Raises
        ------
        TransferTimeoutError
            If an offload in work does not end in time; nothing has been forgotten then.
        """
        self._check_open()
        await asyncio.gather(*(handle.cancel() for handle in list(self._onboards)))
        await self._offloader.drop(2 * self._store_timeout_s)
        await self.tiers.settle()
        await self.tiers.clear()

    def status(self) -> AdapterStatus:
        """Return counters and tier statistics."""
        return AdapterStatus(
            self.counters.snapshot(),
            self.tiers.stats(),
            self._offloader.pending,
            offload_queue_limit=self._queue_limit,
            onboards_active=len(self._onboards),
            promotions=self.tiers.promotions,
            failed_puts=self.tiers.failed_puts,
            artifact=self.artifact,
            speeds=self.costs.speeds.to_dict(),
            guard=self.encoders.guard_status(),
            policy={**asdict(self.policy), **asdict(self.costs.settings), **self._chooser.to_dict()},
        )

    def on_close(self, release: Callable[[], Awaitable[None]]) -> None:
        """Let `close` await `release` before it closes anything else."""
        self._closing.append(release)

    async def close(self) -> None:
        """Cancel onboards, finish the offload in work, drop what waits, release everything. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for release in self._closing:
            await release()
        await asyncio.gather(*(handle.cancel() for handle in list(self._onboards)))
        await self._offloader.close()
        self._offload_threads.shutdown(wait=False)
        self.decode_threads.shutdown(wait=False)
        await self.tiers.close()
        await self._staging.close()
        await self.agent.close()

    async def __aenter__(self) -> TierAdapter:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def watch(self) -> EventLog:
        """Begin to collect what the tiers gain and lose; whoever asks takes the events in time."""
        if self.events is None:
            self.events = EventLog(self.tiers)
        return self.events

    def _last_hashes(self, hashes: Sequence[bytes]) -> Sequence[bytes]:
        """Return the hash of the last block of each whole tier block."""
        step = self.policy.tier_block_tokens // self.block_size
        return hashes[step - 1 :: step]

    def _check_open(self) -> None:
        if self._closed:
            raise TierClosedError("this tier adapter is closed; open a new one")

    def _check_source(self, cache: PagedKvCache) -> None:
        self._check_open()
        if cache.geometry != self.codec.geometry or cache.block_size != self.block_size:
            raise ArtifactMismatchError(
                f"the paged cache is {cache.geometry} in blocks of {cache.block_size} tokens, the codec "
                f"serves {self.codec.geometry} in blocks of {self.block_size}; calibrate for this model"
            )


def _fields(found: int, promised: int, decision: PrefixDecision) -> dict[str, Any]:
    """Return what the log says of a lookup's decision."""
    fields: dict[str, Any] = {"found": found, "promised": promised, "action": decision.action}
    if decision.estimate is not None:
        fields["onboard_s"] = f"{decision.estimate.onboard_s:.4f}"
        fields["recompute_s"] = f"{decision.estimate.recompute_s:.4f}"
    return fields
