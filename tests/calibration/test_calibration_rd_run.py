from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dynamo_kvtc.calibration import run, stages
from dynamo_kvtc.calibration.artifact import Artifact, load_artifact
from dynamo_kvtc.calibration.models import load_model
from dynamo_kvtc.calibration.rd_run import RdCalibration
from dynamo_kvtc.calibration.run import calibrate
from dynamo_kvtc.calibration.sensitivity_stage import SensitivityStage
from dynamo_kvtc.calibration.settings import CalibrationSettings, InputDigests
from dynamo_kvtc.calibration.text import Documents
from dynamo_kvtc.calibration.validation import Validator
from dynamo_kvtc.codec.geometry import LayerRange
from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.codec.rd import RdCodec
from dynamo_kvtc.errors import CalibrationError, CalibrationStoppedError
from tests.tiny_model import write_tiny_model

MAX_KL = 0.03


@pytest.fixture(scope="module")
def base(texts, tmp_path_factory) -> CalibrationSettings:
    """A model whose attention is far from uniform, so that its keys and values matter."""
    folder = tmp_path_factory.mktemp("tiny-rd-model")
    write_tiny_model(folder)
    return CalibrationSettings(
        model=str(folder),
        texts=texts,
        out=folder / "artifact",
        profile="rd",
        tokens=2400,
        ratios=(4.0, 8.0),
        max_kls=(MAX_KL,),
        layers_per_group=2,
        document_tokens=300,
        dtype="float32",
        recent_window=16,
        sample_tokens=200,
        validation_documents=2,
        sensitivity_documents=3,
        scored_tokens=32,
        recall_share=0.0,
    )


@pytest.fixture(scope="module")
def rd_artifact(base) -> Artifact:
    """The artifact of `base`; tests only read it."""
    return calibrate(base)


@pytest.fixture
def rd_settings(base, tmp_path) -> CalibrationSettings:
    return dataclasses.replace(base, out=tmp_path / "artifact")


def _validator(settings: CalibrationSettings) -> Validator:
    loaded = load_model(settings.model, settings.dtype)
    documents = Documents(
        settings.texts,
        loaded.tokenizer,
        tokens=settings.tokens,
        document_tokens=settings.document_tokens,
        seed=settings.seed,
    )
    kept_back = [documents[index] for index in range(len(documents) - 2, len(documents))]
    return Validator(
        loaded, kept_back, scored_tokens=settings.scored_tokens, recent_window=settings.recent_window
    )


def test_the_artifact_is_one_of_rd_and_tells_where_it_comes_from(base, rd_artifact):
    again = load_artifact(base.out)
    assert again.manifest == rd_artifact.manifest
    manifest = again.manifest
    assert manifest.profile == "rd"
    record = manifest.calibration
    assert (record.documents, record.validation_documents, record.sensitivity_documents) == (6, 2, 3)
    assert (record.scored_tokens, record.sensitivity) == (32, "gradients")
    assert [group.layers for group in again.parameters.groups] == [LayerRange(0, 2), LayerRange(2, 1)]
    assert isinstance(open_codec(again.parameters, ratio=4.0), RdCodec)
    assert (base.out / "report.md").is_file()
    assert not (base.out / run.STATE_FOLDER).exists()


def test_one_step_serves_all_sides_and_groups_of_a_plan(rd_artifact):
    for plan_id in rd_artifact.parameters.ratios:
        steps = {
            side.plans[plan_id].step
            for group in rd_artifact.parameters.groups
            for side in (group.keys, group.values)
        }
        assert len(steps) == 1


def test_targets_are_met_by_real_streams(rd_artifact):
    measured = {entry.ratio: entry.measured for entry in rd_artifact.manifest.ratios}
    assert len(measured) == 3
    for ratio in (4.0, 8.0):
        # Streams of some hundred tokens of a tiny model are to a quarter headers and levels.
        assert measured[ratio].ratio == pytest.approx(ratio, rel=0.03)
    [within] = [entry for ratio, entry in measured.items() if ratio not in (4.0, 8.0)]
    assert 0 < within.kl <= MAX_KL
    assert 4 < within.ratio < 8
    by_ratio = sorted(measured.values(), key=lambda entry: entry.ratio)
    kls = [entry.kl for entry in by_ratio]
    assert kls == sorted(kls)
    assert rd_artifact.parameters.ratios[rd_artifact.parameters.plan_id_within(MAX_KL)] == pytest.approx(
        within.ratio, rel=1e-3
    )


def test_the_written_artifact_does_what_was_measured(base, rd_artifact):
    validator = _validator(base)
    for entry in rd_artifact.manifest.ratios:
        measured = validator.measure(RdCodec(rd_artifact.parameters, ratio=entry.ratio))
        assert measured.ratio == pytest.approx(entry.measured.ratio, rel=1e-6)
        assert measured.kl == pytest.approx(entry.measured.kl, rel=1e-6)
        assert (measured.top1, measured.tokens) == (entry.measured.top1, entry.measured.tokens)


def test_expected_errors_rise_with_the_ratio(rd_artifact):
    by_plan = {error.plan_id: error for error in rd_artifact.manifest.expected_error}
    ratios = rd_artifact.parameters.ratios
    ordered = [by_plan[plan_id] for plan_id in sorted(ratios, key=ratios.__getitem__)]
    for low, high in pairwise(ordered):
        assert len(low.keys) == len(low.values) == 3
        assert sum(low.keys) < sum(high.keys) and sum(low.values) < sum(high.values)
        assert all(0 <= error < 1 for error in low.keys + low.values)


def test_calibration_repeats_exactly_and_the_seed_matters(rd_artifact, rd_settings, tmp_path):
    steps: list[run.Progress] = []
    assert calibrate(rd_settings, steps.append).manifest.id == rd_artifact.manifest.id
    other = calibrate(dataclasses.replace(rd_settings, out=tmp_path / "other", seed=1))
    assert other.manifest.id != rd_artifact.manifest.id
    done = [step.done for step in steps]
    assert done == sorted(done)
    assert steps[-1].done == steps[-1].total
    assert {step.total for step in steps} == {steps[0].total}


# Three documents of sensitivity, six of keys and values, four bases, three plans: one question after each.
@pytest.mark.parametrize("question", [2, 6, 9, 12, 15])
def test_a_stopped_calibration_continues_to_the_same_artifact(rd_artifact, rd_settings, question):
    asked = 0

    def stop_once() -> bool:
        nonlocal asked
        asked += 1
        return asked == question

    with pytest.raises(CalibrationStoppedError, match="run the same command again"):
        calibrate(rd_settings, should_stop=stop_once)
    assert not (rd_settings.out / "artifact.json").exists()
    steps: list[run.Progress] = []
    assert calibrate(rd_settings, steps.append).manifest.id == rd_artifact.manifest.id
    captured = [step for step in steps if step.stage == "capture keys and values"]
    assert len(captured) == min(6, max(0, 9 - question))


def test_a_stop_at_every_step_ends_at_the_same_artifact(rd_artifact, rd_settings):
    stops = 0
    while True:
        asked = 0

        def stop_later(limit: int = stops + 1) -> bool:
            nonlocal asked
            asked += 1
            return asked == limit

        try:
            artifact = calibrate(rd_settings, should_stop=stop_later)
        except CalibrationStoppedError:
            stops += 4
            assert stops < 40
        else:
            break
    assert stops > 0
    assert artifact.manifest.id == rd_artifact.manifest.id


@pytest.mark.parametrize("name", ["sensitivity-0", "statistics", "basis-0-keys"])
def test_damaged_state_is_refused(rd_settings, name):
    asked = 0

    def stop_in_the_bases() -> bool:
        nonlocal asked
        asked += 1
        return asked == 11

    with pytest.raises(CalibrationStoppedError):
        calibrate(rd_settings, should_stop=stop_in_the_bases)
    path: Path = rd_settings.out / run.STATE_FOLDER / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CalibrationError, match="damaged"):
        calibrate(rd_settings)


def test_the_forward_only_estimate_calibrates_too(rd_artifact, rd_settings):
    artifact = calibrate(dataclasses.replace(rd_settings, sensitivity="forward", max_kls=()))
    assert artifact.manifest.calibration.sensitivity == "forward"
    assert artifact.manifest.id != rd_artifact.manifest.id
    for group in artifact.parameters.groups:
        for side in (group.keys, group.values):
            assert not side.importance.any() and side.importance_bias == 0  # nothing tells tokens apart
    for entry in artifact.manifest.ratios:
        assert entry.measured.ratio == pytest.approx(entry.ratio, rel=0.03)
        assert entry.measured.kl > 0


def test_recall_documents_are_fitted_and_none_of_them_validates(rd_artifact, rd_settings):
    with_recall = dataclasses.replace(rd_settings, recall_share=0.5)
    assert with_recall.recall_documents() == [0, 3, 4]  # of six; the last two validate
    artifact = calibrate(with_recall)
    assert artifact.manifest.calibration.recall_share == 0.5
    assert artifact.manifest.calibration.documents == rd_artifact.manifest.calibration.documents
    assert artifact.manifest.id != rd_artifact.manifest.id
    assert rd_artifact.manifest.calibration.recall_share is None  # of none there is no word


def test_the_sensitivity_comes_from_recall_documents_by_their_share(rd_settings, tmp_path):
    settings = dataclasses.replace(rd_settings, recall_share=0.34)
    loaded = load_model(settings.model, settings.dtype)
    calibration = RdCalibration(settings, loaded, InputDigests("", ""), print, lambda: False)
    documents = calibration.documents()
    stage = SensitivityStage(loaded, settings, documents, 6, settings.layer_groups(loaded.geometry), tmp_path)
    assert [documents.is_recall(index) for index in stage._chosen].count(True) == 1
    assert len(stage) == len(set(stage._chosen)) == 3


def test_kept_back_documents_take_no_part_in_the_fit(rd_artifact, rd_settings, tmp_path):
    # The kept-back documents are the last stretches of both files: other text there, same bases.
    changed = []
    for path in rd_settings.texts:
        data = path.read_bytes()
        size = len(data) * 3 // 4 + 4
        other = tmp_path / path.name
        other.write_bytes(data[:size] + b"other words\n" * ((len(data) - size) // 12))
        other.write_bytes((other.read_bytes() + b"\n" * 12)[: len(data)])
        changed.append(other)
    artifact = calibrate(dataclasses.replace(rd_settings, texts=tuple(changed)))
    assert artifact.manifest.calibration.text_digest != rd_artifact.manifest.calibration.text_digest
    pairs = zip(artifact.parameters.groups, rd_artifact.parameters.groups, strict=True)
    for mine, theirs in pairs:
        assert torch.equal(mine.keys.mean, theirs.keys.mean)
        assert torch.equal(mine.values.metric, theirs.values.metric)
        rank = min(mine.keys.basis.shape[0], theirs.keys.basis.shape[0])
        assert torch.equal(mine.keys.basis[:rank], theirs.keys.basis[:rank])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokens": 600}, "leave none to fit"),
        ({"tokens": 900, "recent_window": 100}, "at least 256"),
        ({"document_tokens": 80}, "--document-tokens"),
        ({"ratios": (400.0,)}, "no step reaches a ratio of 400"),
        ({"max_kls": (1e-8,)}, "no step reached a KL"),
    ],
)
def test_what_cannot_be_reached_is_refused(rd_settings, change, says):
    with pytest.raises(CalibrationError, match=says):
        calibrate(dataclasses.replace(rd_settings, **change))
    assert not (rd_settings.out / "artifact.json").exists()


def test_too_little_text_is_refused_before_anything_is_captured(rd_settings, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a few words\n" * 40)
    steps: list[run.Progress] = []
    with pytest.raises(CalibrationError, match="more text"):
        calibrate(dataclasses.replace(rd_settings, texts=(short,)), steps.append)
    assert steps == []


def test_covariances_beyond_the_memory_are_refused_at_once(rd_settings, monkeypatch):
    # Stands in for a machine with 64 KiB of memory.
    monkeypatch.setattr(stages.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 16}.__getitem__)
    steps: list[run.Progress] = []
    with pytest.raises(CalibrationError, match="--layers-per-group"):
        calibrate(rd_settings, steps.append)
    assert steps == []
