"""What streams take beyond their symbols' entropy, on a tiny model's real streams."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.quality.__main__ import app
from benchmarks.quality.packing import measure_packing
from benchmarks.quality.tasks.text import TextTask
from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.calibration.model_cache import prefill
from dynamo_kvtc.calibration.models import LoadedModel
from dynamo_kvtc.calibration.run import calibrate
from dynamo_kvtc.calibration.settings import CalibrationSettings
from dynamo_kvtc.codec.base import TierBlock
from dynamo_kvtc.codec.bitstream import read_section
from dynamo_kvtc.codec.header import SectionKind, header_size
from dynamo_kvtc.codec.rd import RdCodec
from dynamo_kvtc.codec.rd_packing import RdLayout, unpack
from dynamo_kvtc.data import CALIBRATION_TEXTS
from dynamo_kvtc.errors import ArtifactMismatchError, EvaluationError


@pytest.fixture(scope="session")
def byte_rd_artifact(byte_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return calibrate(
        CalibrationSettings(
            model=str(byte_model_folder),
            texts=CALIBRATION_TEXTS,
            out=tmp_path_factory.mktemp("byte-rd-artifact"),
            profile="rd",
            tokens=2400,
            ratios=(4.0,),
            document_tokens=600,
            sample_tokens=512,
            scored_tokens=64,
            sensitivity_documents=2,
            validation_documents=1,
            recall_share=0.0,
            dtype="float32",
        )
    )


_TASK = TextTask(per_domain=1, context_tokens=400, scored_tokens=16, domains=("prose",))


def test_everything_but_sinks_and_header_is_held_against_the_symbols_entropy(
    byte_model: LoadedModel, byte_rd_artifact: Artifact
) -> None:
    codec = RdCodec(byte_rd_artifact.parameters, ratio=4.0, threads=1)
    documents = _TASK.documents(byte_model.tokenizer)
    [found] = measure_packing(byte_model, [(4.0, codec)], documents, [272])

    keys, values = prefill(byte_model, documents[0].context)
    [stream] = codec.encode([TierBlock(keys[:272], values[:272], 0, 4)])
    header = codec.read_header(stream)
    group = byte_rd_artifact.parameters.groups[0]
    bits = 0.0
    for kind, side in ((SectionKind.KEYS, group.keys), (SectionKind.VALUES, group.values)):
        data = read_section(header, 0, kind, stream[slice(*header.group_span(0))])
        section = unpack(np.frombuffer(data, dtype=np.uint8), RdLayout(side.plans[0].counts), 268)
        for row in [*section.symbols.tolist(), section.levels.tolist()]:
            bits -= sum(count * math.log2(count / 268) for count in Counter(row).values())
    assert found.entropy_bytes == pytest.approx(bits / 8)

    # What is not a section of keys or values: the header without their rows of the table, and the sinks.
    sinks = header.chunks_of(0, SectionKind.SINKS)
    coded = header.chunks[: -len(sinks)]
    apart = header_size(len(header.chunks)) - 32 * len(coded) + (len(stream) - sinks[0].offset)
    assert found.stored_bytes == len(stream) - apart
    assert found.side_bytes == found.stored_bytes - sum(chunk.stored_size for chunk in coded)
    assert found.excess == found.stored_bytes / found.entropy_bytes - 1
    assert found.ratio == 272 * byte_model.geometry.token_bytes_16bit / len(stream)


def test_command_measures_every_plan_with_every_size_of_blocks(
    byte_model_folder: Path, byte_rd_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNAMO_KVTC_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "packing.json"
    arguments = ["packing", "--model", str(byte_model_folder), "--artifact", str(byte_rd_artifact.folder)]
    arguments += ["--context-tokens", "400", "--out", str(out)]
    with pytest.raises(ArtifactMismatchError, match="it has 4"):
        CliRunner().invoke(app, [*arguments, "--ratios", "5"], catch_exceptions=False)
    assert "not a list" in CliRunner().invoke(app, [*arguments, "--ratios", "five"]).output
    with pytest.raises(EvaluationError, match="choose deflate or rans"):
        CliRunner().invoke(app, [*arguments, "--entropy", "lzma"], catch_exceptions=False)
    result = CliRunner().invoke(app, [*arguments, "--entropy", "rans"], catch_exceptions=False)
    assert result.exit_code == 0
    assert json.loads(out.read_text())["settings"]["entropy"] == "rans"
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "4x" in result.stdout
    written = json.loads(out.read_text())
    rows = {row["tier_block_tokens"]: row for row in written["rows"]}
    assert rows[64]["excess"] > rows[256]["excess"] > rows[1024]["excess"]
    assert rows[64]["tokens"] == rows[256]["tokens"] == rows[1024]["tokens"] == 4 * 272
    assert written["settings"]["artifact"] == byte_rd_artifact.parameters.artifact_id.hex()
