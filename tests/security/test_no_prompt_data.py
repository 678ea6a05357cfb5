"""Metrics, status and logs tell nothing of prompts, salts or KV, also when something fails."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from rig import open_rig

from dynamo_kvtc.errors import KvtcError
from dynamo_kvtc.observability.logs import LineFormatter
from dynamo_kvtc.observability.prometheus import exposition
from dynamo_kvtc.pipeline.blocks import SequenceBlocks
from dynamo_kvtc.testing import FaultyTier

PROMPT = b"the patient's name is"
SALT = b"secret-tenant-salt"


async def test_nothing_of_a_request_is_in_status_metrics_or_logs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="dynamo_kvtc")
    errors: list[str] = []
    damaged = {1: KvtcError("ordered"), 3: KvtcError("ordered")}
    async with open_rig(tmp_path, wrap=lambda tier, _: FaultyTier(tier, failing=damaged)) as rig:
        hashes = [PROMPT + b" %d" % index for index in range(12)]
        blocks = SequenceBlocks(hashes, list(range(12)), SALT)
        missing = SequenceBlocks([b"another " + one for one in hashes], list(range(12)), SALT)
        await rig.adapter.offload(blocks, rig.source).wait()
        await rig.adapter.lookup(hashes, salt=SALT)
        for wanted in (blocks, blocks, blocks, missing):
            try:
                await rig.adapter.onboard(wanted, rig.destination).wait()
            except KvtcError as error:
                errors += [str(error), repr(error.__cause__)]
        status = rig.adapter.status().to_dict()
    assert errors, "nothing failed, so this shows nothing of failures"
    metrics, _ = exposition(status)
    lines = "\n".join(LineFormatter().format(record) for record in caplog.records)
    told = "\n".join([json.dumps(status, default=str), metrics.decode(), lines, *errors])
    for secret in (PROMPT, SALT, b"patient"):
        assert secret.decode() not in told
        assert secret.hex() not in told
