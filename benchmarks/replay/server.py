"""One variant of serving a trace: an engine's paged cache, and perhaps tiers behind it."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass

import torch

from benchmarks.replay.trace import Turn
from dynamo_kvtc.adapters.hf import HfEngine, HfSession
from dynamo_kvtc.calibration.models import LoadedModel
from dynamo_kvtc.errors import OnboardError
from dynamo_kvtc.pipeline.adapter import TierAdapter


@dataclass(frozen=True)
class Answer:
    """What one request took.

    Attributes
    ----------
    ttft_s : float
        From the request to the logits of its first new token: lookup, onboard and prefill.
    in_cache, onboarded, computed : int
        Where the KV of its tokens came from: the engine's paged cache, the tiers, the model.
    first_token : int
        The most likely next token, to compare variants with.
    """

    ttft_s: float
    in_cache: int
    onboarded: int
    computed: int
    first_token: int


class Server:
    """Serves one request at a time.

    Parameters
    ----------
    num_blocks : int
        Size of the paged cache (G1). Conversations stay in it until others need their blocks, least
        recently used first.
    keep : bool
        False gives every conversation's blocks back after its turn: everything is recomputed.
    """

    def __init__(self, loaded: LoadedModel, *, num_blocks: int, block_size: int, keep: bool = True) -> None:
        self.engine = HfEngine(loaded, num_blocks=num_blocks, block_size=block_size)
        self.adapter: TierAdapter | None = None
        self._keep = keep
        self._resident: OrderedDict[int, HfSession] = OrderedDict()

    async def serve(self, turn: Turn) -> Answer:
        """Answer a request, then offload what is new of it; only the answer is timed."""
        start = time.perf_counter()
        session = self._resident.pop(turn.conversation, None)
        if session is None:
            session = self.engine.session(turn.token_ids)
        session.token_ids = list(turn.token_ids)
        in_cache = session.num_cached
        self._make_room(-(-len(turn.token_ids) // self.engine.block_size) - len(session.block_ids))
        onboarded = await self._onboard(session) if not in_cache else 0
        before = time.perf_counter()
        logits = session.prefill()
        stop = time.perf_counter()
        computed = len(turn.token_ids) - in_cache - onboarded
        if self.adapter is not None:
            self.adapter.prefilled(computed, stop - before)
            await self.adapter.offload(session.cached_blocks(), self.engine.cache).wait()
        if self._keep:
            self._resident[turn.conversation] = session
        else:
            session.evict()
        return Answer(stop - start, in_cache, onboarded, computed, int(torch.argmax(logits[-1])))

    def restart(self) -> None:
        """Lose the paged cache, as a process that starts anew does."""
        while self._resident:
            self._resident.popitem()[1].evict()

    async def _onboard(self, session: HfSession) -> int:
        if self.adapter is None:
            return 0
        tokens = await self.adapter.lookup(session.hashes())
        if not tokens:
            return 0
        try:
            await self.adapter.onboard(session.reserve(tokens), self.engine.cache).wait()
        except OnboardError as error:
            tokens = error.tokens_to_recompute[0][0]
        session.commit(tokens)
        return tokens

    def _make_room(self, blocks: int) -> None:
        while self.engine.free_blocks < blocks and self._resident:
            self._resident.popitem(last=False)[1].evict()
