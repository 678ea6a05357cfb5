"""Nothing is ever unpickled: not in the code, and not by what it calls, while everything is used."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dynamo_kvtc"

#: Modules that run code of whoever wrote the bytes, and calls that may.
FORBIDDEN_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FORBIDDEN_CALLS = {
    "torch.load",
    "numpy.load",
    "np.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "eval",
    "exec",
}

PROGRAM = """
import asyncio, pickle, sys, tempfile
from pathlib import Path

sys.path[:0] = ["tests", "tests/pipeline", "tests/codec"]
import torch, nixl_cu13  # what they load at import is their own

watching, seen = False, []

def hook(event, arguments):
    # Python tells of every global that an unpickler looks up, whoever calls it.
    if watching and event.startswith("pickle."):
        seen.append((event, arguments[:2]))

sys.addaudithook(hook)

def trap(*_, **__):
    raise AssertionError("something was unpickled")

from rig import GEOMETRY, BLOCK_SIZE, make_cache, open_rig
from random_rd import write_random_rd_artifact
from dynamo_kvtc.calibration.artifact import load_artifact
from dynamo_kvtc.codec.geometry import LayerRange
from dynamo_kvtc.config import load_config
from dynamo_kvtc.pipeline.assemble import open_adapter
from dynamo_kvtc.pipeline.blocks import SequenceBlocks
from dynamo_kvtc.pipeline.lookup_client import LookupClient
from dynamo_kvtc.pipeline.lookup_service import LookupService

async def use(folder):
    groups = (LayerRange(0, 2), LayerRange(2, 2))
    write_random_rd_artifact(folder / "artifact", geometry=GEOMETRY, groups=groups)
    config = folder / "kvtc.yaml"
    config.write_text(
        "artifact: artifact\\ncodec: {ratio: 10, compute_dtype: float32}\\n"
        "tiers:\\n  - {kind: host, capacity: 1MiB}\\n"
        "  - {kind: disk, path: tier, capacity: 8MiB, shared: true}\\n"
        "policy: {tier_block_tokens: 32, recent_window: 0, minimum_tokens: 0}\\ntransfer: {staging: 4MiB}\\n"
    )
    hashes = [b"%d" % index for index in range(8)]
    for again in (False, True):  # the second time everything comes from the disk
        async with await open_adapter(load_config(config, {}), GEOMETRY, BLOCK_SIZE) as adapter:
            service = LookupService(adapter, folder / "socket")
            await service.start()
            if not again:
                await adapter.offload(SequenceBlocks(hashes, range(8)), make_cache(8, filled=True)).wait()
            client = LookupClient(folder / "socket")
            assert await asyncio.to_thread(client.lookup, hashes, timeout_s=10) == 64
            client.close()
            await adapter.onboard(SequenceBlocks(hashes, range(8)), make_cache(8, filled=False)).wait()
            adapter.status().to_dict()
            await service.close()

with tempfile.TemporaryDirectory() as folder:
    watching = True
    pickle.loads = pickle.load = pickle.Unpickler = pickle._loads = pickle._load = trap
    asyncio.run(use(Path(folder)))
    watching = False
print("saw", seen)
"""


def test_no_module_of_the_package_can_unpickle() -> None:
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")[0]]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
                found.append(f"{path.relative_to(ROOT)}: {ast.unparse(node.func)}")
            found += [
                f"{path.relative_to(ROOT)}: import {name}" for name in names if name in FORBIDDEN_MODULES
            ]
    assert found == []


def test_nothing_is_unpickled_while_blocks_are_stored_looked_up_and_onboarded() -> None:
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    assert child.stdout.splitlines()[-1] == "saw []"
