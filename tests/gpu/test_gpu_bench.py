"""``bench gpu``: all of it on a tiny shape, in the interpreter, whose times mean nothing: none is checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dynamo_kvtc.cli.app import app
from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.stages import DECODE_STAGES, ENCODE_STAGES
from dynamo_kvtc.codec.rope import RopeParameters
from dynamo_kvtc.errors import EvaluationError
from dynamo_kvtc.evaluation.gpu.made_up import PLAN_ID, make_up
from dynamo_kvtc.evaluation.gpu.measure import GpuBenchSettings, bench_gpu
from dynamo_kvtc.evaluation.gpu.plot import plot_roofline
from dynamo_kvtc.evaluation.gpu.prediction import ASSUMPTIONS, predict
from dynamo_kvtc.evaluation.gpu.rans_time import RANS_ASSUMPTIONS, rans_seconds
from dynamo_kvtc.evaluation.gpu.rates import Rates, data_sheet
from dynamo_kvtc.evaluation.gpu.report import GpuReport
from dynamo_kvtc.evaluation.gpu.shapes import SHAPES, BenchShape, find_shapes
from dynamo_kvtc.evaluation.gpu.tables import markdown, tables
from dynamo_kvtc.evaluation.gpu.work import StageWork, describe_sides, stage_work

TINY = BenchShape(
    "tiny", KvGeometry(4, 2, 16, "bfloat16"), RopeParameters(theta=1e4, rotary_dim=16), 1000.0, 4
)
SETTINGS = GpuBenchSettings(tokens=32, tier_block_tokens=16, block_size=8, repetitions=1, layers_per_group=2)
DOCS = Path(__file__).parents[2] / "docs" / "gpu.md"


async def test_a_tiny_shape_is_measured_whole(gpu: GpuDevice, tmp_path: Path) -> None:
    report = await bench_gpu([TINY], SETTINGS, gpu)
    assert report.rates.source == "measured"
    assert [(shape.shape, shape.profile) for shape in report.shapes] == [("tiny", "rd"), ("tiny", "kvtc")]
    for shape in report.shapes:
        check_shape(shape, report.rates)
        # KV of a made-up model was really encoded, stored, read and decoded.
        assert 0 < shape.relative_error < 0.5
        assert 3 < shape.ratio < 17
        assert [onboard.source for onboard in shape.onboard] == ["host", "disk"]
        for onboard in shape.onboard:
            assert 0 < onboard.first_layer_s <= onboard.first_group_s <= onboard.seconds
            assert onboard.first_group_share == onboard.first_group_s / onboard.seconds
    read = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert read["settings"]["tokens"] == 32
    assert read["published"]["raw_bytes"] == 10.7e9
    assert "measured" in markdown(tables(report))
    plot_roofline(report, tmp_path / "roof.png")
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")


def check_shape(shape, rates: Rates) -> None:
    """Every sum, share and floor of a report follows from its parts."""
    assert shape.raw_bytes == shape.tokens * TINY.raw_bytes
    for direction, names in ((shape.encode, ENCODE_STAGES), (shape.decode, DECODE_STAGES)):
        assert tuple(stage.name for stage in direction.stages) == names
        by_name = {stage.name: stage for stage in direction.stages}
        assert all(stage.seconds is not None and stage.seconds > 0 for stage in direction.stages)
        for stage in direction.stages:
            if stage.link_bytes:
                rate = rates.to_host if stage.name == "copy to host" else rates.to_device
                assert stage.floor_s == pytest.approx(stage.link_bytes / rate)
            elif stage.name != "verify":
                least = max(stage.operations / rates.matrix, stage.bytes / rates.memory)
                assert stage.floor_s == pytest.approx(least)
            if stage.floor_s is not None:
                assert stage.of_floor == pytest.approx(stage.floor_s / stage.seconds)
        device = {n: s.seconds for n, s in by_name.items() if not n.startswith("copy") and n != "verify"}
        assert direction.device_s == pytest.approx(sum(device.values()))
        assert direction.longest == max(device, key=device.__getitem__)
        assert direction.seconds >= direction.device_s * 0.99 or torch.cuda.is_available()
        assert direction.raw_bytes_per_s == pytest.approx(shape.raw_bytes / direction.seconds)
        assert direction.tokens_per_s == pytest.approx(shape.tokens / direction.seconds)
        assert direction.device_raw_bytes_per_s == pytest.approx(shape.raw_bytes / direction.device_s)
    assert shape.alternatives.raw_copy_s == pytest.approx(shape.raw_bytes / rates.to_device)
    operations = 1000.0 * 32 + 4 * 4 * 4 * 16 * 32**2 / 2
    assert shape.alternatives.recompute_s == pytest.approx(operations / rates.matrix)


@pytest.mark.parametrize("profile", ["rd", "kvtc"])
def test_work_is_counted_as_kernels_do_it(profile: str) -> None:
    parameters = make_up(TINY, profile, layers_per_group=2, with_bases=False).parameters
    sides = describe_sides(parameters, PLAN_ID)
    assert [side.row for side in sides] == [64] * 4
    work = stage_work(TINY, sides, coded_bytes=10.0, batch_tokens=32)
    raw, stored = TINY.raw_bytes, sum(side.stored for side in sides)
    assert raw == 4 * 2 * 16 * 2 * 2
    assert work["gather"] == StageWork(bytes=2 * raw)
    assert work["inverse product, scatter"].operations == 2 * 64 * stored
    assert work["inverse product, scatter"].bytes == 4 * 2 * 64 + 4 * 2 * 64 * 64 / 32 + raw
    assert work["copy to device"] == StageWork(link_bytes=10.0)
    plain = sum(side.plain_bytes for side in sides)
    assert work["inflate"].bytes == plain + 10.0
    assert work["project, quantise, pack"].bytes == raw + 4 * 2 * 64 * 64 / 32 + plain


def test_made_up_sizes_need_no_bases() -> None:
    for profile in ("rd", "kvtc"):
        with_bases = make_up(TINY, profile, layers_per_group=2).parameters
        without = make_up(TINY, profile, layers_per_group=2, with_bases=False).parameters
        assert describe_sides(with_bases, PLAN_ID) == describe_sides(without, PLAN_ID)
        for group in with_bases.groups:
            basis = group.keys.basis
            assert torch.allclose(basis @ basis.T, torch.eye(basis.shape[0]), atol=1e-5)


def test_a_prediction_is_its_assumptions() -> None:
    rates = Rates("X", "data sheet", 1e15, 1e12, 5e10, 4e10)
    report = predict(SHAPES, ["rd", "kvtc"], rates, tokens=1024)
    assert len(report.shapes) == 8
    for shape in report.shapes:
        stages = {stage.name: stage for stage in (*shape.encode.stages, *shape.decode.stages)}
        product = stages["inverse product, scatter"]
        assert product.seconds == pytest.approx(
            max(product.operations / rates.matrix / 0.6, product.bytes / rates.memory / 0.8)
        )
        assert stages["gather"].of_floor == pytest.approx(0.8)
        assert stages["copy to device"].of_floor == pytest.approx(0.85)
        assert stages["inflate"].seconds == pytest.approx(
            (stages["inflate"].bytes - stages["copy to device"].link_bytes)
            / ASSUMPTIONS["inflate_bytes_per_s"]
        )
        assert stages["verify"].seconds is None
        assert shape.relative_error is None


def test_rans_is_predicted_from_its_chains() -> None:
    rates = Rates("X", "data sheet", 132 * 4096 * 1e9, 1e12, 5e10, 4e10)  # a clock of 1 GHz
    assumed = RANS_ASSUMPTIONS
    sides = describe_sides(make_up(SHAPES[1], "rd", with_bases=False).parameters, PLAN_ID)
    plain = sum(side.plain_bytes for side in sides)
    # Few warps: a launch takes as long as one chunk, in each layer group.
    few = rans_seconds("inflate", sides, 256, rates)
    steps = 65_536 / 32
    assert 0.5 < few / (5 * steps * assumed["inflate_cycles"] / 1e9) <= 1
    # Many: what is issued bounds it.
    tokens = 1 << 17
    many = rans_seconds("deflate", sides, tokens, rates)
    issued = tokens * plain / 32 * assumed["deflate_instructions"] / (132 * 4)
    assert many == pytest.approx(issued / 1e9, rel=0.25)
    report = predict(SHAPES[1:2], ["rd"], rates, entropy="rans")
    (shape,) = report.shapes
    assert shape.coder == "rANS"
    stages = {stage.name: stage for stage in (*shape.encode.stages, *shape.decode.stages)}
    assert stages["inflate"].seconds == pytest.approx(rans_seconds("inflate", sides, 8192, rates))
    # No slots: payloads are neither copied into them nor out of them.
    before = predict(SHAPES[1:2], ["rd"], rates).shapes[0]
    assert before.encode.stages[3].bytes - shape.encode.stages[3].bytes == pytest.approx(2 * plain * 8192)
    assert before.decode.stages[3].bytes - shape.decode.stages[3].bytes == pytest.approx(2 * plain * 8192)


def test_shapes_are_the_models() -> None:
    nemo, rank = SHAPES[1], SHAPES[3]
    assert nemo.raw_bytes == 163_840  # 10.7 GB in 8 times 8K tokens
    assert rank.raw_bytes == 80 * 1 * 128 * 2 * 2
    # Twelve billion weights, of which two matrices of 131,072 times 5,120 belong to the vocabulary.
    assert nemo.token_operations == pytest.approx(2 * (12.2e9 - 2 * 131_072 * 5120), rel=0.02)
    assert find_shapes("mistral,qwen") == (nemo, SHAPES[2])
    with pytest.raises(EvaluationError, match="known"):
        find_shapes("mistral,gpt")
    with pytest.raises(EvaluationError, match="H100"):
        data_sheet("A100")
    with pytest.raises(EvaluationError, match="divide"):
        GpuBenchSettings(tokens=100)


def test_the_documentation_states_this_prediction_and_no_result() -> None:
    text = DOCS.read_text()
    for device, entropy in (("H100", "deflate"), ("H200", "deflate"), ("H100", "rans")):
        report: GpuReport = predict(SHAPES, ("rd", "kvtc"), data_sheet(device), entropy=entropy)
        assert markdown(tables(report)) in text, (
            f"put in `dynamo-kvtc bench gpu --predict {device} --entropy {entropy} --markdown`"
        )


def test_command() -> None:
    arguments = ["bench", "gpu", "--predict", "h200", "--shapes", "llama-3.1", "--profiles", "rd"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["rates"]["source"] == "data sheet"
    assert [shape["shape"] for shape in report["shapes"]] == ["Llama-3.1-8B"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for word in ("predicted", "inflate", "published", "bases on the device"):
        assert word in result.stdout
    result = CliRunner().invoke(app, [*arguments, "--entropy", "rans"])
    assert result.exit_code == 0, result.output
    assert "rANS" in result.stdout
    assert CliRunner().invoke(app, ["bench", "gpu", "--profiles", "x"]).exit_code == 2
    assert CliRunner().invoke(app, ["bench", "gpu", "--entropy", "x"]).exit_code == 2
    assert CliRunner().invoke(app, ["bench"]).exit_code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, so nothing is missing")
def test_without_a_gpu_the_command_says_what_is_missing() -> None:
    result = CliRunner().invoke(app, ["bench", "gpu"])
    assert result.exit_code == 1
    assert "no usable GPU" in result.stderr
