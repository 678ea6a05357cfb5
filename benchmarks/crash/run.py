"""Kills children at random moments and looks at what is left, again and again in one folder."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.crash.child import NUMBERS, NUMBERS_OF_CHILD, ChildOrder, object_size, run_child
from dynamo_kvtc.errors import KvtcError, ObjectMissingError
from dynamo_kvtc.testing.conformance import TierDriver, object_bytes, object_key
from dynamo_kvtc.tiers import DiskSettings, DiskTier, SharedDiskTier
from dynamo_kvtc.transfer import StagingPool, TransferAgent

__all__ = ["CrashTally", "kill_often"]

_CAPACITY = 4 << 20
#: Kills in one folder before it is begun anew, so that the parent need not know ever more objects.
_KILLS_PER_FOLDER = NUMBERS // NUMBERS_OF_CHILD - 1


@dataclass
class CrashTally:
    """What was seen after each kill.

    `lost` counts objects that a child had reported as stored, that nobody had evicted, and that are not
    there; `wrong` objects whose bytes are not those that were put; `damaged` records that the tier had to
    drop. `unreported` objects are whole ones whose put was killed before it could be reported, `resurrected`
    ones those whose eviction had not reached the disk.
    """

    kills: int = 0
    kills_while_opening: int = 0
    puts_reported: int = 0
    evictions_reported: int = 0
    objects_checked: int = 0
    lost: int = 0
    wrong: int = 0
    damaged: int = 0
    unreported: int = 0
    resurrected: int = 0
    slowest_open_s: float = 0.0
    largest_folder_bytes: int = 0
    findings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the tally, JSON-ready."""
        return asdict(self)


async def kill_often(
    kills: int, folder: Path, *, seed: int, workers: int = 1, limit_s: float = float("inf")
) -> CrashTally:
    """Kill `kills` children, or as many as `limit_s` allows.

    After each round the folder is opened and everything in it read.

    With several `workers` they share the folder. In each round one of them is killed at its random moment,
    the others go on for a while and are killed then.
    """
    # A server that has imported everything and forks: children start in milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.crash.child", "nixl_cu13"])
    tally = CrashTally()
    turn = _KILLS_PER_FOLDER
    async with await TransferAgent.create() as agent:
        staging = await StagingPool.create(agent, 4 << 20)
        stop = time.monotonic() + limit_s
        while tally.kills < kills and time.monotonic() < stop:
            if turn + workers > _KILLS_PER_FOLDER:
                shutil.rmtree(folder, ignore_errors=True)
                looker, turn = _Looker(agent, staging, folder, tally, shared=workers > 1), 0
            random = Random(f"{seed} {workers} {tally.kills}")
            settings = DiskSettings(
                segment_bytes=random.choice((128 << 10, 512 << 10)),
                durability=random.choice(("none", "none", "none", "fsync")),
            )
            orders = []
            for _ in range(workers):
                first = turn * NUMBERS_OF_CHILD
                orders.append(
                    ChildOrder(folder, _CAPACITY, settings, random.randrange(2**32), first, -1, workers > 1)
                )
                turn += 1
            for told in await asyncio.gather(
                *(asyncio.to_thread(_kill_one, context, order, Random(order.seed)) for order in orders)
            ):
                tally.kills += 1
                tally.kills_while_opening += not told
                looker.take_in(told)
            await looker.look(settings, turn * NUMBERS_OF_CHILD)
    shutil.rmtree(folder, ignore_errors=True)
    return tally


def _kill_one(context: Any, order: ChildOrder, random: Random) -> list[tuple[str, int]]:
    """Start a child, kill it at a random moment, and return what it said."""
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(order, send))
    process.start()
    send.close()
    pipe = os.fdopen(os.dup(receive.fileno()), "rb", buffering=0)
    receive.close()
    data = b""
    if random.random() < 0.2:
        # While the folder is opened, or in the first writes.
        data += pipe.read(2)
        time.sleep(random.random() * 0.03)
    else:
        enough = random.randrange(1, 300)
        while data.count(b"\n") < enough and (more := pipe.read(4096)):
            data += more
        time.sleep(random.random() * 0.005)
    with contextlib.suppress(ProcessLookupError):  # it ended by itself, which is said below
        os.kill(process.pid, signal.SIGKILL)
    while more := pipe.read(65536):
        data += more
    process.join()
    pipe.close()
    if process.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"a child ended by itself with {process.exitcode}")
    lines = (line.split() for line in data.decode().splitlines())
    return [(line[0], int(line[1])) for line in lines if len(line) == 2]


def _child(order: ChildOrder, send: Any) -> None:
    run_child(replace(order, pipe=send.fileno()))


class _Looker:
    """Knows what the children of one folder have told, and compares it with what is there."""

    def __init__(
        self, agent: TransferAgent, staging: StagingPool, folder: Path, tally: CrashTally, *, shared: bool
    ) -> None:
        self._agent, self._staging, self._folder = agent, staging, folder
        self._tally, self._shared = tally, shared
        self._stored: set[int] = set()
        self._gone: set[int] = set()

    def take_in(self, told: list[tuple[str, int]]) -> None:
        stored = {number for kind, number in told if kind == "P"}
        gone = {number for kind, number in told if kind == "G"}
        self._tally.puts_reported += len(stored)
        self._tally.evictions_reported += len(gone)
        self._stored |= stored
        self._gone |= gone

    async def look(self, settings: DiskSettings, numbers: int) -> None:
        """Open the folder and read everything."""
        tally = self._tally
        kind = SharedDiskTier if self._shared else DiskTier
        start = time.perf_counter()
        tier = await kind.open(self._agent, self._folder, 64 << 20, settings=settings)
        tally.slowest_open_s = max(tally.slowest_open_s, time.perf_counter() - start)
        driver = TierDriver(tier, self._staging)
        found = {n for n in range(numbers) if tier.size_of(object_key(n)) is not None}
        for number in sorted(found):
            try:
                tally.wrong += not await self._sound(driver, number)
                tally.objects_checked += 1
            except ObjectMissingError:
                # Its writer was killed between telling that it is gone and telling it in its journal.
                found.discard(number)
        lost = self._stored - self._gone - found
        tally.lost += len(lost)
        tally.damaged += tier.stats().corrupt_dropped
        tally.unreported += len(found - self._stored - self._gone)
        tally.resurrected += len(found & self._gone)
        if lost or tier.stats().corrupt_dropped:
            tally.findings.append(f"kill {tally.kills}: lost {sorted(lost)[:5]}, {tier.stats()}"[:300])
        await tier.close()
        tally.largest_folder_bytes = max(tally.largest_folder_bytes, _bytes_on_disk(self._folder))
        # From here on the folder is what it is: what was resurrected may be evicted again, and told again.
        self._stored, self._gone = found, set()

    async def _sound(self, driver: TierDriver, number: int) -> bool:
        size = object_size(number)
        try:
            return await driver.get(number, 0, size) == object_bytes(number, size)
        except ObjectMissingError:
            raise
        except KvtcError:
            return False


def _bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
