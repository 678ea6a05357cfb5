"""Intervals, summaries and bytes at equal quality, on scores whose outcome is known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.quality.equal_quality import bytes_at_equal_kl
from benchmarks.quality.measure import DocumentScore
from benchmarks.quality.report import compare_bytes, read_scores, write_score
from benchmarks.quality.summary import ALL_GROUPS, summarise
from dynamo_kvtc.errors import EvaluationError
from dynamo_kvtc.evaluation.bootstrap import ratio_interval, resample


def _score(codec: str, setting: str, document: int, kl: float, ratio: float) -> DocumentScore:
    return DocumentScore(
        model="m",
        task="text",
        group="even" if document % 2 == 0 else "odd",
        document=document,
        codec=codec,
        setting=setting,
        raw_bytes=1_000_000,
        stored_bytes=round(1_000_000 / ratio),
        tokens=100,
        kl=100 * kl,
        nll=250.0,
        reference_nll=240.0,
        agreements=90,
        probes=4,
        correct=3,
        reference_correct=4,
    )


def _curve(codec: str, factor: float, documents: int = 6) -> list[DocumentScore]:
    """A codec whose ratio is `factor` times 1000 kl, on documents that differ in difficulty."""
    return [
        _score(codec, f"{kl:g}", document, kl * (1 + 0.1 * document), factor * 1000 * kl)
        for kl in (0.002, 0.008, 0.05)
        for document in range(documents)
    ]


@given(
    pairs=st.lists(st.tuples(st.floats(-10, 10), st.integers(1, 50)), min_size=1, max_size=20),
)
def test_interval_encloses_the_ratio_of_sums(pairs: list[tuple[float, int]]) -> None:
    numerators, denominators = zip(*pairs, strict=True)
    interval = ratio_interval(numerators, denominators)
    assert interval.mean == pytest.approx(sum(numerators) / sum(denominators), abs=1e-9)
    ratios = [n / d for n, d in pairs]
    assert min(ratios) - 1e-9 <= interval.low <= interval.high <= max(ratios) + 1e-9
    assert interval == ratio_interval(numerators, denominators)


def test_interval_has_the_width_of_the_standard_error() -> None:
    values = np.random.default_rng(1).normal(size=400)
    interval = ratio_interval(values, np.ones(400))
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert resample(5).shape == (2000, 5)


def test_one_document_has_no_width() -> None:
    interval = ratio_interval([3.0], [2.0])
    assert (interval.mean, interval.low, interval.high) == (1.5, 1.5, 1.5)


def test_summary_puts_documents_together() -> None:
    scores = [_score("a", "x", document, 0.01 * (document + 1), 8.0) for document in range(4)]
    rows = summarise(scores)
    assert [row.group for row in rows] == ["even", "odd", ALL_GROUPS]
    whole = rows[-1]
    assert whole.ratio == pytest.approx(8.0)
    assert (whole.documents, whole.probes, whole.tokens) == (4, 16, 400)
    assert whole.metrics["kl"].mean == pytest.approx(0.025)
    assert rows[0].metrics["kl"].mean == pytest.approx(0.02)
    assert whole.metrics["perplexity"].mean == pytest.approx(math.exp(2.5))
    assert whole.metrics["nll_change"].mean == pytest.approx(0.1)
    assert whole.metrics["accuracy"].mean == 0.75
    assert whole.metrics["accuracy_change"].mean == -0.25
    assert whole.metrics["top1"].mean == pytest.approx(0.9)


def test_a_ratio_is_all_bytes_over_all_bytes_not_a_mean_of_ratios() -> None:
    scores = [_score("a", "x", 0, 0.01, 2.0), _score("a", "x", 2, 0.01, 8.0)]
    [row] = summarise(scores)
    assert row.ratio == pytest.approx(2 / (1 / 2 + 1 / 8))


def test_bytes_at_equal_kl_of_known_curves() -> None:
    scores = [*_curve("ours", 2.0), *_curve("theirs", 1.0)]
    found = bytes_at_equal_kl(scores, "ours", "theirs", levels=(0.004, 0.02, 0.5))
    assert [one.kl for one in found] == [0.004, 0.02]  # nothing was measured at .5
    for one in found:
        assert one.bytes.mean == pytest.approx(0.5, rel=1e-4)
        # both codecs suffer from the same documents, so resampling them changes nothing
        assert one.bytes.low == pytest.approx(0.5, rel=1e-4)
        assert one.bytes.high == pytest.approx(0.5, rel=1e-4)


def test_documents_that_favour_one_codec_widen_the_interval() -> None:
    uneven = [
        dataclasses.replace(score, stored_bytes=score.stored_bytes * (1 + score.document))
        for score in _curve("ours", 2.0)
    ]
    [one] = bytes_at_equal_kl([*uneven, *_curve("theirs", 1.0)], "ours", "theirs", levels=(0.01,))
    assert one.bytes.low < 0.8 * one.bytes.mean < one.bytes.mean < 0.95 * one.bytes.high


def test_codecs_must_have_seen_the_same_documents() -> None:
    with pytest.raises(EvaluationError, match="same documents"):
        bytes_at_equal_kl([*_curve("ours", 2.0, 5), *_curve("theirs", 1.0, 6)], "ours", "theirs")
    with pytest.raises(EvaluationError, match="no scores of codec absent"):
        bytes_at_equal_kl(_curve("ours", 2.0), "ours", "absent")


def test_codecs_without_a_curve_are_left_out() -> None:
    exact = [_score("none", "exact", document, 0.0, 1.0) for document in range(6)]
    single = [_score("fp8", "one", document, 0.004, 2.0) for document in range(6)]
    compared = compare_bytes([*exact, *single, *_curve("kvtc", 1.0), *_curve("rd", 2.0)])
    assert {one.codec for one in compared["m"]} == {"rd"}
    assert all(one.against == "kvtc" for one in compared["m"])


def test_scores_survive_their_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("scores") / "scores.jsonl"
    scores = _curve("ours", 2.0)
    for score in scores:
        write_score(path, score)
    assert read_scores(path) == scores
    path.write_text('{"model": "m"}\n')
    with pytest.raises(EvaluationError, match="not a score"):
        read_scores(path)
