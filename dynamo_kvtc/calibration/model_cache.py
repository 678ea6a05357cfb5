"""Run a model with a KV cache that the caller owns: take it out after a prefill, put another one in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dynamo_kvtc.calibration.models import LoadedModel
from dynamo_kvtc.calibration.transformers_cache import cache_argument, cache_of

__all__ = ["prefill", "score"]


@torch.inference_mode()
def prefill(loaded: LoadedModel, token_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the KV of a text.

    Returns
    -------
    tuple[torch.Tensor, torch.Tensor]
        Keys (RoPE applied) and values ``[tokens, num_layers, num_kv_heads, head_size]`` in the model's
        dtype: the shape of `dynamo_kvtc.codec.base.TierBlock`.
    """
    decoder = loaded.model.base_model  # without the output head: its logits are not wanted
    layers = cache_of(decoder(input_ids=torch.tensor([list(token_ids)]), use_cache=True)).layers
    keys, values = (
        torch.stack([getattr(layer, side)[0].transpose(0, 1) for layer in layers], dim=1)
        for side in ("keys", "values")
    )
    return keys, values


@torch.inference_mode()
def score(
    loaded: LoadedModel, keys: torch.Tensor, values: torch.Tensor, token_ids: Sequence[int]
) -> torch.Tensor:
    """Run tokens behind a given cache and return what the model predicts after each of them.

    Parameters
    ----------
    keys, values : torch.Tensor
        As `prefill` returns them, for all tokens before `token_ids`; not modified.

    Returns
    -------
    torch.Tensor
        Logits, float32 ``[tokens, vocabulary]``.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(keys.shape[1]):
        cache.update(keys[:, layer].transpose(0, 1)[None], values[:, layer].transpose(0, 1)[None], layer)
    ids = torch.tensor([list(token_ids)])
    output = loaded.model(input_ids=ids, use_cache=True, **cache_argument(loaded.model, cache))
    logits: torch.Tensor = output.logits[0].float()
    return logits
