from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_kvtc.calibration.divergence import DistributionSums


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
