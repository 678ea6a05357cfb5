"""All runs: no host tier, plain host memory and the compressed tier, over the same trace."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from benchmarks.simulation.client import Reply, ask, replay
from benchmarks.simulation.cluster import BLOCK_SIZE, Cluster, ClusterSettings, HostTier
from benchmarks.simulation.measured import Measured
from benchmarks.simulation.trace import TraceSettings, make_trace

__all__ = ["COMPRESSED", "NOTHING", "PLAIN", "Outcome", "Plan", "Speed", "run_all"]

NOTHING, PLAIN, COMPRESSED = "no host tier", "plain host memory", "compressed tier"


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes
    ----------
    memory : tuple of float
        Host memory of all workers together, as parts of the plain KV that the trace makes.
    users : int
        Requests in flight at most.
    """

    cluster: ClusterSettings
    trace: TraceSettings
    measured: Measured
    memory: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    users: int = 3


@dataclass(frozen=True)
class Speed:
    """How fast the mocker computes the tokens that were measured, and how fast its host tier moves them.

    Attributes
    ----------
    compute_s, onboard_s : float
        Seconds for `Measured.tokens` tokens: computed, and from a host tier with our speed.
    """

    compute_s: float
    onboard_s: float


@dataclass(frozen=True)
class Outcome:
    """One run.

    Attributes
    ----------
    hit_rate : float
        Prompt tokens that no worker computed, as a part of all.
    ttft_median_s, ttft_p90_s : float
        Seconds of the mocker's slowed clock: only ratios between runs mean anything.
    """

    tier: str
    memory: float
    hit_rate: float
    ttft_median_s: float
    ttft_p90_s: float


def run_all(plan: Plan, folder: Path, note: Callable[[str], None]) -> tuple[list[Outcome], Speed, float]:
    """Run everything.

    Returns
    -------
    tuple
        Outcomes; what the host tier's speed came to; the hit rate of an endless cache.
    """
    turns = make_trace(plan.trace)
    longest: dict[int, list[int]] = {turn.conversation: turn.prompt for turn in turns}
    trace_blocks = sum(len(prompt) // BLOCK_SIZE for prompt in longest.values())
    note("how fast the simulated workers compute")
    tier, speed = _fit_tier(plan, folder)

    def run(name: str, memory: float, host: HostTier | None) -> Outcome:
        note(f"{name}, host memory for {memory:.0%} of the trace's plain KV" if memory else name)
        with Cluster(plan.cluster, host, folder / f"{name}-{memory}".replace(" ", "-")) as cluster:
            replies = asyncio.run(replay(cluster.frontend.url("/v1/completions"), turns, users=plan.users))
        return _outcome(name, memory, replies)

    outcomes = [run(NOTHING, 0.0, None)]
    for memory in plan.memory:
        plain_blocks = max(1, round(memory * trace_blocks / plan.cluster.workers))
        # Plain memory is given a link without limits: the comparison must not depend on its speed.
        outcomes.append(run(PLAIN, memory, HostTier(plain_blocks)))
        outcomes.append(run(COMPRESSED, memory, tier(round(plain_blocks * plan.measured.ratio))))
    return outcomes, speed, _reusable(turns_prompts=[(turn.conversation, turn.prompt) for turn in turns])


def _fit_tier(plan: Plan, folder: Path) -> tuple[Callable[[int], HostTier], Speed]:
    """Give the host tier the speed, relative to the mocker's computing, that was measured."""
    measured, settings = plan.measured, plan.cluster
    with Cluster(settings, None, folder / "compute-speed") as cluster:
        compute_s = asyncio.run(_seconds(cluster.frontend.url("/v1/completions"), measured.tokens))
    gb_per_s = settings.bytes_per_token * measured.tokens / compute_s / 1e9

    def tier(blocks: int) -> HostTier:
        return HostTier(blocks, gb_per_s * measured.onboard_speed, gb_per_s * measured.encode_speed)

    return tier, Speed(compute_s, compute_s / measured.onboard_speed)


async def _seconds(url: str, tokens: int) -> float:
    """Return what computing so many tokens adds to a request of one block, the median of five."""
    async with aiohttp.ClientSession() as session:
        long, short = [], []
        for repetition in range(5):
            start = 1000 * repetition + 1
            long.append(await ask(session, url, range(start, start + tokens + BLOCK_SIZE)))
            short.append(await ask(session, url, range(start + 500, start + 500 + BLOCK_SIZE)))
    if any(reply.cached_tokens for reply in long + short):
        raise RuntimeError("the prompts that time the mocker were cached")
    return statistics.median(r.ttft_s for r in long) - statistics.median(r.ttft_s for r in short)


def _outcome(tier: str, memory: float, replies: Sequence[Reply]) -> Outcome:
    ttft = [reply.ttft_s for reply in replies]
    return Outcome(
        tier,
        memory,
        sum(reply.cached_tokens for reply in replies) / sum(reply.prompt_tokens for reply in replies),
        statistics.median(ttft),
        statistics.quantiles(ttft, n=10)[-1],
    )


def _reusable(turns_prompts: Sequence[tuple[int, list[int]]]) -> float:
    """Return the part of all prompt tokens that whole blocks of the conversation's last prompt cover."""
    seen: dict[int, int] = {}
    reused = 0
    for conversation, prompt in turns_prompts:
        reused += seen.get(conversation, 0)
        seen[conversation] = len(prompt) // BLOCK_SIZE * BLOCK_SIZE
    return reused / sum(len(prompt) for _, prompt in turns_prompts)
