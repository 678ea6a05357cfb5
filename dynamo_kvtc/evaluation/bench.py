"""The measurements of ``dynamo-kvtc bench``: one artifact's codecs and both kinds of tier on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.errors import EvaluationError
from dynamo_kvtc.evaluation.codec_speed import CodecSpeed, EntropyCoding, entropy_coding, measure_codec
from dynamo_kvtc.evaluation.environment import describe_environment
from dynamo_kvtc.evaluation.synthetic import synthetic_blocks
from dynamo_kvtc.evaluation.tier_speed import TierSpeed, measure_tier
from dynamo_kvtc.tiers.disk import DiskTier
from dynamo_kvtc.tiers.host import HostTier
from dynamo_kvtc.transfer.agent import TransferAgent

__all__ = ["BenchReport", "BenchSettings", "CodecBench", "bench_codecs", "bench_tiers", "run_bench"]

_TIER_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """How much is measured.

    Attributes
    ----------
    tier_blocks, tier_block_tokens : int
        Size of the sequence that is encoded and decoded.
    repetitions : int
        Runs of every measurement; medians count.
    prefix_keys : int
        Keys in the prefix that is looked up.
    disk : Path or None
        Folder under which a disk tier is made and removed again; the system's temporary folder if None.
    """

    tier_blocks: int = 4
    tier_block_tokens: int = 256
    repetitions: int = 5
    prefix_keys: int = 1000
    disk: Path | None = None


@dataclass(frozen=True, slots=True)
class CodecBench:
    """One nominal ratio: speed, and entropy coding against the entropy."""

    nominal_ratio: float
    speed: CodecSpeed
    entropy: EntropyCoding


@dataclass(frozen=True, slots=True)
class BenchReport:
    """Everything that was measured, and where."""

    artifact_id: str
    environment: dict[str, Any]
    codecs: tuple[CodecBench, ...]
    tiers: tuple[TierSpeed, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        return asdict(self)


async def run_bench(
    artifact: Artifact,
    ratios: Sequence[float] | None = None,
    settings: BenchSettings | None = None,
    *,
    note: Callable[[str], None] = lambda _: None,
) -> BenchReport:
    """Measure codecs and tiers.

    Parameters
    ----------
    artifact : Artifact
        Whose codecs are measured, on synthetic KV of its own statistics.
    ratios : Sequence[float], optional
        Ratios of the artifact's plans; by default all of them.
    note : Callable
        Called with a line that says what happens next.

    Raises
    ------
    ArtifactMismatchError
        If the artifact has no plan for a ratio.
    EvaluationError
        If the disk folder cannot be used.
    MissingDependencyError, TransferError, TierError
        If NIXL or a tier does not work here.
    """
    settings = settings or BenchSettings()
    note("encode and decode")
    codecs = bench_codecs(artifact, ratios, settings)
    note("transfers and lookups")
    tiers = await bench_tiers(settings)
    return BenchReport(artifact.parameters.artifact_id.hex(), describe_environment(), codecs, tiers)


def bench_codecs(
    artifact: Artifact, ratios: Sequence[float] | None, settings: BenchSettings
) -> tuple[CodecBench, ...]:
    """Measure the codec of each ratio on the same synthetic KV."""
    parameters = artifact.parameters
    blocks = synthetic_blocks(artifact, settings.tier_blocks, settings.tier_block_tokens)
    benches = []
    for ratio in ratios or sorted(parameters.ratios.values()):
        codec = open_codec(parameters, ratio=ratio)
        single = open_codec(parameters, ratio=ratio, threads=1)
        speed = measure_codec(codec, single, blocks, repetitions=settings.repetitions)
        benches.append(CodecBench(ratio, speed, entropy_coding(codec, codec.encode(blocks))))
    return tuple(benches)


async def bench_tiers(settings: BenchSettings) -> tuple[TierSpeed, ...]:
    """Measure a host tier and a disk tier of their own, which are gone afterwards."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="kvtc-bench-", dir=settings.disk)
    except OSError as error:
        raise EvaluationError(f"cannot make a folder in {settings.disk}: {error}; give another") from error
    with folder as path:
        agent = await TransferAgent.create()
        try:
            host = await HostTier.open(agent, _TIER_BYTES)
            try:
                disk = await DiskTier.open(agent, Path(path) / "tier", _TIER_BYTES)
                try:
                    return tuple(
                        [
                            await measure_tier(
                                tier,
                                agent,
                                prefix_keys=settings.prefix_keys,
                                repetitions=settings.repetitions,
                            )
                            for tier in (host, disk)
                        ]
                    )
                finally:
                    await disk.close()
            finally:
                await host.close()
        finally:
            await agent.close()
