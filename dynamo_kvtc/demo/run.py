"""The demo's steps: calibrate, converse, offload, evict, onboard, compare."""

from __future__ import annotations

import asyncio
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from dynamo_kvtc.adapters.hf import HfEngine, HfSession
from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.calibration.models import LoadedModel
from dynamo_kvtc.codec.header import SectionKind
from dynamo_kvtc.config import Config
from dynamo_kvtc.data import HELDOUT_TEXTS
from dynamo_kvtc.demo.measure import (
    Conversation,
    Onboard,
    ServingMeasurements,
    TierBytes,
    TimeToFirstToken,
)
from dynamo_kvtc.pipeline.adapter import TierAdapter
from dynamo_kvtc.pipeline.assemble import open_adapter
from dynamo_kvtc.pipeline.handle import OnboardHandle
from dynamo_kvtc.testing import ThrottledTier
from dynamo_kvtc.tiers.base import Tier
from dynamo_kvtc.tiers.disk import DiskTier

__all__ = ["DemoSettings", "measure_serving"]

BLOCK_SIZE = 16

_FIRST_QUESTION = "Here is a text.\n\n{document}\n\nSay in one sentence what it is about."
_SECOND_QUESTION = (
    "Who or what is named most often in it, and what is said about it? Answer in a few sentences."
)

T = TypeVar("T")

#: Calls back with one line of what happens now.
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """How large the demo is.

    Attributes
    ----------
    ratio : float
        Ratio of the artifact's plan to serve with.
    document_tokens : tuple[int, ...]
        Lengths of the documents whose time to first token is measured; the conversation is about the
        longest.
    repeats : int
        Measurements of each time to first token; the median counts.
    answer_tokens : int
        Tokens generated in each turn.
    """

    ratio: float = 20.0
    document_tokens: tuple[int, ...] = (1024, 2048, 4096)
    repeats: int = 3
    answer_tokens: int = 48


async def measure_serving(
    loaded: LoadedModel, artifact: Artifact, settings: DemoSettings, folder: Path, note: Note
) -> ServingMeasurements:
    """Run the conversation and the measurements against a host tier and a disk tier under `folder`."""
    longest = max(settings.document_tokens) + 2 * settings.answer_tokens + 256
    engine = HfEngine(loaded, num_blocks=2 * (longest // BLOCK_SIZE + 1), block_size=BLOCK_SIZE)
    shutil.rmtree(folder / "disk-tier", ignore_errors=True)
    config = Config.model_validate(
        {
            "artifact": artifact.folder,
            "codec": {"profile": artifact.manifest.profile, "ratio": settings.ratio},
            "tiers": [
                {"kind": "host", "capacity": "256MiB"},
                {"kind": "disk", "path": folder / "disk-tier", "capacity": "1GiB"},
            ],
            # Smaller than the default: what does not fill a tier block is computed again.
            "policy": {"tier_block_tokens": 128},
            "transfer": {"staging": "64MiB"},
        }
    )
    async with await open_adapter(config, loaded.geometry, BLOCK_SIZE, loaded.rope) as adapter:
        demo = _Demo(engine, adapter, settings, note)
        conversation, first_turn = await demo.converse()
        tiers = await demo.tier_bytes(first_turn)
        ratios = await demo.ratios(first_turn)
        times = [await demo.time_to_first_token(tokens) for tokens in settings.document_tokens]
        note("onboard once more, and take the time apart")
        fast = await demo.onboard_from_disk(first_turn, None)
    # The same folder, read as slowly as decoding goes: where overlapping matters most.
    slow_bytes_per_s = tiers[-1].stored_bytes / (fast.open_s + fast.project_s)
    throttled = partial(_throttle_disk, bytes_per_s=slow_bytes_per_s)
    async with await open_adapter(
        config, loaded.geometry, BLOCK_SIZE, loaded.rope, wrap_tier=throttled
    ) as adapter:
        demo = _Demo(engine, adapter, settings, note)
        slow = await demo.onboard_from_disk(first_turn, slow_bytes_per_s)
    return ServingMeasurements(tiers, *ratios, tuple(times), (fast, slow), conversation)


def _throttle_disk(tier: Tier, bytes_per_s: float) -> Tier:
    return ThrottledTier(tier, bytes_per_s) if isinstance(tier, DiskTier) else tier


class _Demo:
    def __init__(self, engine: HfEngine, adapter: TierAdapter, settings: DemoSettings, note: Note) -> None:
        self.engine, self.adapter, self.settings, self.note = engine, adapter, settings, note
        self.tokenizer = engine.loaded.tokenizer

    # --- the conversation --------------------------------------------------------------------------

    async def converse(self) -> tuple[Conversation, list[int]]:
        """Two turns; between them the first turn's KV leaves G1 and comes back from the tiers."""
        settings = self.settings
        document = self._document(max(settings.document_tokens), HELDOUT_TEXTS[0])
        messages = [{"role": "user", "content": _FIRST_QUESTION.format(document=document)}]
        session = self.engine.session(self._tokens(self._template(messages)))
        self.note(f"turn 1: prefill {len(session.token_ids)} tokens and answer")
        answer = await _compute(lambda: session.generate(settings.answer_tokens))
        first_turn = session.token_ids[: session.num_cached]

        answer_text = self.tokenizer.decode(answer, skip_special_tokens=True).strip()
        messages += [
            {"role": "assistant", "content": answer_text},
            {"role": "user", "content": _SECOND_QUESTION},
        ]
        # The question follows the very tokens of turn 1, so that their KV can be used again.
        whole = self._template(messages)
        follow_up = self._tokens(whole[whole.rindex(answer_text) + len(answer_text) :])
        if answer[-1] == follow_up[0]:
            follow_up = follow_up[1:]
        prompt = [*session.token_ids, *follow_up]

        self.note("offload the first turn through the encoder to host memory and disk")
        await self._offload(session)
        self.note("turn 2 over the uncompressed cache, for comparison")
        expected_logits, expected = await _compute(lambda: self._second_turn(session, prompt))
        session.evict()

        self.note("turn 2 over KV onboarded from the tiers")
        returned = self.engine.session(prompt)
        onboarded = await self._onboard(returned)
        logits, generated = await _compute(lambda: self._second_turn(returned, prompt, expected))
        returned.evict()
        return (
            self._compare(prompt, onboarded, expected_logits, expected, logits, generated),
            first_turn,
        )

    def _second_turn(
        self, session: HfSession, prompt: list[int], scored: list[int] | None = None
    ) -> tuple[torch.Tensor, list[int]]:
        """Return log-probabilities over the rest of the prompt and the scored answer, and the own answer.

        The scored answer is the uncompressed cache's, for both: only then are positions comparable.
        """
        cached = session.num_cached
        session.token_ids = list(prompt)
        generated = session.generate(self.settings.answer_tokens)
        answer = generated if scored is None else scored
        session.token_ids = [*prompt, *answer]
        session.num_cached = cached
        logits = session.prefill(last=len(session.token_ids))
        return logits.double().log_softmax(-1), generated

    def _compare(
        self,
        prompt: list[int],
        onboarded: int,
        expected_logits: torch.Tensor,
        expected: list[int],
        logits: torch.Tensor,
        generated: list[int],
    ) -> Conversation:
        scored = min(len(expected_logits), len(logits))
        expected_logits, logits = expected_logits[-scored:], logits[-scored:]
        kl = (expected_logits.exp() * (expected_logits - logits)).sum(-1)
        same = (expected_logits.argmax(-1) == logits.argmax(-1)).double()
        leading = next(
            (i for i, (a, b) in enumerate(zip(expected, generated, strict=False)) if a != b),
            min(len(expected), len(generated)),
        )
        return Conversation(
            context_tokens=len(prompt),
            onboarded_tokens=onboarded,
            recomputed_tokens=len(prompt) - onboarded,
            scored_tokens=scored,
            kl=float(kl.mean()),
            top1=float(same.mean()),
            same_continuation=generated == expected,
            same_leading_tokens=leading,
            generated_tokens=len(expected),
            text_uncompressed=self.tokenizer.decode(expected, skip_special_tokens=True).strip(),
            text_onboarded=self.tokenizer.decode(generated, skip_special_tokens=True).strip(),
        )

    # --- bytes -------------------------------------------------------------------------------------

    async def tier_bytes(self, token_ids: list[int]) -> tuple[TierBytes, ...]:
        """Return what each tier holds of the conversation."""
        blocks = len(await self.adapter.headers(self.engine.session(token_ids).hashes()))
        tokens = blocks * self.adapter.policy.tier_block_tokens
        raw = tokens * self.engine.loaded.geometry.token_bytes_16bit
        stats = self.adapter.status().tiers
        return tuple(
            TierBytes(name, tier.objects, tokens, raw, tier.stored_bytes) for name, tier in stats.items()
        )

    async def ratios(self, token_ids: list[int]) -> tuple[float, float, float]:
        """Return the ratio of the conversation without sinks, with them, and with the raw window too."""
        headers = await self.adapter.headers(self.engine.session(token_ids).hashes())
        token_bytes = self.engine.loaded.geometry.token_bytes_16bit
        stored = sum(header.stream_size for header in headers)
        sink_bytes = sum(
            chunk.stored_size
            for header in headers
            for chunk in header.chunks
            if chunk.kind is SectionKind.SINKS
        )
        tokens = sum(header.num_tokens for header in headers)
        sinks = sum(header.sink_tokens for header in headers)
        rest = len(token_ids) - tokens
        return (
            (tokens - sinks) * token_bytes / (stored - sink_bytes),
            tokens * token_bytes / stored,
            len(token_ids) * token_bytes / (stored + rest * token_bytes),
        )

    # --- time --------------------------------------------------------------------------------------

    async def time_to_first_token(self, tokens: int) -> TimeToFirstToken:
        """Measure recomputing against onboarding from host and from disk, interleaved."""
        self.note(f"time to first token after {tokens} tokens: recompute, onboard from host, from disk")
        prompt = self._tokens(self._document(tokens, HELDOUT_TEXTS[1]))[:tokens]
        recompute, host, disk = [], [], []
        session = self.engine.session(prompt)
        await _compute(session.prefill)
        await self._offload(session)
        session.evict()
        onboarded = 0
        for _ in range(self.settings.repeats):
            recompute.append((await self._first_token(prompt, onboard=False))[0])
            seconds, onboarded = await self._first_token(prompt, onboard=True)
            host.append(seconds)
            await self._only_on_disk(prompt)
            disk.append((await self._first_token(prompt, onboard=True))[0])
            await self.adapter.tiers.settle()  # what was read from disk is promoted to the host tier
        return TimeToFirstToken(
            tokens=tokens,
            onboarded_tokens=onboarded,
            recompute_s=statistics.median(recompute),
            onboard_host_s=statistics.median(host),
            onboard_disk_s=statistics.median(disk),
        )

    async def _first_token(self, prompt: list[int], *, onboard: bool) -> tuple[float, int]:
        session = self.engine.session(prompt)
        start = time.perf_counter()
        tokens = await self._onboard(session) if onboard else 0
        await _compute(session.prefill)
        seconds = time.perf_counter() - start
        session.evict()
        return seconds, tokens

    async def onboard_from_disk(self, token_ids: list[int], disk_bytes_per_s: float | None) -> Onboard:
        """Onboard the conversation once more from disk and take its timeline apart."""
        await self._only_on_disk(token_ids)
        session = self.engine.session(token_ids)
        tokens = await self.adapter.lookup(session.hashes())
        handle = self.adapter.onboard(session.reserve(tokens), self.engine.cache)
        await handle.wait()
        session.evict()
        return _onboard_record(handle, disk_bytes_per_s)

    async def _only_on_disk(self, token_ids: list[int]) -> None:
        """Drop a sequence's tier blocks from host memory."""
        await self.adapter.tiers.settle()
        keys = self.adapter.keys(self.engine.session(token_ids).hashes())
        await self.adapter.tiers.tiers[0].evict(keys)

    # --- shared ------------------------------------------------------------------------------------

    async def _offload(self, session: HfSession) -> None:
        ticket = self.adapter.offload(
            session.cached_blocks(), self.engine.cache, num_tokens=len(session.token_ids)
        )
        await ticket.wait()

    async def _onboard(self, session: HfSession) -> int:
        """Bring what the tiers hold into G1; at least one token is left to compute."""
        tokens = await self.adapter.lookup(session.hashes())
        handle = self.adapter.onboard(session.reserve(tokens), self.engine.cache)
        await handle.wait()
        session.commit(tokens)
        return tokens

    def _document(self, tokens: int, path: Path) -> str:
        text = path.read_text(encoding="utf-8")[: 8 * tokens]
        return str(self.tokenizer.decode(self._tokens(text)[:tokens]))

    def _template(self, messages: list[dict[str, str]]) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, verbose=False)["input_ids"])


def _onboard_record(handle: OnboardHandle, disk_bytes_per_s: float | None) -> Onboard:
    timeline = handle.timeline
    return Onboard(
        disk_bytes_per_s=disk_bytes_per_s,
        tokens=handle.num_tokens,
        wall_s=timeline.wall_s,
        transfer_s=timeline.busy_s("transfer"),
        open_s=timeline.busy_s("open"),
        project_s=timeline.busy_s("project"),
        first_layer_s=timeline.layer_ready[0],
        overlap=timeline.overlap,
        intervals=tuple(timeline.intervals),
        layer_ready_s=dict(timeline.layer_ready),
    )


async def _compute(work: Callable[[], T]) -> T:
    """Run the model off the event loop, which transfers need meanwhile."""
    return await asyncio.to_thread(work)
