from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.calibration.model_cache import prefill, score
from dynamo_kvtc.calibration.models import LoadedModel, load_model
from dynamo_kvtc.codec.base import TierBlock
from dynamo_kvtc.codec.kvtc import KvtcCodec
from dynamo_kvtc.codec.raw import RawCodec
from dynamo_kvtc.data import HELDOUT_TEXTS
from dynamo_kvtc.errors import ArtifactMismatchError, EvaluationError
from dynamo_kvtc.evaluation import (
    CodecUnderTest,
    EvaluationProtocol,
    EvaluationReport,
    codecs_under_test,
    evaluate,
    evaluate_codecs,
)
from dynamo_kvtc.evaluation.plot import plot_ratio_against_kl
from dynamo_kvtc.evaluation.report import ratio_at_kl
from dynamo_kvtc.evaluation.run import read_documents


@pytest.fixture(scope="module")
def report(
    tiny_model: LoadedModel, tiny_artifact: Artifact, short_protocol: EvaluationProtocol
) -> EvaluationReport:
    return evaluate(tiny_model, tiny_artifact, HELDOUT_TEXTS, protocol=short_protocol)


class _RecordingCodec(RawCodec):
    """Keeps what it was given and decodes every number as its negative."""

    def encode(self, blocks: Sequence[TierBlock]) -> list[bytes]:
        self.blocks = list(blocks)
        return super().encode([dataclasses.replace(b, keys=-b.keys, values=-b.values) for b in blocks])


def test_scoring_behind_a_cache_is_the_models_own_forward_pass(tiny_folder: Path) -> None:
    loaded = load_model(tiny_folder, "float32")
    tokens = [int(token) for token in torch.randint(256, (40,))]
    with torch.inference_mode():
        expected = loaded.model(input_ids=torch.tensor([tokens])).logits[0, 30:]
    keys, values = prefill(loaded, tokens[:30])
    assert keys.shape == (30, 3, 2, 16)
    torch.testing.assert_close(score(loaded, keys, values, tokens[30:]), expected, rtol=1e-4, atol=1e-4)
    assert keys.shape == (30, 3, 2, 16)  # the caller's cache did not grow


def test_raw_streams_change_nothing(
    tiny_model: LoadedModel, tiny_artifact: Artifact, short_protocol: EvaluationProtocol
) -> None:
    [row] = evaluate(tiny_model, tiny_artifact, HELDOUT_TEXTS, profile="raw", protocol=short_protocol).rows
    assert (row.kl, row.top1, row.nll_delta, row.key_error, row.value_error) == (0, 1, 0, 0, 0)
    assert row.nominal_ratio == 1
    assert 0.9 < row.ratio < 1  # headers are counted
    assert row.ratio < row.ratio_total < 1


def test_every_stored_byte_is_counted_once(
    tiny_model: LoadedModel,
    tiny_artifact: Artifact,
    short_protocol: EvaluationProtocol,
    report: EvaluationReport,
) -> None:
    codec = KvtcCodec(tiny_artifact.parameters, ratio=report.rows[0].nominal_ratio)
    total = 0
    for token_ids in read_documents(tiny_model, HELDOUT_TEXTS, short_protocol):
        keys, values = prefill(tiny_model, token_ids[: short_protocol.context_tokens - 1])
        for first, stop in ((0, 64), (64, 128), (128, 160)):
            block = TierBlock(keys[first:stop], values[first:stop], first, 4 if first == 0 else 0)
            [stream] = codec.encode([block])
            total += len(stream)
    token_bytes = tiny_model.geometry.token_bytes_16bit
    assert report.rows[0].ratio == pytest.approx(2 * 160 * token_bytes / total)
    assert report.rows[0].ratio_total == pytest.approx(2 * 192 * token_bytes / (total + 2 * 32 * token_bytes))


def test_more_compression_costs_more_quality(report: EvaluationReport) -> None:
    fine, coarse = report.rows
    assert (fine.nominal_ratio, coarse.nominal_ratio) == (2.5, 4.0)
    assert fine.ratio < coarse.ratio
    assert 0 < fine.kl < coarse.kl
    assert 0 < fine.key_error < coarse.key_error < 1
    assert 0 < fine.value_error < coarse.value_error < 1
    assert 0 < coarse.top1 <= 1
    for row in report.rows:
        assert row.kl_low <= row.kl <= row.kl_high
        assert row.top1_low <= row.top1 <= row.top1_high
        assert row.nll_delta_low <= row.nll_delta <= row.nll_delta_high
    assert coarse.nll == pytest.approx(report.reference_nll + coarse.nll_delta)
    assert min(fine.encode_tokens_per_s, fine.decode_tokens_per_s) > 0


def test_only_the_coded_positions_are_replaced(
    tiny_model: LoadedModel, short_protocol: EvaluationProtocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[tuple[torch.Tensor, torch.Tensor]] = []

    def spy(
        loaded: LoadedModel, keys: torch.Tensor, values: torch.Tensor, tokens: Sequence[int]
    ) -> torch.Tensor:
        scored.append((keys, values))
        return score(loaded, keys, values, tokens)

    monkeypatch.setattr("dynamo_kvtc.evaluation.run.score", spy)
    codec = _RecordingCodec(tiny_model.geometry)
    documents = read_documents(tiny_model, HELDOUT_TEXTS, short_protocol)[:1]
    _, [row] = evaluate_codecs(tiny_model, [CodecUnderTest("negated", 1.0, codec)], documents, short_protocol)
    assert [(b.first_position, b.num_tokens, b.sink_tokens) for b in codec.blocks] == [
        (0, 64, 4),
        (64, 64, 0),
        (128, 32, 0),
    ]
    (keys, values), (negated_keys, negated_values) = scored
    for original, replaced in ((keys, negated_keys), (values, negated_values)):
        assert original.shape[0] == 191
        assert torch.equal(replaced[:4], original[:4])
        assert torch.equal(replaced[4:160], -original[4:160])
        assert torch.equal(replaced[160:], original[160:])
    assert row.kl > 0
    assert row.value_error >= 2  # every number is off by twice itself


def test_documents_are_the_same_in_every_run_and_of_full_length(
    tiny_model: LoadedModel, short_protocol: EvaluationProtocol
) -> None:
    documents = read_documents(tiny_model, HELDOUT_TEXTS, short_protocol)
    assert [len(document) for document in documents] == [208, 208]
    assert documents == read_documents(tiny_model, HELDOUT_TEXTS, short_protocol)
    assert documents[0] != documents[1]


def test_too_short_texts_are_refused(tiny_model: LoadedModel, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("A line.\n" * 20)
    with pytest.raises(EvaluationError, match="longer texts"):
        read_documents(tiny_model, [text], EvaluationProtocol(documents=1))


def test_another_models_artifact_is_refused(
    tiny_folder: Path, tiny_artifact: Artifact, short_protocol: EvaluationProtocol
) -> None:
    other = load_model(tiny_folder, "float32")
    with pytest.raises(ArtifactMismatchError, match="dtype"):
        evaluate(other, tiny_artifact, HELDOUT_TEXTS, protocol=short_protocol)


def test_the_profile_follows_from_the_artifact(
    tiny_model: LoadedModel, tiny_rd_artifact: Artifact, short_protocol: EvaluationProtocol
) -> None:
    low, high = evaluate(tiny_model, tiny_rd_artifact, HELDOUT_TEXTS, protocol=short_protocol).rows
    assert (low.profile, low.nominal_ratio) == (high.profile, high.nominal_ratio / 2) == ("rd", 4.0)
    assert low.ratio < high.ratio
    assert 0 < low.kl < high.kl


def test_profiles_and_ratios_are_checked(tiny_artifact: Artifact) -> None:
    with pytest.raises(EvaluationError, match="known: rd, kvtc, raw"):
        codecs_under_test(tiny_artifact, "gzip")
    with pytest.raises(EvaluationError, match="leave out the ratios"):
        codecs_under_test(tiny_artifact, "raw", [8.0])
    with pytest.raises(ArtifactMismatchError, match="is of profile kvtc, not rd"):
        codecs_under_test(tiny_artifact, "rd")
    with pytest.raises(ArtifactMismatchError, match="no bit plan"):
        codecs_under_test(tiny_artifact, "kvtc", [7.0])
    assert [c.nominal_ratio for c in codecs_under_test(tiny_artifact, "kvtc", [4.0])] == [4.0]


def test_progress_reaches_its_end(
    tiny_model: LoadedModel, tiny_artifact: Artifact, short_protocol: EvaluationProtocol
) -> None:
    steps: list[tuple[int, int]] = []
    evaluate(
        tiny_model,
        tiny_artifact,
        HELDOUT_TEXTS,
        protocol=short_protocol,
        on_step=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_reports_are_json_and_can_be_plotted(report: EvaluationReport, tmp_path: Path) -> None:
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert set(data["rows"][0]) == {
        "profile",
        "nominal_ratio",
        "ratio",
        "ratio_total",
        "kl",
        "kl_low",
        "kl_high",
        "top1",
        "top1_low",
        "top1_high",
        "nll",
        "nll_delta",
        "nll_delta_low",
        "nll_delta_high",
        "key_error",
        "value_error",
        "encode_tokens_per_s",
        "decode_tokens_per_s",
    }
    assert data["protocol"]["context_tokens"] == 192
    plot_ratio_against_kl([report], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(EvaluationError, match="another place"):
        plot_ratio_against_kl([report], tmp_path / "absent" / "plot.png")


def test_the_ratio_at_a_divergence_lies_on_the_line_between_two_plans(report: EvaluationReport) -> None:
    rows = [
        dataclasses.replace(report.rows[0], kl=kl, ratio=ratio)
        for kl, ratio in ((0.04, 40.0), (0.0, 2.0), (0.01, 10.0), (0.16, 60.0))
    ]
    assert ratio_at_kl(rows, 0.01) == pytest.approx(10)
    assert ratio_at_kl(rows, 0.02) == pytest.approx(20)
    assert ratio_at_kl(rows, 0.16) == pytest.approx(60)
    assert ratio_at_kl(rows, 0.009) is None
    assert ratio_at_kl(rows, 0.17) is None
    assert ratio_at_kl(rows[:1], 0.04) is None
