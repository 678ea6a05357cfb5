"""What a power failure may leave, simulated: writes that were not synced are lost, torn or kept by chance.

A recording layer writes down every call that changes the folder. For any moment and any chance, the files are
rebuilt as a disk may have them: all that was synced, and of what came later any part, in sectors of 512
bytes.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest

from dynamo_kvtc.testing import FaultyTransfer
from dynamo_kvtc.testing.conformance import TierDriver, object_bytes, object_key
from dynamo_kvtc.tiers import DiskSettings, DiskTier, disk_log
from dynamo_kvtc.tiers.disk_format import object_intact
from dynamo_kvtc.tiers.disk_recovery import recover_folder
from dynamo_kvtc.transfer import FileSpan, MemorySpan, StagingPool, TransferAgent

_SECTOR = 512
_SIZES = (1, 3000, 9000, 20_000)


class Step(NamedTuple):
    """One call: "write", "allocate", "punch", "sync", "create", "unlink", "sync folder", or what was told."""

    kind: str
    name: str
    start: int = 0
    data: bytes = b""
    nbytes: int = 0


class RecordingTransfer(FaultyTransfer):
    steps: list[Step]

    async def write_file(self, pairs: Sequence[tuple[MemorySpan, FileSpan]], timeout_s: float) -> None:
        await super().write_file(pairs, timeout_s)
        for source, into in pairs:
            self.steps.append(Step("write", into.region.name, into.offset, bytes(source.view)))


@contextmanager
def recorded(steps: list[Step], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def name_of(fd: int) -> str:
        return Path(f"/proc/self/fd/{fd}").readlink().name

    def wrap(target: Any, name: str, note: Any) -> None:
        call = getattr(target, name)

        def noting(*args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            steps.append(note(*args))
            return result

        patched.setattr(target, name, noting)

    with monkeypatch.context() as patched:
        wrap(os, "pwrite", lambda fd, data, at: Step("write", name_of(fd), at, bytes(data)))
        wrap(os, "fdatasync", lambda fd: Step("sync", name_of(fd)))
        wrap(os, "fsync", lambda fd: Step("sync", name_of(fd)))
        wrap(disk_log, "sync_folder", lambda folder: Step("sync folder", ""))
        wrap(disk_log, "allocate_range", lambda fd, at, n: Step("allocate", name_of(fd), at, nbytes=n))
        wrap(disk_log, "punch_hole", lambda fd, at, n: Step("punch", name_of(fd), at, nbytes=n))
        wrap(Path, "unlink", lambda path, **_: Step("unlink", path.name))
        yield


def apply(files: dict[str, bytearray], step: Step, random: Random | None) -> None:
    """Let a step reach the disk; with `random`, only those of its sectors that chance picks."""
    data = files.setdefault(step.name, bytearray())
    if step.kind == "write":
        stop = step.start + len(step.data)
        data.extend(bytes(max(0, stop - len(data))))
        for at in range(step.start, stop, _SECTOR):
            if random is None or random.random() < 0.7:
                end = min(at + _SECTOR, stop)
                data[at:end] = step.data[at - step.start : end - step.start]
    elif step.kind == "allocate":
        data.extend(bytes(max(0, step.start + step.nbytes - len(data))))
    elif step.kind == "punch":
        data[step.start : step.start + step.nbytes] = bytes(step.nbytes)


def after_power_loss(steps: list[Step], random: Random) -> dict[str, bytearray]:
    """Return the files that a disk may hold after the last of these steps."""
    synced = {step.name: index for index, step in enumerate(steps) if step.kind == "sync"}
    folder_synced = max((index for index, step in enumerate(steps) if step.kind == "sync folder"), default=-1)
    files: dict[str, bytearray] = {}
    first_seen: dict[str, int] = {}
    for index, step in enumerate(steps):
        if step.kind in ("write", "allocate", "punch"):
            first_seen.setdefault(step.name, index)
            if index < synced.get(step.name, -1):
                apply(files, step, None)
            elif random.random() < 0.5:
                apply(files, step, random)
        elif step.kind == "unlink" and (index < folder_synced or random.random() < 0.5):
            files.pop(step.name, None)
    for name, index in first_seen.items():
        # The name of a new file is on disk once the folder was synced.
        if index > folder_synced and random.random() < 0.5:
            files.pop(name, None)
    return files


async def record(durability: str, folder: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    steps: list[Step] = []
    random = Random(seed)
    async with RecordingTransfer(await TransferAgent.create()) as agent:
        agent.steps = steps
        staging = await StagingPool.create(agent, 1 << 20)
        settings = DiskSettings(segment_bytes=64 << 10, durability=durability)  # type: ignore[arg-type]
        with recorded(steps, monkeypatch):
            tier = await DiskTier.open(agent, folder, 1 << 20, settings=settings)
            driver = TierDriver(tier, staging)

            async def put(number: int) -> None:
                await driver.put(number, _SIZES[number % 4])
                steps.append(Step("stored", str(number)))

            for first in range(0, 24, 3):
                await asyncio.gather(*(put(number) for number in range(first, first + 3)))
                if random.random() < 0.4:
                    gone = random.randrange(first + 1)
                    steps.append(Step("evicting", str(gone)))
                    await tier.evict([object_key(gone)])
            await tier.close()
    return steps


@pytest.mark.parametrize("durability", ["fsync", "none"])
async def test_what_was_synced_survives_and_nothing_wrong_does(
    durability: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = await record(durability, tmp_path / "tier", 3, monkeypatch)
    synced = {step.name for step in steps if step.kind == "sync" and step.name.startswith("segment-")}
    assert bool(synced) is (durability == "fsync")
    numbers = {object_key(number): number for number in range(24)}
    survivors = damaged = 0
    for seed in range(150):
        random = Random(seed)
        cut = random.randrange(1, len(steps) + 1)
        folder = tmp_path / f"after-{seed}"
        folder.mkdir()
        for name, data in after_power_loss(steps[:cut], random).items():
            (folder / name).write_bytes(data)
        recovery = recover_folder(folder, verify_objects=False)
        intact = set()
        for segment in recovery.segments:
            fd = os.open(segment.path, os.O_RDONLY)
            for found in segment.records:
                if object_intact(fd, found):
                    number = numbers[found.key]
                    assert os.pread(fd, found.nbytes, found.offset) == object_bytes(
                        number, _SIZES[number % 4]
                    )
                    intact.add(number)
                else:
                    damaged += 1
            os.close(fd)
        survivors += len(intact)
        if durability == "fsync":
            stored = {int(step.name) for step in steps[:cut] if step.kind == "stored"}
            gone = {int(step.name) for step in steps[:cut] if step.kind == "evicting"}
            assert stored - gone <= intact
    assert survivors > 0
    # Without syncs a header may survive whose bytes did not: the checksum finds it.
    assert (damaged > 0) is (durability == "none")
