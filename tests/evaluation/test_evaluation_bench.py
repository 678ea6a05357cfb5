from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.cli.app import app
from dynamo_kvtc.codec.bitstream import SectionKind
from dynamo_kvtc.codec.entropy import STORE
from dynamo_kvtc.codec.kvtc import KvtcCodec
from dynamo_kvtc.codec.raw import RawCodec
from dynamo_kvtc.errors import EvaluationError
from dynamo_kvtc.evaluation.bench import BenchSettings, bench_codecs, bench_tiers
from dynamo_kvtc.evaluation.codec_speed import entropy_coding, measure_codec
from dynamo_kvtc.evaluation.environment import describe_environment
from dynamo_kvtc.evaluation.synthetic import synthetic_blocks

_SMALL = BenchSettings(tier_blocks=2, tier_block_tokens=128, repetitions=1)


def test_synthetic_kv_has_the_calibrated_statistics(tiny_artifact: Artifact) -> None:
    blocks = synthetic_blocks(tiny_artifact, 8, 256)
    parameters = tiny_artifact.parameters
    assert [(block.first_position, block.sink_tokens) for block in blocks[:2]] == [(0, 4), (256, 0)]
    for block in blocks:
        block.check(parameters.geometry)
    [group] = parameters.groups
    keys = torch.cat([block.keys for block in blocks])
    rows = parameters.rope.remove_rope(keys, torch.arange(keys.shape[0])).flatten(1)
    deviation = (rows - group.keys.mean) @ group.keys.basis[0]
    assert float(deviation.var()) == pytest.approx(float(tiny_artifact.variances[0, "keys"][0]), rel=0.15)


def test_synthetic_kv_of_rd_takes_about_the_bytes_of_real_kv(tiny_rd_artifact: Artifact) -> None:
    for bench, entry in zip(
        bench_codecs(tiny_rd_artifact, None, _SMALL), tiny_rd_artifact.manifest.ratios, strict=True
    ):
        assert entry.measured is not None
        assert bench.speed.ratio == pytest.approx(entry.measured.ratio, rel=0.25)


def test_shares_cover_every_stage_and_sum_to_one(any_artifact: Artifact) -> None:
    for bench in bench_codecs(any_artifact, None, _SMALL):
        speed = bench.speed
        assert speed.tokens == 256
        assert min(speed.encode_tokens_per_s, speed.decode_tokens_per_s) > 0
        for shares in (speed.encode_shares, speed.decode_shares):
            assert sum(shares.values()) == pytest.approx(1)
            assert all(0 < share < 1 for share in shares.values()), shares


def test_a_codec_without_stages_of_its_own_can_be_measured(tiny_artifact: Artifact) -> None:
    blocks = synthetic_blocks(tiny_artifact, 1, 64)
    codec = RawCodec(tiny_artifact.parameters.geometry)
    speed = measure_codec(codec, codec, blocks, repetitions=1)
    assert 0.9 < speed.ratio < 1
    assert speed.encode_shares["centre and project"] == 0
    assert speed.encode_shares["entropy coding"] > 0


def test_entropy_coding_counts_exactly_the_coded_chunks(tiny_artifact: Artifact) -> None:
    codec = KvtcCodec(tiny_artifact.parameters, ratio=4.0)
    streams = codec.encode(synthetic_blocks(tiny_artifact, 2, 256))
    measured = entropy_coding(codec, streams)
    chunks = [c for s in streams for c in codec.read_header(s).chunks if c.coder_id != STORE]
    assert {chunk.kind for chunk in chunks} >= {SectionKind.KEYS, SectionKind.VALUES}
    assert measured.plain_bytes == sum(chunk.plain_size for chunk in chunks)
    assert measured.stored_bytes == sum(chunk.stored_size for chunk in chunks)
    # Chunks this small pay much for their Huffman tables; repetitions are too rare to win it back.
    assert 0.9 < measured.stored_bytes / measured.entropy_bytes < 1.3


def test_entropy_of_stored_chunks_is_not_counted(tiny_artifact: Artifact) -> None:
    codec = RawCodec(tiny_artifact.parameters.geometry)
    measured = entropy_coding(codec, codec.encode(synthetic_blocks(tiny_artifact, 1, 64)))
    assert (measured.plain_bytes, measured.stored_bytes, measured.entropy_bytes) == (0, 0, 0.0)


async def test_tiers_are_measured_and_leave_nothing(tmp_path: Path) -> None:
    host, disk = await bench_tiers(BenchSettings(repetitions=1, prefix_keys=50, disk=tmp_path))
    assert (host.name, disk.name) == ("host", "disk")
    for tier in (host, disk):
        assert min(tier.write_bytes_per_s, tier.read_bytes_per_s, tier.lookup_s) > 0
    assert list(tmp_path.iterdir()) == []


async def test_a_disk_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="give another"):
        await bench_tiers(BenchSettings(disk=tmp_path / "absent"))


def test_the_environment_does_not_name_the_machine() -> None:
    environment = describe_environment()
    assert set(environment) == {"date", "cpu", "cores", "torch_threads", "python", "versions"}
    # What is installed need not name the CUDA version that torch was built for.
    assert torch.__version__.startswith(environment["versions"]["torch"])


def test_command(tiny_artifact: Artifact, tmp_path: Path) -> None:
    arguments = ["bench", "--artifact", str(tiny_artifact.folder), "--disk", str(tmp_path)]
    arguments += ["--tokens", "128", "--repetitions", "1", "--ratios", "4"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [codec["nominal_ratio"] for codec in report["codecs"]] == [4.0]
    assert [tier["name"] for tier in report["tiers"]] == ["host", "disk"]

    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for word in ("encode tok/s", "quantise", "apply RoPE", "1,000 keys"):
        assert word in result.stdout
