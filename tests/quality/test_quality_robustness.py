from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.quality import robustness
from benchmarks.quality.domains import DOMAINS
from benchmarks.quality.measure import DocumentScore


def _score(codec: str, setting: str, document: int, kl: float, stored_bytes: int) -> DocumentScore:
    return DocumentScore(
        model="m",
        task="text",
        group=("prose", "code")[document % 2],
        document=document,
        codec=codec,
        setting=setting,
        raw_bytes=1000,
        stored_bytes=stored_bytes,
        tokens=1,
        kl=kl,
        nll=1.0,
        reference_nll=1.0,
        agreements=1,
        probes=1,
        correct=1,
        reference_correct=1,
    )


PLAN = replace(robustness.QUICK, domains=("prose", "code"))


def test_variants_change_one_thing_each() -> None:
    variants = robustness.FULL.variants()
    reference = variants[robustness.FULL.reference]
    assert next(iter(variants)) == robustness.FULL.reference
    assert variants["10240 tokens"] == replace(reference, tokens=10_240)
    for domain in DOMAINS:
        assert variants[f"{domain} only"] == replace(reference, domains=(domain,))
    assert variants["seed 2"] == replace(reference, seed=2)
    assert len(variants) == 1 + 2 + len(DOMAINS) + 2


def test_bytes_at_equal_divergence_are_those_over_the_reference() -> None:
    scores = []
    for document in range(4):
        scores += [
            _score(PLAN.reference, s, document, kl, b) for s, kl, b in (("1", 0.001, 100), ("2", 0.02, 50))
        ]
        scores += [
            _score("prose only", s, document, kl, b) for s, kl, b in (("1", 0.001, 120), ("2", 0.02, 60))
        ]
        # Every point of this one is above the level.
        scores += [
            _score("code only", s, document, kl, b) for s, kl, b in (("1", 0.006, 100), ("2", 0.02, 50))
        ]
    compared = robustness.compare(scores, PLAN)
    assert set(compared) == {"prose only", "code only"}
    for group in ("all", "prose", "code"):
        found = compared["prose only"][group]
        assert found is not None
        assert (found.mean, found.low, found.high) == pytest.approx((1.2, 1.2, 1.2))
        assert compared["code only"][group] is None
    table = robustness.robustness_table(scores, compared, PLAN)
    assert table.row_count == 3


def test_draws_without_loss_are_left_out_of_the_interval() -> None:
    scores = []
    for document in range(2):
        scores += [
            _score(PLAN.reference, s, document, kl, b) for s, kl, b in (("1", 0.001, 100), ("2", 0.02, 50))
        ]
        lossless = document == 1
        for setting, kl, stored in (("1", 0.002, 100), ("2", 0.04, 50)):
            scores.append(
                _score("prose only", setting, document, 0.0 if lossless else kl, 1000 if lossless else stored)
            )
    found = robustness.compare(scores, replace(PLAN, domains=("prose",)))["prose only"]["all"]
    assert found is not None
    assert found.low <= found.mean
    assert found.high < float("inf")
