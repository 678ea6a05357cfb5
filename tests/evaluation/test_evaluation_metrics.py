from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_kvtc.errors import EvaluationError
from dynamo_kvtc.evaluation import EvaluationProtocol
from dynamo_kvtc.evaluation.metrics import DistributionSums, RowErrorSums


def test_divergence_of_two_known_distributions() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    sums = DistributionSums()
    sums.add(p.log(), q.log() + 7.0, torch.tensor([1]))
    assert sums.kl == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    assert sums.reference_nll == pytest.approx(math.log(4))
    assert sums.nll == pytest.approx(math.log(2))
    assert (sums.tokens, sums.agreements) == (1, 0)


def test_equal_logits_diverge_by_exactly_nothing() -> None:
    logits = torch.randn(70, 33)
    sums = DistributionSums()
    sums.add(logits, logits.clone(), torch.zeros(70, dtype=torch.int64))
    assert sums.kl == 0.0
    assert sums.agreements == sums.tokens == 70
    assert sums.nll == sums.reference_nll


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), tokens=st.integers(1, 80), scale=st.floats(0.01, 20))
def test_sums_do_not_depend_on_how_they_are_cut(seed: int, tokens: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn((2, tokens, 19), generator=generator) * scale
    targets = torch.randint(19, (tokens,), generator=generator)
    whole, pieces = DistributionSums(), DistributionSums()
    whole.add(p, q, targets)
    for row in range(tokens):
        pieces.add(p[row : row + 1], q[row : row + 1], targets[row : row + 1])
    expected = torch.nn.functional.kl_div(
        q.double().log_softmax(-1), p.double().log_softmax(-1), log_target=True, reduction="sum"
    )
    assert whole.kl == pytest.approx(float(expected), rel=1e-9, abs=1e-12)
    assert pieces.kl == pytest.approx(whole.kl, rel=1e-9, abs=1e-12)
    assert pieces.nll == pytest.approx(whole.nll)
    assert pieces.agreements == whole.agreements
    assert whole.kl >= 0


def test_rows_replaced_by_their_mean_have_error_one() -> None:
    rows = torch.randn(50, 8) + 100  # a mean far larger than what varies must not matter
    sums = RowErrorSums(8)
    sums.add(rows[:20], rows.mean(0).expand(20, 8))
    sums.add(rows[20:], rows.mean(0).expand(30, 8))
    assert sums.relative_error == pytest.approx(1.0, rel=1e-4)


def test_exact_rows_have_no_error_even_without_variation() -> None:
    sums = RowErrorSums(4)
    sums.add(torch.ones(3, 4), torch.ones(3, 4))
    assert sums.relative_error == 0.0


def test_tier_blocks_cover_the_coded_positions_and_the_last_is_shorter() -> None:
    assert EvaluationProtocol().tier_blocks() == [(0, 256), (256, 512), (512, 768), (768, 896)]


@pytest.mark.parametrize(
    "sizes",
    [
        {"context_tokens": 132},
        {"documents": 0},
        {"scored_tokens": 0},
        {"tier_block_tokens": 4},
        {"sink_tokens": -1},
    ],
)
def test_protocols_that_replace_or_score_nothing_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(EvaluationError):
        EvaluationProtocol(**sizes)
