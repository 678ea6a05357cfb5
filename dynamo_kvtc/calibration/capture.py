"""Run a model over a document and take the keys and values out of its cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dynamo_kvtc.calibration.models import LoadedModel
from dynamo_kvtc.calibration.transformers_cache import cache_of
from dynamo_kvtc.errors import CalibrationError

__all__ = ["RECENT_WINDOW", "SINK_TOKENS", "capture_rows", "read_cache", "select_rows"]

#: Leading positions of a sequence that are attention sinks and stay out of the fit (KVTC, section 3.3).
SINK_TOKENS = 4

#: Most recent tokens of a sequence that stay out of the fit, since they are never compressed.
RECENT_WINDOW = 128


@torch.inference_mode()
def capture_rows(loaded: LoadedModel, token_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefill one document and return its keys, with RoPE removed, and its values.

    The keys are taken from the cache, rounded to its dtype, and RoPE is removed from them: exactly what
    an encoder does while serving.

    Parameters
    ----------
    loaded : LoadedModel
        The model.
    token_ids : Sequence[int]
        One document.

    Returns
    -------
    tuple[torch.Tensor, torch.Tensor]
        Keys and values, float32 ``[tokens, row_size]``, layer-major, then head, then channel.

    Raises
    ------
    CalibrationError
        If the model's cache is not one of plain keys and values for every token, or holds NaN or
        infinity.
    """
    decoder = loaded.model.base_model  # without the output head, which calibration has no use for
    cache = cache_of(decoder(input_ids=torch.tensor([list(token_ids)]), use_cache=True))
    return read_cache(loaded, cache, len(token_ids))


def read_cache(loaded: LoadedModel, cache: Any, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of a cache that was filled from position 0.

    Parameters
    ----------
    loaded : LoadedModel
        The model.
    cache : transformers.Cache
        Of a batch of one.
    tokens : int
        How many tokens it must hold.

    Returns
    -------
    tuple[torch.Tensor, torch.Tensor]
        As `capture_rows`.

    Raises
    ------
    CalibrationError
        As `capture_rows`.
    """
    geometry = loaded.geometry
    try:
        keys = torch.stack([layer.keys[0] for layer in cache.layers])
        values = torch.stack([layer.values[0] for layer in cache.layers])
    except (AttributeError, TypeError, RuntimeError) as error:
        raise CalibrationError(
            f"the cache of {type(loaded.model).__name__} does not hold keys and values per layer: {error}"
        ) from error
    expected = (geometry.num_layers, geometry.num_kv_heads, tokens, geometry.head_size)
    if keys.shape != expected or values.shape != expected:
        raise CalibrationError(
            f"{type(loaded.model).__name__} caches keys {tuple(keys.shape)} and values "
            f"{tuple(values.shape)} (layers, heads, tokens, channels) instead of {expected}"
        )
    positions = torch.arange(tokens)
    key_rows = loaded.rope.remove_rope(keys.permute(2, 0, 1, 3), positions).flatten(1)
    value_rows = values.permute(2, 0, 1, 3).float().flatten(1)
    if not (key_rows.isfinite().all() and value_rows.isfinite().all()):
        raise CalibrationError(
            f"the model's keys or values in {geometry.dtype} hold NaN or infinity; load it in float32"
        )
    return key_rows, value_rows


def select_rows(rows: torch.Tensor, recent_window: int = RECENT_WINDOW) -> torch.Tensor:
    """Return the rows ``[tokens, row]`` of a document that are fitted to: no sinks, no recent tokens."""
    return rows[SINK_TOKENS : max(SINK_TOKENS, rows.shape[0] - recent_window)]
