from __future__ import annotations

import pytest
import torch

from dynamo_kvtc.calibration.capture import capture_rows, select_rows
from dynamo_kvtc.calibration.models import load_model
from dynamo_kvtc.errors import CalibrationError


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return load_model(tiny_model, dtype="float32")


def test_captured_keys_are_those_before_rope(loaded):
    """Compare with what the key and value projections really put out, caught by hooks."""
    projected: dict[str, list[torch.Tensor]] = {"keys": [], "values": []}
    hooks = []
    for layer in loaded.model.base_model.layers:
        for side, projection in (("keys", layer.self_attn.k_proj), ("values", layer.self_attn.v_proj)):
            hooks.append(
                projection.register_forward_hook(
                    lambda module, inputs, output, side=side: projected[side].append(output[0])
                )
            )
    try:
        keys, values = capture_rows(loaded, list(range(50)))
    finally:
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(keys, torch.cat(projected["keys"], dim=1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values, torch.cat(projected["values"], dim=1), atol=0, rtol=0)


def test_sinks_and_the_recent_window_are_left_out():
    rows = torch.arange(20)[:, None]
    assert select_rows(rows, recent_window=6).flatten().tolist() == list(range(4, 14))
    assert select_rows(rows[:7], recent_window=6).shape == (0, 1)


def test_keys_that_are_not_finite_are_refused(tiny_model):
    broken = load_model(tiny_model, dtype="float32")
    with torch.no_grad():
        broken.model.base_model.layers[1].self_attn.v_proj.weight.fill_(torch.inf)
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        capture_rows(broken, list(range(20)))
