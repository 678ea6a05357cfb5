"""An agent listens on the interface that its settings name, and on no other; in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import asyncio, glob, os, sys
from dynamo_kvtc.transfer import AgentSettings, TransferAgent

def listening():
    inodes = set()
    for link in glob.glob("/proc/self/fd/*"):
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        for line in open(table).read().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].split(":")[0])
    return found

async def main():
    async with await TransferAgent.create(AgentSettings(**eval(sys.argv[1]))) as agent:
        region = await agent.allocate(8192)
        region.span(0, 4).view[:] = b"kvtc"
        await agent.copy([(region.span(0, 4), region.span(4096, 4))], timeout_s=10)
        assert bytes(region.span(4096, 4).view) == b"kvtc"
        print("listens on", *sorted(listening()))

asyncio.run(main())
assert "UCX_NET_DEVICES" not in os.environ
"""
#: 127.0.0.1 and ::1, as the kernel writes them.
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}


@pytest.mark.parametrize("settings", ["{}", "{'interface': 'lo'}"])
def test_an_agent_listens_on_loopback_only(settings: str) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM, settings],
        capture_output=True,
        text=True,
        timeout=120,
        env={**clean, "PYTHONPATH": str(Path.cwd())},
        check=False,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    line = next(line for line in child.stdout.splitlines() if line.startswith("listens on"))
    assert set(line.split()[2:]) <= LOOPBACK
