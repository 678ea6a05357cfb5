"""Onboarding a prefix from disk and from host memory against computing it again.

The segment files are dropped from the page cache before each onboard from disk.

    python benchmarks/onboard_vs_recompute.py --artifact demo-output/artifact
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
from pathlib import Path

from common import BLOCK_SIZE, Subject, interleave, load_subject, parse_arguments, publish, timed

from dynamo_kvtc.config import Config
from dynamo_kvtc.pipeline.assemble import open_adapter


def configuration(subject: Subject, ratio: float, tiers: list[dict[str, object]]) -> Config:
    return Config.model_validate(
        {
            "artifact": subject.artifact.folder,
            "codec": {"profile": subject.artifact.manifest.profile, "ratio": ratio},
            "tiers": tiers,
            # The whole prefix is stored, so that both sides do the same tokens.
            "policy": {"recent_window": 0},
            "transfer": {"staging": "64MiB"},
        }
    )


def drop_from_page_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # only clean pages can be dropped
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


async def main() -> None:
    arguments = parse_arguments(__doc__)
    subject = load_subject(arguments)
    geometry, rope = subject.loaded.geometry, subject.loaded.rope
    with tempfile.TemporaryDirectory(prefix="kvtc-bench-") as name:
        folder = Path(name)
        in_memory: list[dict[str, object]] = [{"kind": "host", "capacity": "256MiB"}]
        on_disk: list[dict[str, object]] = [{"kind": "disk", "path": folder, "capacity": "1GiB"}]
        async with (
            await open_adapter(
                configuration(subject, arguments.ratio, in_memory), geometry, BLOCK_SIZE, rope
            ) as host,
            await open_adapter(
                configuration(subject, arguments.ratio, on_disk), geometry, BLOCK_SIZE, rope
            ) as disk,
        ):
            stored = await subject.offload(host)
            await subject.offload(disk)

            async def from_disk() -> float:
                drop_from_page_cache(folder)
                return await subject.onboard(disk)

            seconds = await interleave(
                {
                    "recompute": lambda: timed(subject.prefill),
                    "onboard from host": lambda: subject.onboard(host),
                    "onboard from disk": from_disk,
                },
                arguments.repetitions,
            )
            layer_groups = len(disk.codec.layer_groups)
    recompute_s, host_s, disk_s = (statistics.median(runs) for runs in seconds.values())
    publish(
        arguments,
        "Onboard against recompute",
        seconds,
        {
            "recompute / onboard from disk": (recompute_s / disk_s, "at least 5"),
            "recompute / onboard from host": (recompute_s / host_s, "-"),
        },
        {
            "stored_bytes": stored,
            "profile": subject.artifact.manifest.profile,
            "dtype": subject.loaded.geometry.dtype,
            "layer_groups": layer_groups,
        },
    )


if __name__ == "__main__":
    asyncio.run(main())
