from __future__ import annotations

import pytest
import torch

from dynamo_kvtc.errors import EvaluationError
from dynamo_kvtc.evaluation import EvaluationProtocol
from dynamo_kvtc.evaluation.metrics import RowErrorSums


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
