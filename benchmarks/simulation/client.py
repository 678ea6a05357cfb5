"""Sends a trace to a frontend and records, per request, tokens served from caches and time to first token."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from benchmarks.simulation.cluster import MODEL_NAME
from benchmarks.simulation.trace import Turn

__all__ = ["Reply", "ask", "replay"]

_TIMEOUT = aiohttp.ClientTimeout(total=120)


@dataclass(frozen=True)
class Reply:
    """How one request was served.

    Attributes
    ----------
    prompt_tokens, cached_tokens : int
        Tokens of the prompt, and how many of them no worker computed.
    ttft_s : float
        Seconds to the first token.
    """

    prompt_tokens: int
    cached_tokens: int
    ttft_s: float


async def ask(
    session: aiohttp.ClientSession, url: str, prompt: Sequence[int], *, max_tokens: int = 8
) -> Reply:
    """Send one streaming completion request of token ids."""
    body = {
        "model": MODEL_NAME,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started, first, usage = time.perf_counter(), None, None
    async with session.post(url, json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            event = json.loads(line[6:])
            if first is None:
                first = time.perf_counter() - started
            usage = event.get("usage") or usage
    if first is None or usage is None:
        raise RuntimeError("the frontend sent no tokens, or no usage")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Reply(usage["prompt_tokens"], cached, first)


async def replay(url: str, turns: Sequence[Turn], *, users: int) -> list[Reply]:
    """Send all turns in order, one per user at a time; a turn waits for its conversation's one before."""
    replies: list[asyncio.Future[Reply]] = [asyncio.get_running_loop().create_future() for _ in turns]
    before: dict[int, int] = {}
    queue: asyncio.Queue[tuple[int, int | None]] = asyncio.Queue()
    for position, turn in enumerate(turns):
        queue.put_nowait((position, before.get(turn.conversation)))
        before[turn.conversation] = position

    async def user(session: aiohttp.ClientSession) -> None:
        while not queue.empty():
            position, earlier = queue.get_nowait()
            if earlier is not None:
                await replies[earlier]
            replies[position].set_result(await ask(session, url, turns[position].prompt))

    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
        # gather, not a task group: Python 3.10. The first error ends the run.
        await asyncio.gather(*(user(session) for _ in range(users)))
    return [reply.result() for reply in replies]
