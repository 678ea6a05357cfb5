"""inspect: artifacts, stored objects and disk tier folders, sound and damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from random_rd import write_random_rd_artifact
from typer.testing import CliRunner

from dynamo_kvtc.calibration.artifact import MANIFEST_NAME, PARAMETERS_NAME
from dynamo_kvtc.calibration.artifact_writer import FittedSide, write_artifact
from dynamo_kvtc.calibration.fingerprint import ModelFingerprint
from dynamo_kvtc.calibration.manifest import CalibrationRecord
from dynamo_kvtc.cli.app import app
from dynamo_kvtc.codec.base import TierBlock
from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange
from dynamo_kvtc.codec.plan import BitPlan, PlanGroup, QuantType
from dynamo_kvtc.codec.raw import RawCodec
from dynamo_kvtc.codec.rope import RopeParameters
from dynamo_kvtc.tiers.disk_format import (
    RECORD_HEADER_BYTES,
    SegmentHeader,
    record_bytes,
    record_header,
    segment_header,
    segment_name,
)

GEOMETRY = KvGeometry(num_layers=3, num_kv_heads=2, head_size=8)
SEGMENT = SegmentHeader(serial=7, nonce=bytes(range(16)))

runner = CliRunner()


def inspect(*paths: Path) -> tuple[int, list[dict[str, Any]]]:
    shown = runner.invoke(app, ["inspect", "--json", *map(str, paths)])
    assert shown.stderr == ""
    reports = json.loads(shown.stdout)
    assert shown.exit_code == (0 if all(report["sound"] for report in reports) else 1)
    return shown.exit_code, reports


def make_stream(key: bytes = bytes(32), tokens: int = 5) -> bytes:
    shape = (tokens, GEOMETRY.num_layers, GEOMETRY.num_kv_heads, GEOMETRY.head_size)
    kv = torch.arange(2 * torch.Size(shape).numel()).to(torch.bfloat16).reshape(2, *shape)
    return RawCodec(GEOMETRY).encode([TierBlock(kv[0], kv[1], first_position=4, binding=key)])[0]


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.fixture
def stored_object(tmp_path: Path) -> Path:
    path = tmp_path / "object.kvtc"
    path.write_bytes(make_stream())
    return path


@pytest.fixture
def tier(tmp_path: Path) -> Path:
    """A tier's folder with three objects, of which the second has been evicted."""
    folder = tmp_path / "tier"
    folder.mkdir()
    with (folder / segment_name(SEGMENT.serial)).open("wb") as file:
        file.write(segment_header(SEGMENT))
        for index in range(3):
            key = bytes([index]) * 32
            stream = make_stream(key)
            record = record_header(SEGMENT, key, len(stream), xxhash.xxh3_64_intdigest(stream)) + stream
            padded = record.ljust(record_bytes(len(stream)), b"\0")
            file.write(bytes(len(padded)) if index == 1 else padded)
    return folder


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    row = GEOMETRY.row_size
    plan = BitPlan((PlanGroup(0, 16, QuantType.INT4),))
    keys, values = (
        FittedSide(
            mean=torch.zeros(row),
            basis=torch.eye(16, row),
            variances=torch.ones(16),
            total_variance=32.0,
            plans={1: plan},
            errors={1: (error,) * GEOMETRY.num_layers},
        )
        for error in (0.25, 0.5)
    )
    folder = tmp_path / "artifact"
    write_artifact(
        folder,
        fingerprint=ModelFingerprint(
            "LlamaForCausalLM", GEOMETRY, RopeParameters(theta=1e4, rotary_dim=8), "0" * 64
        ),
        layer_groups=[LayerRange(0, GEOMETRY.num_layers)],
        sides=[(keys, values)],
        ratios={1: 8.0},
        calibration=CalibrationRecord(
            text_digest="0" * 64,
            input_digest="0" * 64,
            documents=1,
            document_tokens=64,
            rows=64,
            sample_rows=32,
            sink_tokens=4,
            recent_window=0,
            method="eigh",
            seed=0,
        ),
    )
    return folder


def test_a_sound_object(stored_object: Path) -> None:
    code, (report,) = inspect(stored_object)
    assert (code, report["kind"], report["sound"]) == (0, "object", True)
    facts = report["facts"]
    assert (facts["profile"], facts["num_tokens"], facts["first_position"]) == ("raw", 5, 4)
    assert facts["raw_bytes"] == 5 * GEOMETRY.token_bytes
    assert facts["stored_bytes"] == stored_object.stat().st_size
    assert sum(part["plain_bytes"] for part in report["parts"]) == facts["raw_bytes"]


def test_every_flipped_bit_of_an_object_is_found(stored_object: Path) -> None:
    for offset in range(0, stored_object.stat().st_size, 13):
        flip(stored_object, offset)
        assert inspect(stored_object)[1][0]["damage"], offset
        flip(stored_object, offset)
    assert inspect(stored_object)[0] == 0


@pytest.mark.parametrize("change", [-1, -40, 16])
def test_an_object_of_another_length_is_damaged(stored_object: Path, change: int) -> None:
    os.truncate(stored_object, stored_object.stat().st_size + change)
    assert inspect(stored_object)[0] == 1


def test_a_foreign_file_is_no_object(tmp_path: Path) -> None:
    for content in (b"", b"hello", bytes(5000)):
        path = tmp_path / "foreign"
        path.write_bytes(content)
        assert inspect(path)[0] == 1


def test_a_sound_tier(tier: Path) -> None:
    code, (report,) = inspect(tier)
    assert (code, report["kind"]) == (0, "disk tier")
    assert (report["facts"]["segments"], report["facts"]["objects"]) == (1, 2)
    (part,) = report["parts"]
    assert (part["profile"], part["objects"], part["tokens"]) == ("raw", 2, 10)
    assert part["raw_bytes"] == 10 * GEOMETRY.token_bytes


def test_inspection_changes_nothing(tier: Path) -> None:
    def state() -> list[tuple[str, bytes, int]]:
        return [(path.name, path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(tier.iterdir())]

    before = state()
    inspect(tier)
    assert state() == before


def test_damage_in_a_tier_is_located(tier: Path) -> None:
    segment = tier / segment_name(SEGMENT.serial)
    flip(segment, 4096 + RECORD_HEADER_BYTES + 300)
    (report,) = inspect(tier)[1]
    assert report["facts"]["objects"] == 2
    assert report["damage"] == [
        f"{segment.name}, byte {4096 + RECORD_HEADER_BYTES}: the object does not match its checksum"
    ]


@pytest.mark.parametrize("offset", [0, 4096 + 20])
def test_damaged_headers_in_a_tier_are_found(tier: Path, offset: int) -> None:
    flip(tier / segment_name(SEGMENT.serial), offset)
    assert "damaged header" in inspect(tier)[1][0]["damage"][0]


def test_an_object_under_another_key_is_damage(tier: Path) -> None:
    stream = make_stream(key=b"a" * 32)
    record = record_header(SEGMENT, b"b" * 32, len(stream), xxhash.xxh3_64_intdigest(stream)) + stream
    (tier / segment_name(SEGMENT.serial)).write_bytes(segment_header(SEGMENT) + record)
    assert "another key" in inspect(tier)[1][0]["damage"][0]


def test_a_sound_artifact(artifact: Path) -> None:
    code, (report,) = inspect(artifact)
    assert (code, report["kind"]) == (0, "artifact")
    assert report["facts"]["architecture"] == "LlamaForCausalLM"
    assert report["facts"]["key_components"] == 16
    (part,) = report["parts"]
    assert (part["ratio"], part["key_error"], part["value_error"]) == (8.0, 0.25, 0.5)


def test_a_sound_artifact_of_rd(tmp_path: Path) -> None:
    groups = [LayerRange(0, 2), LayerRange(2, 1)]
    written = write_random_rd_artifact(tmp_path, geometry=GEOMETRY, groups=groups)
    (report,) = inspect(tmp_path)[1]
    assert (report["facts"]["profile"], report["facts"]["layer_groups"]) == ("rd", 2)
    for part, entry in zip(report["parts"], written.manifest.ratios, strict=True):
        assert entry.measured is not None
        assert (part["ratio"], part["measured_ratio"]) == (entry.ratio, entry.measured.ratio)
        assert (part["measured_kl"], part["measured_top1"]) == (entry.measured.kl, entry.measured.top1)
        assert part["bits_per_token"] * part["measured_ratio"] == pytest.approx(32 * GEOMETRY.row_size)
        plans = [
            side.plans[entry.plan_id]
            for group in written.parameters.groups
            for side in (group.keys, group.values)
        ]
        assert part["step"] == plans[0].step
        assert part["nibble"] == sum(plan.counts[2] for plan in plans)


@pytest.mark.parametrize("name", [MANIFEST_NAME, PARAMETERS_NAME])
def test_a_damaged_artifact(artifact: Path, name: str) -> None:
    flip(artifact / name, (artifact / name).stat().st_size // 2)
    code, (report,) = inspect(artifact)
    assert code == 1
    assert report["damage"]


def test_several_paths_as_tables(artifact: Path, stored_object: Path, tier: Path) -> None:
    shown = runner.invoke(app, ["inspect", *map(str, (artifact, stored_object, tier))])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count("every check passed") == 3
    assert "LlamaForCausalLM" in shown.stdout


def test_damage_is_said_in_words(stored_object: Path) -> None:
    flip(stored_object, stored_object.stat().st_size - 1)
    shown = runner.invoke(app, ["inspect", str(stored_object)])
    assert shown.exit_code == 1
    assert "damaged: layer group 2, raw:" in shown.stdout
    assert "checks failed: 1" in shown.stdout


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: None])
def test_nothing_to_inspect(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "nothing"
    make(path)
    shown = runner.invoke(app, ["inspect", str(path)])
    assert shown.exit_code == (1 if path.exists() else 2)
    assert shown.stdout == "" and shown.stderr
